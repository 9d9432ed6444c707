//! Tables on disk: fjall, with what it leaves to us around it (format, high-water mark).

use std::{
    fs::{self, File},
    io::{self, Write},
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
    thread::{self, ScopedJoinHandle},
};

use fjall::{
    AbstractTree, Database, Keyspace, KeyspaceCreateOptions, PersistMode,
    compaction::{
        Leveled,
        filter::{
            CompactionFilter, CompactionFilterResult, Context, Factory, ItemAccessor, Verdict,
        },
    },
    config::{BloomConstructionPolicy, FilterPolicy, FilterPolicyEntry},
};

use super::{
    OpenError,
    horizon::Horizon,
    priority::{Background, step_back},
    record,
    tables::{Batch, DERIVED, DROPPED, Rows, Span, Table, Tables, TablesError, Visit},
    writeback::Writeback,
};
use crate::domain::ids::PaymentId;

/// The layout that this version writes. Older ones are read and become this one, newer ones are refused.
/// 2: keys and lists are not in the commits, and what is below the horizon is gone.
/// 3: keys and lists have an engine of their own.
/// 4: what is looked up is hashed by SipHash, where the store says so: it does if it was made with this format.
const FORMAT: u32 = 4;
/// From this one on keys and lists are not where the commits are.
const DERIVED_APART: u32 = 3;
const FORMAT_FILE: &str = "FORMAT";
const MARK_FILE: &str = "commit.mark";
/// Of the mark's number: as many as the largest has.
const MARK_DIGITS: usize = 20;
const SECTOR_BYTES: usize = 512;
const ENGINE_FOLDER: &str = "fjall";
const DERIVED_FOLDER: &str = "derived";
/// Of a keyspace, as the engine calls it.
const FILES_FOLDER: &str = "tables";

/// Of each engine: blocks that are read again, of payments as of keys.
const CACHE_BYTES: u64 = 96 << 20;
/// With each memtable that is flushed the engine notes its new files, and lets nobody write or read meanwhile: five
/// syncs, 10 to 40 ms under load. So they are few. A store keeps what it was made with.
const MEMTABLE_BYTES: u64 = 16 << 20;
/// What is replayed at start at most, about a second for each 50 MB.
const JOURNAL_BYTES: u64 = 128 << 20;
/// One, because of several one passes every compaction on to the others, and spins while these are busy.
const WORKER_THREADS: usize = 1;
const KEY_FILTER_BITS: f32 = 10.0;
/// Of what is derived, tables that are merged at once. Keys and names are hashes: each merge rewrites all of the next
/// level, and so the more go together the cheaper. A list, and a known key, is looked for in all that still wait. A
/// store keeps what it was made with.
const MERGED_AT_ONCE: u8 = 16;
/// Of a merged file of what is derived. The level that is rewritten is as large as `MERGED_AT_ONCE` of them: with the
/// files that come, that is what a merge needs room for, and so less than the reserve.
const DERIVED_FILE_BYTES: u64 = 8 << 20;

/// Two engines: whoever brings rows in holds up its engine's commits until they are on the disk, and so what
/// is brought in is not where commits go.
pub struct Disk {
    commits: Database,
    derived: Database,
    keyspaces: Vec<Keyspace>,
    folder: PathBuf,
    /// Goes on as long as it is held.
    _writeback: Option<Writeback>,
}

impl Disk {
    /// `horizon` says what need not be kept when files are merged.
    pub fn open(folder: &Path, horizon: &Arc<Horizon>) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io { path: folder.to_owned(), source };
        fs::create_dir_all(folder).map_err(io)?;
        let format = check_format(folder)?;
        remove_half_made(&folder.join(DERIVED_FOLDER)).map_err(io)?;
        // First, so that it is there wherever the other is.
        let derived = engine(folder, DERIVED_FOLDER, horizon)?;
        let commits = engine(folder, ENGINE_FOLDER, horizon)?;
        let broken = |error| broken(folder, error);
        let keyspaces: Vec<_> = Table::ALL
            .into_iter()
            .map(|table| match DERIVED.contains(&table) {
                true => keyspace(&derived, table),
                false => keyspace(&commits, table),
            })
            .collect::<Result<_, _>>()
            .map_err(broken)?;
        if format < DERIVED_APART {
            for table in DERIVED {
                copy(&commits, table, &keyspaces[table as usize]).map_err(broken)?;
            }
        }
        if format < FORMAT {
            note_format(folder).map_err(io)?;
        }
        // Only now: until then the version that wrote them could still be put back.
        for table in DERIVED.into_iter().filter(|table| commits.keyspace_exists(table.name())) {
            let left = keyspace(&commits, table).map_err(broken)?;
            commits.delete_keyspace(left).map_err(broken)?;
        }
        let files = keyspaces.iter().map(|keyspace| keyspace.path().join(FILES_FOLDER));
        let writeback = Writeback::begin(files.collect()).inspect_err(|error| {
            tracing::warn!(%error, "files are not sent to the disk ahead of their sync: commits may wait for it");
        });
        Ok(Self {
            commits,
            derived,
            keyspaces,
            folder: folder.to_owned(),
            _writeback: writeback.ok(),
        })
    }

    /// Ranges of ids that cover all files in which nothing is left to be found.
    fn gone(&self, table: Table, horizon: &Horizon) -> Vec<(PaymentId, PaymentId)> {
        let version = self.keyspace(table).tree.current_version();
        let mut files = Vec::new();
        for file in version.iter_tables() {
            let range = &file.metadata.key_range;
            if let (Ok(oldest), Ok(newest)) = (record::id(range.min()), record::id(range.max())) {
                files.push((oldest, newest));
            }
        }
        files.sort_unstable();
        let mut gone: Vec<(PaymentId, PaymentId)> = Vec::new();
        for (oldest, newest) in files {
            match gone.last_mut() {
                Some(last) if horizon.is_gone(last.0, last.1.max(newest)) => {
                    last.1 = last.1.max(newest);
                }
                Some(_) | None if horizon.is_gone(oldest, newest) => gone.push((oldest, newest)),
                Some(_) | None => {}
            }
        }
        gone
    }

    fn keyspace(&self, table: Table) -> &Keyspace {
        &self.keyspaces[table as usize]
    }
}

fn engine(folder: &Path, name: &str, horizon: &Arc<Horizon>) -> Result<Database, OpenError> {
    let open = || {
        Database::builder(folder.join(name))
            .cache_size(CACHE_BYTES)
            .max_journaling_size(JOURNAL_BYTES)
            .worker_threads(WORKER_THREADS)
            .with_compaction_filter_factories(droppers(horizon))
            .open()
    };
    // The engine's own threads are started here, and inherit that they may wait; so may a start on a busy machine.
    let aside = || {
        step_back(Background::Merging);
        open()
    };
    let opened = thread::scope(|scope| {
        let opening = thread::Builder::new().name("store-open".to_owned());
        opening.spawn_scoped(scope, aside).map(ScopedJoinHandle::join)
    });
    let io = |source| OpenError::Io { path: folder.to_owned(), source };
    // Some damage makes the engine panic instead.
    opened
        .map_err(io)?
        .map_err(|_panic| OpenError::Corrupt {
            path: folder.to_owned(),
            why: "the engine panicked over what it found".to_owned(),
        })?
        .map_err(|error| broken(folder, error))
}

fn broken(folder: &Path, error: fjall::Error) -> OpenError {
    let path = folder.to_owned();
    match error {
        fjall::Error::Locked => OpenError::Locked { path },
        fjall::Error::Io(source) => OpenError::Io { path, source },
        error => OpenError::Corrupt { path, why: error.to_string() },
    }
}

fn keyspace(engine: &Database, table: Table) -> fjall::Result<Keyspace> {
    engine.keyspace(table.name(), || options(table))
}

/// An engine has a version from when it was made whole. What was begun before holds nothing, and cannot be
/// opened.
fn is_whole(engine: &Path) -> bool {
    engine.join("version").exists()
}

fn remove_half_made(engine: &Path) -> io::Result<()> {
    match engine.exists() && !is_whole(engine) {
        true => fs::remove_dir_all(engine),
        false => Ok(()),
    }
}

/// Copies a table out of an engine, where it is in there. After a crash it is copied once more.
fn copy(engine: &Database, table: Table, to: &Keyspace) -> fjall::Result<()> {
    if !engine.keyspace_exists(table.name()) {
        return Ok(());
    }
    let from = keyspace(engine, table)?;
    let mut ingestion = to.start_ingestion()?;
    let mut is_empty = true;
    for row in from.iter() {
        let (key, value) = row.into_inner()?;
        ingestion.write(key, value)?;
        is_empty = false;
    }
    // One that is begun and finished empty leaves its file behind.
    match is_empty {
        true => Ok(()),
        false => ingestion.finish(),
    }
}

fn options(table: Table) -> KeyspaceCreateOptions {
    let options = KeyspaceCreateOptions::default().max_memtable_size(MEMTABLE_BYTES);
    let options = match DERIVED.contains(&table) {
        true => options.compaction_strategy(Arc::new(
            Leveled::default()
                .with_l0_threshold(MERGED_AT_ONCE)
                .with_table_target_size(DERIVED_FILE_BYTES),
        )),
        false => options,
    };
    match table {
        Table::Key | Table::Reply => {
            let bits = BloomConstructionPolicy::BitsPerKey(KEY_FILTER_BITS);
            options.filter_policy(FilterPolicy::all(FilterPolicyEntry::Bloom(bits)))
        }
        // Ids are looked up because they are known, and each lies in one table: a filter would never
        // say no.
        Table::Payment => options.filter_policy(FilterPolicy::disabled()),
        // Only walked through.
        Table::Index | Table::Lapse | Table::Due | Table::Dead | Table::Kept => {
            options.filter_policy(FilterPolicy::disabled())
        }
        Table::State | Table::Counter | Table::Meta => options,
    }
}

/// By the keyspace's name, what drops entries of its when files are merged.
type Droppers = Arc<dyn Fn(&str) -> Option<Arc<dyn Factory>> + Send + Sync>;

fn droppers(horizon: &Arc<Horizon>) -> Droppers {
    let horizon = Arc::clone(horizon);
    Arc::new(move |name| {
        let table = DROPPED.into_iter().find(|table| table.name() == name)?;
        Some(Arc::new(Dropper { table, horizon: Arc::clone(&horizon) }))
    })
}

/// Leaves out what belongs to payments below the horizon.
#[derive(Clone)]
struct Dropper {
    table: Table,
    horizon: Arc<Horizon>,
}

impl Factory for Dropper {
    fn name(&self) -> &'static str {
        "horizon"
    }

    fn make_filter(&self, _: &Context) -> Box<dyn CompactionFilter> {
        Box::new(self.clone())
    }
}

impl CompactionFilter for Dropper {
    fn filter_item(&mut self, item: ItemAccessor<'_>, _: &Context) -> CompactionFilterResult {
        let owner = record::payment_of(self.table, item.key(), &item.value()?);
        // No tombstone: what may come to light below it is older still, and its key has lapsed long ago.
        let is_gone = owner.is_some_and(|id| !self.horizon.has(id));
        Ok(if is_gone { Verdict::Destroy } else { Verdict::Keep })
    }
}

/// A folder is ours when it says so, and new when it is empty; anything else is left alone.
fn check_format(folder: &Path) -> Result<u32, OpenError> {
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
            let has_lost_keys = found >= DERIVED_APART
                && is_whole(&folder.join(ENGINE_FOLDER))
                && !is_whole(&folder.join(DERIVED_FOLDER));
            if has_lost_keys {
                return Err(corrupt(format!("{DERIVED_FOLDER} is missing beside the data")));
            }
            Ok(found)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if folder.join(ENGINE_FOLDER).exists() {
                return Err(corrupt(format!("{FORMAT_FILE} is missing beside the data")));
            }
            note_format(folder).map_err(|source| OpenError::Io { path, source })?;
            Ok(FORMAT)
        }
        Err(source) => Err(OpenError::Io { path, source }),
    }
}

fn note_format(folder: &Path) -> io::Result<()> {
    replace(folder, FORMAT_FILE, &format!("{FORMAT}\n"))
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

/// As [`replace`], for a text that is always as long: in place, where it is short enough to lie in one sector, which
/// disks write whole or not at all. Names and sizes stay, and with them what a file system would have to write
/// down, in the way of commits.
fn overwrite(folder: &Path, name: &str, text: &str) -> io::Result<()> {
    debug_assert!(text.len() <= SECTOR_BYTES);
    match File::options().write(true).open(folder.join(name)) {
        Ok(mut file) if file.metadata()?.len() == text.len() as u64 => {
            file.write_all(text.as_bytes())?;
            file.sync_data()
        }
        _ => replace(folder, name, text),
    }
}

fn failed(error: impl std::fmt::Display) -> TablesError {
    TablesError(error.to_string())
}

impl Tables for Disk {
    fn are_on_disk(&self) -> bool {
        true
    }

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

    fn write(&self, batch: &Batch) -> Result<(), TablesError> {
        let mut writes = fjall::OwnedWriteBatch::with_capacity(self.commits.clone(), batch.len())
            .durability(Some(PersistMode::SyncData));
        for (table, key, value) in batch.entries() {
            debug_assert!(!DERIVED.contains(&table), "{} is in no commit", table.name());
            match value {
                Some(value) => writes.insert(self.keyspace(table), key, value),
                None => writes.remove(self.keyspace(table), key),
            }
        }
        writes.commit().map_err(failed)
    }

    fn ingest(&self, table: Table, rows: Rows<'_>) -> Result<(), TablesError> {
        let mut rows = rows.peekable();
        if rows.peek().is_none() {
            // One that is begun and finished empty leaves its file behind.
            return Ok(());
        }
        debug_assert!(DERIVED.contains(&table), "{} is not brought in", table.name());
        // An engine whose worker has failed takes rows all the same, and merges no more: an error of this.
        self.derived.persist(PersistMode::Buffer).map_err(failed)?;
        let mut ingestion = self.keyspace(table).start_ingestion().map_err(failed)?;
        for (key, value) in rows {
            ingestion.write(key, value).map_err(failed)?;
        }
        ingestion.finish().map_err(failed)
    }

    /// Payments and their states lie in the order of their ids: most files are below the horizon as a
    /// whole. Keys and lists lie in no such order, and are merged again and again: see [`Dropper`].
    fn reclaim(&self, horizon: &Horizon) -> Result<(), TablesError> {
        for table in [Table::Payment, Table::State] {
            let tree = &self.keyspace(table).tree;
            // Each call writes a manifest, and commits wait meanwhile: as few as there are.
            for (oldest, newest) in self.gone(table, horizon) {
                let range = oldest.bytes().as_slice()..=newest.bytes().as_slice();
                tree.drop_range::<&[u8], _>(range).map_err(failed)?;
            }
        }
        Ok(())
    }

    fn free_space(&self) -> Option<u64> {
        let stat = rustix::fs::statvfs(&self.folder).ok()?;
        Some(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn note_high_water(&self, sequence: u64) -> Result<(), TablesError> {
        let text = format!("{sequence:0MARK_DIGITS$}\n");
        overwrite(&self.folder, MARK_FILE, &text).map_err(failed)
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

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::domain::time::Timestamp;

    /// Leaves the folder of a closed store as an older format has it: before the third, keys and lists where the
    /// commits are.
    pub fn become_older(folder: &Path, format: u32) {
        fs::write(folder.join(FORMAT_FILE), format!("{format}\n")).unwrap();
        if format >= DERIVED_APART {
            return;
        }
        let horizon = Arc::new(Horizon::default());
        let [derived, commits] =
            [DERIVED_FOLDER, ENGINE_FOLDER].map(|name| engine(folder, name, &horizon).unwrap());
        for table in DERIVED {
            copy(&derived, table, &keyspace(&commits, table).unwrap()).unwrap();
        }
        drop((derived, commits));
        fs::remove_dir_all(folder.join(DERIVED_FOLDER)).unwrap();
    }

    #[test]
    fn files_in_which_nothing_is_left_go() {
        let folder = tempfile::tempdir().unwrap();
        let horizon = Arc::new(Horizon::default());
        let disk = Disk::open(folder.path(), &horizon).unwrap();
        let id = |n| PaymentId::from_parts(Timestamp::from_ms(1_000), n);
        for file in 0..4 {
            let mut batch = Batch::default();
            for n in 0..3 {
                batch.put(Table::Payment, id(file * 10 + n).bytes(), b"terms");
            }
            disk.write(&batch).unwrap();
            disk.keyspace(Table::Payment).rotate_memtable_and_wait().unwrap();
        }
        horizon.moved(Some(id(30)), &[id(11)], &[]);
        disk.reclaim(&horizon).unwrap();
        let is_there = |n| disk.get(Table::Payment, id(n).bytes()).unwrap().is_some();
        let left: Vec<_> = (0..40).filter(|n| is_there(*n)).collect();
        assert_eq!(left, [10, 11, 12, 30, 31, 32], "a file with one that is kept stays whole");
        horizon.moved(None, &[], &[id(11)]);
        disk.reclaim(&horizon).unwrap();
        assert!(!is_there(11) && is_there(30));
    }
}
