//! Where values come from besides flags: the environment, `.env.local` and `.env`.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Who gave a value; the earlier one holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    Flag,
    Environment,
    DotEnvLocal,
    DotEnv,
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Flag => "flag",
            Self::Environment => "environment",
            Self::DotEnvLocal => ".env.local",
            Self::DotEnv => ".env",
            Self::Default => "default",
        })
    }
}

/// The variables in force and where each comes from. Tests make one of pairs.
#[derive(Default)]
pub struct Environment(HashMap<String, (OsString, Origin)>);

impl<const N: usize> From<[(&str, &str); N]> for Environment {
    fn from(pairs: [(&str, &str); N]) -> Self {
        let mut environment = Self::default();
        for (name, value) in pairs {
            environment.add(name.to_owned(), value.into(), Origin::Environment);
        }
        environment
    }
}

impl Environment {
    /// The process's own variables, then `folder`'s `.env.local` and `.env`, which also go into the
    /// process environment, for libraries that read it (the AWS SDK). To be called before any
    /// thread starts, because the environment belongs to all threads.
    ///
    /// # Errors
    /// One text for each thing in the files that cannot be read.
    pub(super) fn load(folder: &Path) -> Result<Self, Vec<String>> {
        let mut environment = Self::of_process();
        let mut errors = Vec::new();
        for (name, origin) in Self::FILES {
            let path = folder.join(name);
            match environment.add_file(&path, origin) {
                // File by file, because `.env` may refer to what `.env.local` has set.
                Ok(Found::Read) => {
                    if let Err(error) = dotenvy::from_path(&path) {
                        errors.push(unreadable(&path, &error));
                    }
                }
                Ok(Found::Missing) => {}
                Err(mut found) => errors.append(&mut found),
            }
        }
        if errors.is_empty() { Ok(environment) } else { Err(errors) }
    }

    pub(super) const FILES: [(&str, Origin); 2] =
        [(".env.local", Origin::DotEnvLocal), (".env", Origin::DotEnv)];

    #[expect(clippy::disallowed_methods, reason = "the module that the ban points to")]
    fn of_process() -> Self {
        let mut environment = Self::default();
        for (name, value) in std::env::vars_os() {
            // No setting has a name that is not UTF-8.
            if let Ok(name) = name.into_string() {
                environment.add(name, value, Origin::Environment);
            }
        }
        environment
    }

    /// Adds what `path` gives, never over what is there.
    pub(super) fn add_file(&mut self, path: &Path, origin: Origin) -> Result<Found, Vec<String>> {
        let pairs = match dotenvy::from_path_iter(path) {
            Ok(pairs) => pairs,
            Err(dotenvy::Error::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Found::Missing);
            }
            Err(error) => return Err(vec![unreadable(path, &error)]),
        };
        let mut errors = Vec::new();
        for pair in pairs {
            match pair {
                Ok((name, value)) => self.add(name, value.into(), origin),
                Err(error) => {
                    errors.push(unreadable(path, &error));
                    // A line can be skipped; a file that fails to be read fails for ever.
                    if matches!(error, dotenvy::Error::Io(_)) {
                        break;
                    }
                }
            }
        }
        if errors.is_empty() { Ok(Found::Read) } else { Err(errors) }
    }

    fn add(&mut self, name: String, value: OsString, origin: Origin) {
        self.0.entry(name).or_insert((value, origin));
    }

    pub(super) fn get(&self, name: &str) -> Option<(&OsStr, Origin)> {
        self.0.get(name).map(|(value, origin)| (value.as_os_str(), *origin))
    }

    /// Whether the files that every AWS SDK reads define this profile. Only their section headers
    /// are looked at: the SDK's own reader is asynchronous and not public.
    pub(super) fn has_aws_profile(&self, profile: &str) -> bool {
        let files = [
            ("AWS_CONFIG_FILE", ".aws/config"),
            ("AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials"),
        ];
        files.into_iter().any(|(variable, default)| {
            self.aws_file(variable, default)
                .and_then(|path| std::fs::read_to_string(path).ok())
                .is_some_and(|text| text.lines().any(|line| is_profile_header(line, profile)))
        })
    }

    fn aws_file(&self, variable: &str, default: &str) -> Option<PathBuf> {
        let home = self.get("HOME").map(|(home, _)| PathBuf::from(home));
        match self.get(variable) {
            Some((path, _)) => match (Path::new(path).strip_prefix("~"), home) {
                (Ok(below), Some(home)) => Some(home.join(below)),
                _ => Some(PathBuf::from(path)),
            },
            None => Some(home?.join(default)),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    Read,
    Missing,
}

/// Says what is wrong with a file without quoting the line: it may hold a secret.
fn unreadable(path: &Path, error: &dotenvy::Error) -> String {
    let path = path.display();
    match error {
        dotenvy::Error::LineParse(line, _) => {
            let name = line.split_once('=').map(|(name, _)| name.trim());
            match name.filter(|name| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')) {
                Some(name) => format!("{path}: the value of {name} cannot be read (quotes?)"),
                None => format!("{path}: a line is not of the form NAME=value"),
            }
        }
        other => format!("{path}: {other}"),
    }
}

fn is_profile_header(line: &str, profile: &str) -> bool {
    let Some((header, _)) = line.trim().strip_prefix('[').and_then(|l| l.split_once(']')) else {
        return false;
    };
    let header = header.trim();
    let name = header.strip_prefix("profile ").unwrap_or(header);
    name.trim().trim_matches(['"', '\'']) == profile
}
