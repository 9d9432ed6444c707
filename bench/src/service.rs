//! The service as users run it: a process of its own.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use payment_sim::clock::Stopwatch;

use crate::{client::Client, gauge};

/// A start that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(120);
const LOCALHOST: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// Ends with this value.
pub struct Service {
    child: Child,
    grpc: u16,
    ops: u16,
}

impl Service {
    /// Starts `binary` with its data in `dir` and no other settings than `settings`, and waits until
    /// it is ready.
    ///
    /// # Errors
    /// Where it does not start, ends, or takes too long.
    pub async fn start(
        dir: &Path,
        binary: &Path,
        settings: &[(&str, &str)],
    ) -> Result<Self, String> {
        // It is started in another folder than this program.
        let absolute = |path| std::path::absolute(path).map_err(|error| error.to_string());
        let (dir, binary) = (absolute(dir)?, absolute(binary)?);
        let (grpc, ops) = (free_port()?, free_port()?);
        let took = Stopwatch::start();
        let child = Command::new(&binary)
            // No settings but these: also none of an .env file's.
            .current_dir(&dir)
            .env_clear()
            .env("STORE_URL", format!("file:{}", dir.join("data").display()))
            .env("GRPC_PORT", grpc.to_string())
            .env("OPS_PORT", ops.to_string())
            .env("EVENT_SINK", "none")
            .env("LOG_LEVEL", "warn")
            .envs(settings.iter().copied())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| format!("{}: {error}", binary.display()))?;
        let mut service = Self { child, grpc, ops };
        while service.get("/readyz").is_err() {
            if took.elapsed() > PATIENCE {
                return Err(format!("not ready after {PATIENCE:?}"));
            }
            if let Ok(Some(status)) = service.child.try_wait() {
                return Err(format!("{} ended with {status}", binary.display()));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(service)
    }

    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((LOCALHOST, self.grpc))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// # Errors
    /// Where it no longer listens.
    pub async fn connect(&self) -> Result<Client, String> {
        Client::connect(self.address()).await
    }

    /// A line of the process's `status` that is in kB, such as `VmRSS`, in MiB.
    pub fn memory_mib(&self, name: &str) -> f64 {
        gauge::memory_mib(&self.pid().to_string(), name)
    }

    /// The metric with exactly this name and these labels.
    ///
    /// # Errors
    /// Where the service does not answer, or has no such metric.
    pub fn metric(&self, name: &str) -> Result<f64, String> {
        let metrics = self.get("/metrics").map_err(|error| format!("/metrics: {error}"))?;
        let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let value = value.and_then(|value| value.trim().parse().ok());
        value.ok_or_else(|| format!("there is no metric {name}"))
    }

    /// A page of the ops port, when its status is 200.
    fn get(&self, path: &str) -> io::Result<String> {
        let mut stream = TcpStream::connect((LOCALHOST, self.ops))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes())?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply)?;
        if reply.starts_with("HTTP/1.1 200") { Ok(reply) } else { Err(io::Error::other(reply)) }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // What it acknowledged is on the disk; nothing else is asked of it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where the binary of this name lies when it was built into the same folder as this program.
///
/// # Errors
/// Where the system does not say what this program is.
pub fn beside(name: &str) -> Result<PathBuf, String> {
    let this = std::env::current_exe().map_err(|error| error.to_string())?;
    Ok(this.with_file_name(name))
}

fn free_port() -> Result<u16, String> {
    let listener = TcpListener::bind((LOCALHOST, 0));
    let address = listener.and_then(|listener| listener.local_addr());
    address.map(|address| address.port()).map_err(|error| error.to_string())
}
