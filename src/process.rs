//! What a process is made of besides its work: named tasks, signals, and an end whatever hangs.

use std::{future::Future, io, thread, time::Duration};

use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::{
    signal::unix::{SignalKind, signal},
    task::{AbortHandle, JoinSet},
};

/// sysexits.h: EX_UNAVAILABLE, EX_SOFTWARE, EX_IOERR.
pub const EXIT_UNAVAILABLE: u8 = 69;
pub const EXIT_SOFTWARE: u8 = 70;
pub const EXIT_STORE_FAILED: u8 = 74;
/// As shells report an interrupt: the second signal asks for an end at once.
const EXIT_INTERRUPTED: i32 = 130;

/// As many descriptors as the system allows. The soft limit, 1,024 as a rule, is there for programs that
/// use `select`; a server with as many connections would meet it in the store's next file.
pub fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the limit of open files could not be raised");
    }
}

/// Memory by small pages: of a huge one the system has to make 2 MiB of zeros, and sometimes to find them, while a thread
/// waits that wanted a few bytes.
pub fn refuse_huge_pages() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::thread::disable_transparent_huge_pages(true) {
        tracing::warn!(%error, "huge pages stay: calls may wait for them");
    }
}

/// Long tasks, by name. None of them ends by itself while the service runs.
#[derive(Default)]
pub struct Tasks {
    running: JoinSet<()>,
    named: Vec<(&'static str, AbortHandle)>,
}

impl Tasks {
    pub fn start(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.named.push((name, self.running.spawn(task)));
    }

    /// The next task to end, be it by a panic.
    pub async fn ended(&mut self) -> &'static str {
        while let Some(ended) = self.running.join_next_with_id().await {
            let id = ended.map_or_else(|error| error.id(), |(id, ())| id);
            if let Some(at) = self.named.iter().position(|(_, task)| task.id() == id) {
                return self.named.swap_remove(at).0;
            }
        }
        // Nothing runs: as little should there be anybody who asks.
        std::future::pending().await
    }

    /// Waits for all tasks of these names.
    pub async fn join(&mut self, names: &[&str]) {
        while self.named.iter().any(|(name, _)| names.contains(name)) {
            self.ended().await;
        }
    }

    /// As `join`, but aborts those that are not done in time. What they had leased stays owed.
    pub async fn end(&mut self, names: &[&str], within: Duration) {
        if tokio::time::timeout(within, self.join(names)).await.is_ok() {
            return;
        }
        for (name, task) in self.named.iter().filter(|(name, _)| names.contains(name)) {
            tracing::warn!(task = name, "did not end in time and was aborted");
            task.abort();
        }
        self.join(names).await;
    }
}

pub struct Signals {
    term: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    pub fn listen() -> io::Result<Self> {
        let (term, interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        Ok(Self { term, interrupt })
    }

    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }

    /// Whoever sends a second signal does not want to wait.
    #[expect(clippy::disallowed_methods, reason = "it ends with the process, which is its purpose")]
    pub fn insist(mut self) {
        tokio::spawn(async move {
            let signal = self.next().await;
            tracing::warn!(signal, "ending at once");
            std::process::exit(EXIT_INTERRUPTED);
        });
    }
}

/// A thread of its own, so that not even a runtime that hangs keeps the process.
pub fn end_anyway_after(max: Duration) {
    let watchdog = thread::Builder::new().name("watchdog".to_owned()).spawn(move || {
        thread::sleep(max);
        tracing::error!("did not stop in time; ending anyway");
        std::process::exit(i32::from(EXIT_SOFTWARE));
    });
    if let Err(error) = watchdog {
        tracing::error!(%error, "no watchdog over the stop");
    }
}
