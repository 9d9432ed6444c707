//! What `EVENT_SINK=log` writes.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use serde_json::Value;

#[derive(Clone, Default)]
pub struct EventLog(Arc<Shared>);

#[derive(Default)]
struct Shared {
    bytes: Mutex<Vec<u8>>,
    is_broken: AtomicBool,
}

impl io::Write for EventLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.is_broken.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.0.bytes.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl EventLog {
    /// Whether its reader has gone.
    pub fn breaks(&self, broken: bool) {
        self.0.is_broken.store(broken, Ordering::Relaxed);
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.0.bytes.lock().unwrap().clone()
    }

    /// The whole lines that are not empty: one follows a write that failed.
    pub fn lines(&self) -> Vec<Value> {
        let bytes = self.bytes();
        let lines = bytes.split_inclusive(|b| *b == b'\n').filter(|line| line.ends_with(b"\n"));
        let lines = lines.filter(|line| line.len() > 1);
        lines.map(|line| serde_json::from_slice(line).unwrap()).collect()
    }
}
