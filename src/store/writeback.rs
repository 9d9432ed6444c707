//! What an engine writes into a file goes to the disk while it is written. Left to the end, the file's sync
//! sends all of it at once, and file systems let the journal's syncs, which commits wait for, wait for that:
//! 20 ms for 8 MiB, 70 ms for 64.
//!
//! Only a help: whatever fails here, the engine syncs its files all the same. Elsewhere than on Linux there is
//! none.

use std::path::PathBuf;

#[cfg(target_os = "linux")]
pub use linux::Writeback;

#[cfg(not(target_os = "linux"))]
pub struct Writeback;

#[cfg(not(target_os = "linux"))]
impl Writeback {
    pub fn begin(_: Vec<PathBuf>) -> std::io::Result<Self> {
        Ok(Self)
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::{
        collections::{HashMap, hash_map::Entry},
        fs::File,
        io,
        mem::MaybeUninit,
        num::NonZeroU64,
        os::fd::OwnedFd,
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
        thread::JoinHandle,
    };

    use rustix::{
        fs::{
            Advice, fadvise,
            inotify::{self, CreateFlags, Event, ReadFlags, Reader, WatchFlags},
        },
        io::Errno,
    };

    use super::PathBuf;

    /// So much of a file is sent at a time: about a millisecond's worth for a disk.
    const STEP_BYTES: u64 = 256 << 10;
    /// Room for some dozens of notices.
    const NOTICES_BYTES: usize = 4 << 10;
    /// Files that grow at a time: an engine writes a few. Of more some have been closed unheard.
    const GROWING_MAX: usize = 16;

    /// Watches folders as long as it lives.
    pub struct Writeback {
        notices: Arc<OwnedFd>,
        watches: Vec<i32>,
        ended: Arc<AtomicBool>,
        thread: Option<JoinHandle<()>>,
    }

    impl Writeback {
        pub fn begin(folders: Vec<PathBuf>) -> io::Result<Self> {
            let notices = Arc::new(inotify::init(CreateFlags::CLOEXEC)?);
            let what = WatchFlags::MODIFY | WatchFlags::CLOSE_WRITE;
            let mut watched = HashMap::new();
            for folder in folders {
                watched.insert(inotify::add_watch(&notices, &folder, what)?, folder);
            }
            let watches = watched.keys().copied().collect();
            let ended = Arc::new(AtomicBool::new(false));
            let files = Files { watched, growing: HashMap::new(), ended: Arc::clone(&ended) };
            let reader = Arc::clone(&notices);
            let thread = std::thread::Builder::new()
                .name("store-writeback".to_owned())
                .spawn(move || files.follow(&reader))?;
            Ok(Self { notices, watches, ended, thread: Some(thread) })
        }
    }

    impl Drop for Writeback {
        fn drop(&mut self) {
            self.ended.store(true, Ordering::Release);
            for watch in &self.watches {
                // Of each the thread hears, or of a queue that is full, and ends. A folder that is gone took its
                // watch along, and was heard of too.
                let _ = inotify::remove_watch(&self.notices, *watch);
            }
            if let Some(thread) = self.thread.take() {
                let _ = thread.join();
            }
        }
    }

    struct Files {
        watched: HashMap<i32, PathBuf>,
        growing: HashMap<PathBuf, Growing>,
        ended: Arc<AtomicBool>,
    }

    struct Growing {
        file: File,
        /// Bytes from its beginning that are on their way, or there.
        sent: u64,
    }

    impl Files {
        fn follow(mut self, notices: &OwnedFd) {
            let mut bytes = [MaybeUninit::uninit(); NOTICES_BYTES];
            let mut notices = Reader::new(notices, &mut bytes);
            while !self.watched.is_empty() && !self.ended.load(Ordering::Acquire) {
                match notices.next() {
                    Ok(notice) => self.heard(&notice),
                    Err(Errno::INTR) => {}
                    Err(error) => {
                        tracing::warn!(%error, "files are no longer sent to the disk ahead of their sync");
                        return;
                    }
                }
            }
        }

        fn heard(&mut self, notice: &Event<'_>) {
            if notice.events().contains(ReadFlags::QUEUE_OVERFLOW) {
                // Which files have been closed meanwhile is not known.
                self.growing.clear();
            }
            if notice.events().contains(ReadFlags::IGNORED) {
                self.watched.remove(&notice.wd());
                return;
            }
            let name = notice.file_name().and_then(|name| name.to_str().ok());
            let Some((folder, name)) = self.watched.get(&notice.wd()).zip(name) else { return };
            let path = folder.join(name);
            if notice.events().contains(ReadFlags::CLOSE_WRITE) {
                self.growing.remove(&path);
            } else if let Err(error) = self.grew(path) {
                tracing::debug!(%error, "a file was not sent to the disk ahead of its sync");
            }
        }

        fn grew(&mut self, path: PathBuf) -> io::Result<()> {
            if self.growing.len() > GROWING_MAX {
                self.growing.clear();
            }
            let Growing { file, sent } = match self.growing.entry(path) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => {
                    let file = File::open(new.key())?;
                    new.insert(Growing { file, sent: 0 })
                }
            };
            let length = file.metadata()?.len();
            let more = length.saturating_sub(*sent);
            if more >= STEP_BYTES {
                // Linux begins to write what has changed, and does not wait for it. What it cannot drop from memory
                // because it is being written stays there, to go first where memory is short.
                fadvise(&*file, *sent, NonZeroU64::new(more), Advice::DontNeed)?;
                *sent = length;
            }
            Ok(())
        }
    }
}

#[cfg(target_os = "linux")]
#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        io::Write,
        path::Path,
        time::Duration,
    };

    use super::*;
    use crate::clock::Stopwatch;

    /// How many of this process's descriptors are of the file.
    fn descriptors(path: &Path) -> usize {
        let all = fs::read_dir("/proc/self/fd").unwrap();
        let link = |entry: std::io::Result<fs::DirEntry>| fs::read_link(entry.ok()?.path()).ok();
        all.filter_map(link).filter(|link| link == path).count()
    }

    fn wait_until(is_so: impl Fn() -> bool) {
        let waited = Stopwatch::start();
        while !is_so() {
            assert!(waited.elapsed() < Duration::from_secs(10), "it has not come so far");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_file_is_followed_until_it_is_closed_and_all_ends_with_the_watch() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().canonicalize().unwrap();
        let writeback = Writeback::begin(vec![folder.clone()]).unwrap();
        let path = folder.join("1");
        let mut file = File::create(&path).unwrap();
        file.write_all(&vec![1; 1 << 20]).unwrap();
        wait_until(|| descriptors(&path) == 2);
        drop(file);
        wait_until(|| descriptors(&path) == 0);
        let mut unfinished = File::create(folder.join("2")).unwrap();
        unfinished.write_all(b"2").unwrap();
        drop(writeback);
        assert!(descriptors(&folder.join("2")) <= 1);
    }

    #[test]
    fn a_folder_may_go_before_its_watch() {
        let folder = tempfile::tempdir().unwrap();
        let writeback = Writeback::begin(vec![folder.path().to_owned()]).unwrap();
        folder.close().unwrap();
        drop(writeback);
    }
}
