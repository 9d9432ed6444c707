//! The test's own memory: lines of JSON in a file, each on the disk before its writer goes on. The
//! service never touches it.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    thread,
};

use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::{mpsc, oneshot};

const BATCH_MAX: usize = 1_024;

pub struct Journal {
    path: PathBuf,
    lines: mpsc::UnboundedSender<Line>,
}

struct Line {
    bytes: Vec<u8>,
    synced: Option<oneshot::Sender<()>>,
}

impl Journal {
    pub fn create(path: PathBuf) -> Self {
        let file = OpenOptions::new().create_new(true).append(true).open(&path).expect("a journal");
        let (lines, queue) = mpsc::unbounded_channel();
        thread::spawn(|| write_all(file, queue));
        Self { path, lines }
    }

    /// On the disk when it returns.
    pub async fn write(&self, record: &impl Serialize) {
        let (synced, done) = oneshot::channel();
        self.send(line(record), Some(synced));
        done.await.expect("the journal can be written");
    }

    /// On the disk some time later, in order.
    pub fn note(&self, record: &impl Serialize) {
        self.send(line(record), None);
    }

    /// All that was written, as it stands in the file.
    pub async fn read<T: DeserializeOwned>(&self) -> Vec<T> {
        let (synced, done) = oneshot::channel();
        self.send(Vec::new(), Some(synced));
        done.await.expect("the journal can be written");
        let text = std::fs::read_to_string(&self.path).expect("the journal can be read");
        text.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
    }

    fn send(&self, bytes: Vec<u8>, synced: Option<oneshot::Sender<()>>) {
        self.lines.send(Line { bytes, synced }).expect("the journal is open");
    }
}

/// The lines of all journals in a folder that name one of these.
pub fn lines_about(folder: &Path, names: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for name in ["driver.journal", "sink.journal"] {
        let text = std::fs::read_to_string(folder.join(name)).unwrap_or_default();
        let about = text.lines().filter(|line| names.iter().any(|name| line.contains(name)));
        found.extend(about.map(|line| format!("{name}: {line}")));
    }
    found
}

fn line(record: &impl Serialize) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(record).expect("records are plain");
    bytes.push(b'\n');
    bytes
}

fn write_all(mut file: File, mut queue: mpsc::UnboundedReceiver<Line>) {
    let mut batch = Vec::new();
    while queue.blocking_recv_many(&mut batch, BATCH_MAX) > 0 {
        let bytes: Vec<u8> = batch.iter().flat_map(|line| line.bytes.iter().copied()).collect();
        file.write_all(&bytes).and_then(|()| file.sync_data()).expect("a disk that works");
        for synced in batch.drain(..).filter_map(|line| line.synced) {
            // Whoever asked may have been stopped meanwhile.
            let _ = synced.send(());
        }
    }
}
