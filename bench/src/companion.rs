//! A process of ours beside the service: it says on its standard output where it listens, and does nothing
//! but what it is there for.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
};

use crate::service::beside;

/// Ends with this value.
pub struct Companion {
    child: Child,
    address: SocketAddr,
}

impl Companion {
    /// # Errors
    /// Where it does not start.
    pub fn start(name: &str, arguments: &[String]) -> Result<Self, String> {
        let binary = beside(name)?;
        let started = Command::new(&binary).args(arguments).stdout(Stdio::piped()).spawn();
        let mut child = started.map_err(|error| format!("{}: {error}", binary.display()))?;
        let mut line = String::new();
        if let Some(output) = child.stdout.take() {
            BufReader::new(output).read_line(&mut line).map_err(|error| error.to_string())?;
        }
        let address = line.trim().parse();
        let address = address.map_err(|_| format!("{} does not start", binary.display()))?;
        Ok(Self { child, address })
    }

    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Companion {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
