//! What is measured: the service with one set of settings, started as often as needed.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    argument,
    client::Client,
    load::Calls,
    on_a_runtime,
    service::{Service, beside},
};

/// Its folder is removed with this value, save one that was filled before.
pub struct Subject {
    scratch: PathBuf,
    /// Where the service finds its payments; `None`: it starts empty each time.
    filled: Option<PathBuf>,
    binary: PathBuf,
    settings: Vec<(&'static str, &'static str)>,
}

impl Subject {
    /// The arguments `dir=PATH` and `binary=PATH` say where its data are and what is run.
    ///
    /// # Errors
    /// Where there can be no such folder.
    pub fn from_arguments(settings: &[(&'static str, &'static str)]) -> Result<Self, String> {
        let parent: PathBuf = argument("dir", std::env::temp_dir())?;
        let scratch = parent.join(format!("payment-sim-bench-{}", std::process::id()));
        create(&scratch)?;
        let binary = argument("binary", beside("payment-sim")?)?;
        Ok(Self { scratch, filled: None, binary, settings: settings.to_vec() })
    }

    /// A folder that lasts as long as this value.
    pub fn scratch(&self) -> &Path {
        &self.scratch
    }

    /// Serves what is stored in a folder, and goes on there with each start.
    #[must_use]
    pub fn serving(mut self, folder: PathBuf) -> Self {
        self.filled = Some(folder);
        self
    }

    /// # Errors
    /// Where it does not start.
    pub fn service(&self) -> Result<Service, String> {
        let folder = match &self.filled {
            Some(folder) => folder.clone(),
            None => {
                let folder = self.scratch.join("served");
                // There is none before the first start.
                let _ = fs::remove_dir_all(&folder);
                create(&folder)?;
                folder
            }
        };
        on_a_runtime(Service::start(&folder, &self.binary, &self.settings))
    }

    /// The file with the bytes that the service answers to the first of these calls.
    ///
    /// # Errors
    /// Where it does not start, or refuses the call.
    pub fn reply(&self, calls: &Calls) -> Result<PathBuf, String> {
        let service = self.service()?;
        let reply = on_a_runtime(async {
            let client = Client::connect(service.address()).await?;
            client.call_framed(calls.path(), calls.request(0)).await
        })?;
        let path = self.scratch.join("reply");
        fs::write(&path, reply).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.scratch);
    }
}

fn create(folder: &Path) -> Result<(), String> {
    fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))
}
