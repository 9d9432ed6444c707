//! The rules of this repository that no compiler and no clippy lint knows, as tests.
//!
//! They read the sources as text: simple on purpose. Where one stands in the way of good code, change
//! the rule here, in the same commit, and say why.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Who may import whom (`ARCHITECTURE.md`, "The arrows"): a module of `src` and the modules that its
/// code outside of tests may name. `faults` is behind a feature that no release build has.
const ARROWS: &[(&str, &[&str])] = &[
    ("domain", &[]),
    // Leaves: they know nothing of payments.
    ("chance", &[]),
    ("clock", &[]),
    ("egress", &[]),
    ("config", &["egress"]),
    ("log_budget", &["clock"]),
    ("pace", &["clock"]),
    ("recent", &[]),
    ("metrics", &[]),
    ("telemetry", &["config"]),
    ("healthcheck", &["clock"]),
    ("server", &["log_budget"]),
    ("process", &[]),
    ("ops", &["process", "server"]),
    ("slot", &[]),
    // The data's way.
    ("store", &["domain", "clock", "faults", "pace"]),
    ("courier", &["domain", "clock", "egress", "recent"]),
    ("app", &["domain", "store", "clock", "metrics"]),
    ("driver", &["domain", "store", "clock"]),
    ("scheduler", &["domain", "store", "app", "driver", "clock", "metrics", "faults"]),
    ("outbox", &["domain", "store", "courier", "driver", "clock", "metrics", "pace", "recent"]),
    ("api", &["domain", "store", "app", "recent", "slot"]),
    ("edge", &["api", "domain", "clock", "log_budget", "metrics", "slot"]),
    ("faults", &["domain", "store", "courier"]),
    // The other binary: it knows events, and nothing of how payments are kept.
    (
        "reservation",
        &[
            "domain",
            "courier",
            "chance",
            "clock",
            "config",
            "log_budget",
            "metrics",
            "ops",
            "process",
            "server",
        ],
    ),
    ("bin", &["*"]),
    // Above everything: wiring, then running.
    ("service", &["*"]),
    ("runtime", &["*"]),
    ("start", &["config", "healthcheck", "process", "telemetry"]),
    ("main", &["*"]),
    ("lib", &["*"]),
];

/// What pure code may use: nothing that waits, reads a clock, rolls dice or does I/O.
const DOMAIN_CRATES: &[&str] = &[
    "std",
    "serde",
    "serde_json",
    "thiserror",
    "hmac",
    "sha2",
    "siphasher",
    "base64",
    "hex",
    "jiff",
    "iso_currency",
    "ulid",
    // A parser alone: it looks up and connects to nothing.
    "url",
];

/// Parts of std that pure code leaves alone.
const DOMAIN_STD_BANS: &[&str] = &[
    "std::fs",
    "std::io",
    "std::net",
    "std::thread",
    "std::env",
    "std::process",
    "std::sync::Mutex",
];

const FUNCTION_LINES_MAX: usize = 70;

struct Source {
    path: PathBuf,
    text: String,
}

impl Source {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// Whether the whole file is a test's.
    fn is_test(&self) -> bool {
        let stem = self.path.file_stem().unwrap().to_str().unwrap();
        let test_files = ["tests", "testbed", "conformance", "receiver"];
        self.path.starts_with("tests") || stem.ends_with("_tests") || test_files.contains(&stem)
    }

    /// The code without its unit tests, comments and the insides of string literals.
    fn product(&self) -> String {
        if self.is_test() {
            return String::new();
        }
        let begins = ["mod tests", "pub mod tests"];
        let found =
            begins.into_iter().filter_map(|b| self.text.find(&format!("#[cfg(test)]\n{b}")));
        let end = found.min().unwrap_or(self.text.len());
        code_only(&self.text[..end])
    }

    /// The module right below `src`.
    fn module(&self) -> String {
        let below = self.path.strip_prefix("src").unwrap();
        let first = below.components().next().unwrap().as_os_str().to_str().unwrap();
        first.strip_suffix(".rs").unwrap_or(first).to_owned()
    }
}

/// Blanks comments, string and character literals, and keeps the lines.
fn code_only(text: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(c) = rest.chars().next() {
        let skipped = match c {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            'r' if rest.starts_with("r#\"") => rest.find("\"#").map_or(rest.len(), |end| end + 2),
            '"' => string_end(rest),
            '\'' if rest[1..].starts_with('\\') => rest[2..].find('\'').map_or(1, |end| end + 3),
            '\'' => match rest[1..].chars().next() {
                Some(inner) if rest[1 + inner.len_utf8()..].starts_with('\'') => {
                    2 + inner.len_utf8()
                }
                _ => 0,
            },
            _ => 0,
        };
        if skipped == 0 {
            out.push(c);
            rest = &rest[c.len_utf8()..];
        } else {
            out.extend(rest[..skipped].chars().filter(|c| *c == '\n'));
            rest = &rest[skipped..];
        }
    }
    out
}

fn string_end(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

fn files(folder: &str, extension: &str) -> Vec<Source> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            let hidden = name.starts_with('.') && name != ".ci" && name != ".env.template";
            if hidden || matches!(name, "target" | "node_modules" | "data" | "__pycache__") {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if extension.is_empty() || path.extension().is_some_and(|e| e == extension) {
                let Ok(text) = fs::read_to_string(&path) else { continue };
                found.push(Source {
                    path: path.strip_prefix("./").unwrap_or(&path).to_owned(),
                    text,
                });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(!found.is_empty(), "nothing in {folder}");
    found
}

/// The first names behind every `prefix` (`crate::`): `a` and `b` of `crate::a::X` and `crate::{a, b::Y}`.
fn first_names(code: &str, prefix: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (at, _) in code.match_indices(prefix) {
        let rest = &code[at + prefix.len()..];
        match rest.strip_prefix('{') {
            Some(group) => names.extend(group_names(group)),
            None => names.extend(identifier(rest)),
        }
    }
    names
}

fn group_names(group: &str) -> Vec<String> {
    let (mut depth, mut names, mut expects) = (1, Vec::new(), true);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => expects = true,
            c if depth == 1 && expects && !c.is_whitespace() => {
                names.extend(identifier(&group[at..]));
                expects = false;
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    names
}

fn identifier(text: &str) -> Option<String> {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    (end > 0).then(|| text[..end].to_owned())
}

#[track_caller]
fn none(found: Vec<String>, rule: &str) {
    assert!(found.is_empty(), "{rule}:\n  {}", found.join("\n  "));
}

#[test]
fn imports_follow_the_arrows() {
    let allowed: BTreeMap<_, _> = ARROWS.iter().copied().collect();
    let modules: BTreeSet<&str> = allowed.keys().copied().collect();
    let mut wrong = Vec::new();
    for source in files("src", "rs") {
        let module = source.module();
        let Some(may) = allowed.get(module.as_str()) else {
            wrong.push(format!("{} is not in the table of arrows", source.name()));
            continue;
        };
        for name in first_names(&source.product(), "crate::") {
            let ours = modules.contains(name.as_str()) && name != module;
            if ours && !may.contains(&"*") && !may.contains(&name.as_str()) {
                wrong.push(format!("{} imports {name}", source.name()));
            }
        }
    }
    none(wrong, "an import against the arrows");
}

#[test]
fn every_arrow_is_drawn() {
    let mut unused: BTreeSet<_> =
        ARROWS.iter().flat_map(|(from, to)| to.iter().map(move |to| (*from, *to))).collect();
    unused.retain(|(_, to)| *to != "*");
    for source in files("src", "rs") {
        for name in first_names(&source.product(), "crate::") {
            unused.retain(|(from, to)| !(*from == source.module() && *to == name));
        }
    }
    none(
        unused.iter().map(|(from, to)| format!("{from} -> {to}")).collect(),
        "allowed and not there",
    );
}

#[test]
fn the_domain_is_pure() {
    let mut wrong = Vec::new();
    let own: BTreeSet<String> = files("src/domain", "rs").iter().map(module_name).collect();
    for source in files("src/domain", "rs") {
        let code = source.product();
        for name in first_names(&code, "\nuse ").into_iter().chain(first_names(&code, "    use ")) {
            let ours = matches!(name.as_str(), "super" | "self" | "crate") || own.contains(&name);
            if !ours && !DOMAIN_CRATES.contains(&name.as_str()) {
                wrong.push(format!("{} uses {name}", source.name()));
            }
        }
        let banned = DOMAIN_STD_BANS.iter().filter(|banned| code.contains(**banned));
        wrong.extend(banned.map(|banned| format!("{} uses {banned}", source.name())));
        for word in
            ["async fn", ".await", "tokio::", "tracing::", "getrandom", "SystemTime", "Instant"]
        {
            if code.contains(word) {
                wrong.push(format!("{} says {word}", source.name()));
            }
        }
    }
    none(wrong, "the domain imports pure code alone");
}

fn module_name(source: &Source) -> String {
    source.path.file_stem().unwrap().to_str().unwrap().to_owned()
}

#[test]
fn what_is_banned_is_not_there() {
    let mut wrong = Vec::new();
    for source in files("src", "rs") {
        let code = source.product();
        let talks = matches!(source.module().as_str(), "start" | "config");
        for (banned, except) in [
            (".unwrap()", false),
            ("todo!", false),
            ("unimplemented!", false),
            ("dbg!", false),
            ("println!", talks),
        ] {
            let lines =
                code.lines().enumerate().filter(|(_, line)| !except && line.contains(banned));
            wrong.extend(lines.map(|(n, _)| format!("{}:{}: {banned}", source.name(), n + 1)));
        }
    }
    none(wrong, "banned outside of tests");
}

#[test]
fn functions_fit_on_a_screen() {
    let mut long = Vec::new();
    for source in files("src", "rs").into_iter().chain(files("tests", "rs")) {
        let code = code_only(&source.text);
        let lines: Vec<&str> = code.lines().collect();
        for (start, line) in lines.iter().enumerate() {
            let is_function = line.trim_start().split(' ').take(4).any(|word| word == "fn");
            if !is_function {
                continue;
            }
            if let Some(length) = function_length(&lines[start..])
                && length > FUNCTION_LINES_MAX
            {
                long.push(format!("{}:{}: {length} lines", source.name(), start + 1));
            }
        }
    }
    none(long, "functions over 70 lines");
}

/// Lines from the signature to the brace that closes the body; `None` for one without a body.
fn function_length(lines: &[&str]) -> Option<usize> {
    let mut depth = 0_usize;
    for (n, line) in lines.iter().enumerate() {
        for c in line.chars() {
            match c {
                '{' => depth += 1,
                '}' => {
                    depth = depth.saturating_sub(1);
                    if depth == 0 {
                        return Some(n + 1);
                    }
                }
                ';' if depth == 0 => return None,
                _ => {}
            }
        }
    }
    None
}

#[test]
fn no_file_is_a_drawer_for_odds_and_ends() {
    let odds = ["utils", "util", "helpers", "helper", "common", "misc"];
    let wrong = files("src", "rs").into_iter().chain(files("tests", "rs"));
    let wrong = wrong.filter(|source| {
        source.path.components().any(|part| {
            let name = part.as_os_str().to_str().unwrap();
            odds.contains(&name.strip_suffix(".rs").unwrap_or(name))
        })
    });
    none(wrong.map(|source| source.name()).collect(), "named after nothing");
}

#[test]
fn the_state_machine_is_matched_in_full() {
    let code = code_only(&fs::read_to_string("src/domain/payment.rs").unwrap());
    let arms = code.lines().enumerate().filter(|(_, line)| {
        let line = line.trim_start();
        line.starts_with("_ =>") || line.starts_with("_ if ") || line.contains("| _ =>")
    });
    let arms = arms.map(|(n, _)| format!("src/domain/payment.rs:{}", n + 1)).collect();
    none(arms, "a `_` arm: a new state must break the build");
}

/// Where packages come from is the builder's affair: a name in the tree would bind every clone to it.
#[test]
fn no_package_registry_is_named() {
    let hosts = [
        ["index.crates", ".io"],
        ["static.crates", ".io"],
        ["pypi", ".org"],
        ["pythonhosted", ".org"],
        ["registry.npmjs", ".org"],
        ["registry.yarnpkg", ".com"],
        ["proxy.golang", ".org"],
        ["sum.golang", ".org"],
        ["deb.debian", ".org"],
        ["dl-cdn.alpinelinux", ".org"],
    ];
    let mut wrong = Vec::new();
    for source in files(".", "") {
        let hosts = hosts.iter().map(|parts| parts.concat());
        let named = hosts.filter(|host| source.text.contains(host.as_str()));
        wrong.extend(named.map(|host| format!("{} names {host}", source.name())));
    }
    none(wrong, "a package registry's host in the tree");
}

/// Each direct dependency has a row in ARCHITECTURE.md that says what it is for.
#[test]
fn every_dependency_is_accounted_for() {
    if !Path::new("ARCHITECTURE.md").exists() {
        eprintln!("SKIPPED: there is no ARCHITECTURE.md to compare with");
        return;
    }
    let manifest = fs::read_to_string("Cargo.toml").unwrap();
    let page = fs::read_to_string("ARCHITECTURE.md").unwrap();
    let rows: String = page.lines().filter(|line| line.starts_with('|')).collect();
    let mut section = "";
    let mut missing = Vec::new();
    for line in manifest.lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']');
        } else if section.ends_with("dependencies")
            && let Some(name) = line.split([' ', '=', '.']).next().filter(|name| !name.is_empty())
            && !name.starts_with('#')
            && !rows.contains(&format!("`{name}`"))
        {
            missing.push(format!("{name} ({section})"));
        }
    }
    none(missing, "dependencies without a row in ARCHITECTURE.md");
}
