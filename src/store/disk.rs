//! Tables on disk: fjall, with what it leaves to us around it (format, high-water mark).

use std::{
    fs::{self, File},
    io::{self, Write},
    ops::ControlFlow,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use fjall::{
    Database, Keyspace, KeyspaceCreateOptions, PersistMode,
    config::{BloomConstructionPolicy, FilterPolicy, FilterPolicyEntry},
};

use super::{
    OpenError,
    tables::{Batch, Span, Table, Tables, TablesError, Visit},
};

/// The layout that this version writes. Older ones are read, newer ones refused.
const FORMAT: u32 = 1;
const FORMAT_FILE: &str = "FORMAT";
const MARK_FILE: &str = "commit.mark";
const ENGINE_FOLDER: &str = "fjall";

/// Fresh keys are looked up with every keyed create: with 20 M keys a smaller cache makes each cost
/// twenty times as much.
const CACHE_BYTES: u64 = 128 << 20;
/// Small memtables reopen in a second and keep the longest commit near 0.1 s.
const MEMTABLE_BYTES: u64 = 16 << 20;
/// Holds what 30,000 payments a second make in two seconds: what becomes of a payment by then reads
/// it from memory.
const PAYMENTS_BYTES: u64 = 32 << 20;
/// What is replayed at start at most, about a second for each 50 MB.
const JOURNAL_BYTES: u64 = 128 << 20;
const WORKER_THREADS: usize = 2;
const KEY_FILTER_BITS: f32 = 10.0;

pub struct Disk {
    database: Database,
    keyspaces: Vec<Keyspace>,
    folder: PathBuf,
}

impl Disk {
    pub fn open(folder: &Path) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io { path: folder.to_owned(), source };
        fs::create_dir_all(folder).map_err(io)?;
        check_format(folder)?;
        let engine = folder.join(ENGINE_FOLDER);
        let broken = |error: fjall::Error| match error {
            fjall::Error::Locked => OpenError::Locked { path: folder.to_owned() },
            fjall::Error::Io(source) => OpenError::Io { path: folder.to_owned(), source },
            error => OpenError::Corrupt { path: folder.to_owned(), why: error.to_string() },
        };
        let open = || {
            Database::builder(&engine)
                .cache_size(CACHE_BYTES)
                .max_journaling_size(JOURNAL_BYTES)
                .worker_threads(WORKER_THREADS)
                .open()
        };
        // Some damage makes the engine panic instead. Unwind safe: of what panicked nothing is kept.
        let database = catch_unwind(AssertUnwindSafe(open))
            .map_err(|_panic| OpenError::Corrupt {
                path: folder.to_owned(),
                why: "the engine panicked over what it found".to_owned(),
            })?
            .map_err(broken)?;
        let keyspaces = Table::ALL
            .into_iter()
            .map(|table| database.keyspace(table.name(), || options(table)))
            .collect::<Result<_, _>>()
            .map_err(broken)?;
        Ok(Self { database, keyspaces, folder: folder.to_owned() })
    }

    fn keyspace(&self, table: Table) -> &Keyspace {
        &self.keyspaces[table as usize]
    }
}

fn options(table: Table) -> KeyspaceCreateOptions {
    let options = KeyspaceCreateOptions::default().max_memtable_size(MEMTABLE_BYTES);
    match table {
        Table::Key | Table::Reply => {
            let bits = BloomConstructionPolicy::BitsPerKey(KEY_FILTER_BITS);
            options.filter_policy(FilterPolicy::all(FilterPolicyEntry::Bloom(bits)))
        }
        // Ids are looked up because they are known, and each lies in one table: a filter would never
        // say no.
        Table::Payment => {
            options.max_memtable_size(PAYMENTS_BYTES).filter_policy(FilterPolicy::disabled())
        }
        // Only walked through.
        Table::Index | Table::Lapse | Table::Due | Table::Dead => {
            options.filter_policy(FilterPolicy::disabled())
        }
        Table::State | Table::Counter | Table::Meta => options,
    }
}

/// A folder is ours when it says so, and new when it is empty; anything else is left alone.
fn check_format(folder: &Path) -> Result<(), OpenError> {
    let path = folder.join(FORMAT_FILE);
    let corrupt = |why: String| OpenError::Corrupt { path: folder.to_owned(), why };
    match fs::read_to_string(&path) {
        Ok(text) => {
            let found = text
                .trim()
                .parse()
                .map_err(|_| corrupt(format!("{FORMAT_FILE} holds no number: {text:?}")))?;
            if found > FORMAT {
                return Err(OpenError::NewerFormat {
                    path: folder.to_owned(),
                    found,
                    known: FORMAT,
                });
            }
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if folder.join(ENGINE_FOLDER).exists() {
                return Err(corrupt(format!("{FORMAT_FILE} is missing beside the data")));
            }
            replace(folder, FORMAT_FILE, &format!("{FORMAT}\n"))
                .map_err(|source| OpenError::Io { path, source })
        }
        Err(source) => Err(OpenError::Io { path, source }),
    }
}

/// Replaces a small file so that after a crash it is the old one or the new one, never a part.
fn replace(folder: &Path, name: &str, text: &str) -> io::Result<()> {
    let fresh = folder.join(format!("{name}.new"));
    let mut file = File::create(&fresh)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&fresh, folder.join(name))?;
    File::open(folder)?.sync_all()
}

fn failed(error: impl std::fmt::Display) -> TablesError {
    TablesError(error.to_string())
}

impl Tables for Disk {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, TablesError> {
        let value = self.keyspace(table).get(key).map_err(failed)?;
        Ok(value.map(|value| value.to_vec()))
    }

    fn scan(&self, table: Table, span: Span, visit: Visit<'_>) -> Result<(), TablesError> {
        let mut rows = self.keyspace(table).range((span.from, span.to));
        loop {
            let row = if span.backwards { rows.next_back() } else { rows.next() };
            let Some(row) = row else { return Ok(()) };
            let (key, value) = row.into_inner().map_err(failed)?;
            if let ControlFlow::Break(()) = visit(&key, &value) {
                return Ok(());
            }
        }
    }

    fn write(&self, batch: Batch) -> Result<(), TablesError> {
        let mut writes =
            fjall::OwnedWriteBatch::with_capacity(self.database.clone(), batch.0.len())
                .durability(Some(PersistMode::SyncData));
        for (table, key, value) in batch.0 {
            match value {
                Some(value) => writes.insert(self.keyspace(table), key, value),
                None => writes.remove(self.keyspace(table), key),
            }
        }
        writes.commit().map_err(failed)
    }

    fn free_space(&self) -> Option<u64> {
        let stat = rustix::fs::statvfs(&self.folder).ok()?;
        Some(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn note_high_water(&self, sequence: u64) -> Result<(), TablesError> {
        replace(&self.folder, MARK_FILE, &format!("{sequence}\n")).map_err(failed)
    }

    fn high_water(&self) -> Result<u64, TablesError> {
        match fs::read_to_string(self.folder.join(MARK_FILE)) {
            Ok(text) => text
                .trim()
                .parse()
                .map_err(|_| TablesError(format!("{MARK_FILE} holds no number: {text:?}"))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(failed(error)),
        }
    }
}
