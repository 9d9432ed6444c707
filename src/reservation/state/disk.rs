//! Rows on disk: fjall, one folder a worker.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use fjall::{Database, Keyspace, KeyspaceCreateOptions, OwnedWriteBatch, PersistMode};

use super::{Broken, Rows, Table, Write};

/// The layout that this version writes and reads.
const FORMAT: &str = "reservation-worker 1";
const FORMAT_FILE: &str = "FORMAT";
const ENGINE_FOLDER: &str = "fjall";
/// With [`MEMTABLE_BYTES`] for each table, most of what the worker keeps in memory.
const CACHE_BYTES: u64 = 32 << 20;
const MEMTABLE_BYTES: u64 = 8 << 20;
/// What is read again at start at most.
const JOURNAL_BYTES: u64 = 64 << 20;
const WORKER_THREADS: usize = 1;

pub struct Disk {
    database: Database,
    keyspaces: Vec<Keyspace>,
}

impl Disk {
    /// # Errors
    /// In words for the operator.
    pub fn open(folder: &Path) -> Result<Self, String> {
        let said = |why: String| format!("{}: {why}", folder.display());
        fs::create_dir_all(folder)
            .and_then(|()| check_format(folder))
            .map_err(|e| said(e.to_string()))?;
        let open = || Self::open_engine(&folder.join(ENGINE_FOLDER));
        // Some damage makes the engine panic instead. Unwind safe: of what panicked nothing is kept.
        match catch_unwind(AssertUnwindSafe(open)) {
            Ok(Ok(disk)) => Ok(disk),
            Ok(Err(fjall::Error::Locked)) => Err(said("is in use by another process".to_owned())),
            Ok(Err(error)) => Err(said(format!("cannot be read: {error}"))),
            Err(_panic) => Err(said("is damaged: the engine panicked over it".to_owned())),
        }
    }

    fn open_engine(folder: &Path) -> fjall::Result<Self> {
        let database = Database::builder(folder)
            .cache_size(CACHE_BYTES)
            .max_journaling_size(JOURNAL_BYTES)
            .worker_threads(WORKER_THREADS)
            .open()?;
        let options = || KeyspaceCreateOptions::default().max_memtable_size(MEMTABLE_BYTES);
        let keyspaces = Table::ALL
            .into_iter()
            .map(|table| database.keyspace(table.name(), options))
            .collect::<fjall::Result<_>>()?;
        Ok(Self { database, keyspaces })
    }

    fn keyspace(&self, table: Table) -> &Keyspace {
        &self.keyspaces[table as usize]
    }
}

/// A folder is ours when it says so, and new when no engine has written to it; anything else is left alone.
fn check_format(folder: &Path) -> io::Result<()> {
    let path = folder.join(FORMAT_FILE);
    match fs::read_to_string(&path) {
        Ok(text) if text.trim() == FORMAT => Ok(()),
        Ok(text) => {
            let why = format!("is no state of this version: {FORMAT_FILE} says {:?}", text.trim());
            Err(io::Error::other(why))
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Err(_) if folder.join(ENGINE_FOLDER).exists() => {
            Err(io::Error::other(format!("{FORMAT_FILE} is missing beside the data")))
        }
        // After a crash it is there whole or not at all.
        Err(_) => {
            let fresh = folder.join("FORMAT.new");
            let mut file = File::create(&fresh)?;
            writeln!(file, "{FORMAT}")?;
            file.sync_all()?;
            fs::rename(fresh, path)?;
            File::open(folder)?.sync_all()
        }
    }
}

fn failed(error: fjall::Error) -> Broken {
    Broken(error.to_string())
}

impl Rows for Disk {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, Broken> {
        let value = self.keyspace(table).get(key).map_err(failed)?;
        Ok(value.map(|value| value.to_vec()))
    }

    fn write(&self, writes: Vec<Write>) -> Result<(), Broken> {
        let mut batch = OwnedWriteBatch::with_capacity(self.database.clone(), writes.len())
            .durability(Some(PersistMode::SyncData));
        for (table, key, value) in writes {
            match value {
                Some(value) => batch.insert(self.keyspace(table), key, value),
                None => batch.remove(self.keyspace(table), key),
            }
        }
        batch.commit().map_err(failed)
    }
}
