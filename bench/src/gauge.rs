//! CPU, memory and disk, read from `/proc` and the file system.

use std::{collections::BTreeMap, fs, io, os::unix::fs::MetadataExt, path::Path};

/// The kernel counts CPU time in hundredths of a second.
const TICK_US: f64 = 10_000.0;

/// Microseconds of CPU that this process has used, by thread name; `""` is all of it, threads that
/// ended included.
pub fn cpu_us() -> BTreeMap<String, f64> {
    let mut used = BTreeMap::new();
    if let Some((_, us)) = fs::read_to_string("/proc/self/stat").ok().as_deref().and_then(stat) {
        used.insert(String::new(), us);
    }
    for task in fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let text = fs::read_to_string(task.path().join("stat"));
        if let Some((name, us)) = text.ok().as_deref().and_then(stat) {
            *used.entry(name.to_owned()).or_default() += us;
        }
    }
    used
}

/// Microseconds of CPU that a process has used, with the threads of it that ended.
pub fn process_cpu_us(pid: u32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"));
    text.ok().as_deref().and_then(stat).map_or(f64::NAN, |(_, us)| us)
}

/// Name and CPU time (user and system) of one line of `stat`.
fn stat(line: &str) -> Option<(&str, f64)> {
    let (head, tail) = line.rsplit_once(')')?;
    let mut fields = tail.split_ascii_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((head.split_once('(')?.1, (user + system) * TICK_US))
}

/// A line of a process's `status` that is in kB, such as `VmRSS`, in MiB.
pub fn memory_mib(pid: &str, name: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    kib.map_or(f64::NAN, |kib| kib / 1024.0)
}

/// Bytes that this process caused to be written to disks.
pub fn written_bytes() -> f64 {
    let text = fs::read_to_string("/proc/self/io").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.and_then(|bytes| bytes.parse().ok()).unwrap_or(f64::NAN)
}

/// What a folder takes on its disk, holes not counted.
///
/// # Errors
/// Where a file can't be looked at.
pub fn disk_bytes(folder: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        bytes += match entry.metadata() {
            Ok(meta) if meta.is_dir() => disk_bytes(&entry.path())?,
            Ok(meta) => meta.blocks() * 512,
            // A table that a compaction has just removed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
    }
    Ok(bytes)
}

/// The value below which a share `q` of the values lies.
pub fn quantile(sorted: &[f64], q: f64) -> f64 {
    let at = (sorted.len() as f64 * q) as usize;
    sorted.get(at.min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}
