//! The real binary as a process of its own, in a process group of its own; gone when it is dropped.

use std::{
    fs::OpenOptions,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    time::Duration,
};

use payment_sim::clock::Stopwatch;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{free_ports, until};

/// How to start the service.
#[derive(Clone, Debug)]
pub struct Launch {
    pub grpc_port: u16,
    pub ops_port: u16,
    folder: PathBuf,
    settings: Vec<(&'static str, String)>,
    wrapper: Vec<String>,
}

impl Launch {
    /// On free ports, with its data and its log in `folder`, and no web.
    pub fn new(folder: &Path) -> Self {
        let [grpc_port, ops_port] = free_ports();
        let launch = Self {
            grpc_port,
            ops_port,
            folder: folder.to_owned(),
            settings: Vec::new(),
            wrapper: Vec::new(),
        };
        let store = format!("file:{}", folder.join("data").display());
        launch
            .with("GRPC_PORT", grpc_port)
            .with("OPS_PORT", ops_port)
            .with("STORE_URL", store)
            .with("EVENT_SINK", "log")
            .with("LOG_LEVEL", "warn")
    }

    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl ToString) -> Self {
        self.settings.retain(|(known, _)| *known != name);
        self.settings.push((name, value.to_string()));
        self
    }

    /// Leaves a setting to its default.
    #[must_use]
    pub fn without(mut self, name: &str) -> Self {
        self.settings.retain(|(known, _)| *known != name);
        self
    }

    /// Starts it under another program, which gets its path as the last argument.
    #[must_use]
    pub fn under(mut self, wrapper: &[&str]) -> Self {
        self.wrapper = wrapper.iter().map(|&word| word.to_owned()).collect();
        self
    }

    pub fn log(&self) -> PathBuf {
        self.folder.join("service.log")
    }

    /// Nothing of this process's environment reaches it, and no `.env` file.
    pub fn start(&self) -> Service {
        let log = OpenOptions::new().create(true).append(true).open(self.log()).expect("a log");
        let mut words: Vec<&str> = self.wrapper.iter().map(String::as_str).collect();
        words.push(env!("CARGO_BIN_EXE_payment-sim"));
        let mut command = Command::new(words[0]);
        command
            .args(&words[1..])
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .env("HOME", &self.folder)
            .env("RUST_BACKTRACE", "1")
            .envs(self.settings.iter().map(|(name, value)| (name, value)))
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .process_group(0);
        let child = command.spawn().unwrap_or_else(|e| panic!("{}: {e}", words[0]));
        Service { child, ops_port: self.ops_port }
    }
}

pub struct Service {
    child: Child,
    ops_port: u16,
}

impl Service {
    /// Whoever takes it must read it: a full pipe holds up the events.
    pub fn stdout(&mut self) -> ChildStdout {
        self.child.stdout.take().expect("taken once")
    }

    /// Waits for `/readyz`.
    pub async fn ready(&mut self, within: Duration) -> Result<(), String> {
        let port = self.ops_port;
        let watch = Stopwatch::start();
        while !get(port, "/readyz").await.is_some_and(|reply| reply.starts_with("HTTP/1.1 200")) {
            if let Some(status) = self.exited() {
                return Err(format!("the service ended while it started: {status}"));
            }
            if watch.elapsed() > within {
                return Err(format!("the service was not ready within {within:?}"));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("it is our child")
    }

    pub async fn exits(&mut self, within: Duration) -> Option<ExitStatus> {
        let mut status = None;
        let child = &mut self.child;
        let ended = until(within, || {
            status = child.try_wait().expect("it is our child");
            std::future::ready(status.is_some())
        });
        ended.await;
        status
    }

    /// SIGTERM to the whole group: what it runs under waits for it.
    pub fn terminate(&self) {
        // It may be gone already.
        let _ = kill_process_group(self.pid(), Signal::TERM);
    }

    /// SIGKILL to the whole group; gone when this returns.
    pub fn kill(&mut self) {
        let _ = kill_process_group(self.pid(), Signal::KILL);
        let _ = self.child.wait();
    }

    /// The process's number; that of what it runs under, where there is such a thing.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if self.exited().is_none() {
            self.kill();
        }
    }
}

/// A plain HTTP GET; `None` where nobody answers.
pub async fn get(port: u16, path: &str) -> Option<String> {
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).await.ok()?;
    Some(String::from_utf8_lossy(&reply).into_owned())
}
