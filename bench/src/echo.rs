//! The yardstick as a process of its own: `bin/echo.rs`, which stores nothing.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
};

use crate::{
    load::{Calls, Kind},
    service::beside,
};

/// Ends with this value.
pub struct Echo {
    child: Child,
    address: SocketAddr,
}

impl Echo {
    /// Starts it with the file whose bytes it answers to such calls.
    ///
    /// # Errors
    /// Where it does not start.
    pub fn start(calls: &Calls, reply: &Path) -> Result<Self, String> {
        let binary = beside("echo")?;
        let method = match calls.kind {
            Kind::Create | Kind::Whole(_) => "create",
            Kind::Get(_) => "get",
        };
        let mut child = Command::new(&binary)
            .arg(format!("{method}={}", reply.display()))
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{}: {error}", binary.display()))?;
        let mut line = String::new();
        if let Some(output) = child.stdout.take() {
            BufReader::new(output).read_line(&mut line).map_err(|error| error.to_string())?;
        }
        let address = line.trim().parse();
        let address = address.map_err(|_| format!("{} does not start", binary.display()))?;
        Ok(Self { child, address })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
