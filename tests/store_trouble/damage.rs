//! Files of a closed store, changed on the disk: it serves what was acknowledged, or says that it cannot.
//! What is never served is something else.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use payment_sim::{
    clock::{Clock, ManualClock},
    domain::{
        event,
        ids::PaymentId,
        money::{Currency, Money},
        payment::{Method, Payment, Terms, Trace},
        scenario::{DrawKey, Plan, Scenario, Settings},
        time::Timestamp,
    },
    store::{self, Change, Commit, Embedded, Location, OpenError, Options, Retention, Store, Work},
};
use tokio::runtime::Runtime;

use super::{failing_disk::journal_of, support::chance::Chance};

const START: i64 = 1_767_225_600_000;
const DAY: Duration = Duration::from_secs(86_400);
const SEED: u64 = 311;
const POSITIONS: usize = 60;
/// In commits of this many.
const BATCH: usize = 50;
/// What fits into the journal's first two megabytes.
const FEW: usize = 1_000;
/// More than a memtable of payments, so that there are table files.
const MANY: usize = 800;
const LARGE_ECHO_BYTES: usize = 60_000;

fn open(folder: &Path) -> Result<Arc<Embedded>, OpenError> {
    let retention = Retention { payments: DAY, idempotency: DAY, payments_max: None };
    let options = Options {
        retention,
        clock: Arc::new(ManualClock::at_ms(START)),
        on_commit: Arc::new(|_, _| {}),
        on_dropped_early: Arc::new(|_| {}),
    };
    store::open(&Location::Folder(folder.to_owned()), options)
}

fn payment(n: usize, scenario: Scenario, echo: Option<String>) -> Payment {
    let settings = Settings {
        default_scenario: Scenario::Approve,
        default_delay: Duration::from_secs(2),
        timeout_settle: Duration::from_secs(30),
        manual_ttl: Duration::from_secs(300),
        random_approval_rate: 0.8,
        seed: 0,
    };
    let now = Timestamp::from_ms(ManualClock::at_ms(START).now_ms());
    Payment::create(Arc::new(Terms {
        id: PaymentId::from_parts(now, n as u128),
        reservation_id: format!("res-{n}").into(),
        user_id: format!("user-{}", n % 7).into(),
        amount: Money { amount: 1_000, currency: Currency::parse("KRW").expect("a currency") },
        vat: None,
        method: Method::CreditCard,
        plan: Plan::draw(scenario, &settings, &DrawKey::Idempotency("k"), now),
        provider: "sim".into(),
        webhook_url: None,
        events: false,
        metadata: None,
        echo,
        card: None,
        created_at: now,
        trace: Trace::default(),
        idempotency: None,
        renderer: event::RENDERER,
    }))
}

/// A store that was closed, and what it had acknowledged.
struct Original {
    runtime: Runtime,
    folder: tempfile::TempDir,
    payments: Vec<Payment>,
    /// Where each journal's data ends: zeroes are room for more.
    journal_ends: BTreeMap<PathBuf, u64>,
}

impl Original {
    fn of(count: usize, echo_bytes: usize) -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let folder = tempfile::tempdir().expect("a folder");
        let mut chance = Chance::seeded(SEED);
        let mut echo = || {
            let text: String =
                (0..echo_bytes / 16).map(|_| format!("{:016x}", chance.next())).collect();
            (echo_bytes > 0).then(|| format!("{{\"echo\":\"{text}\"}}"))
        };
        // The older half is settled, so that only reads look at it; the rest is looked at at start.
        let scenario = |n| if n < count / 2 { Scenario::Approve } else { Scenario::Delay };
        let payments: Vec<_> = (0..count).map(|n| payment(n, scenario(n), echo())).collect();
        let store = open(&folder.path().join("data")).expect("a new store");
        runtime.block_on(async {
            for batch in payments.chunks(BATCH) {
                let commits = batch.iter().map(|payment| {
                    let change = Change::Create { terms: Arc::clone(&payment.terms), draw: None };
                    Commit { change: Some(change), reply: None }
                });
                for answer in store.commit(commits.collect()).await {
                    answer.expect("a commit");
                }
            }
            store.close().await;
        });
        drop(store);
        let all = files(folder.path()).into_iter().map(|(path, _)| folder.path().join(path));
        let journals = all.filter(|path| path.extension().is_some_and(|e| e == "jnl"));
        let journal_ends = journals.map(|path| (path.clone(), end_of_data(&path))).collect();
        Self { runtime, folder, payments, journal_ends }
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// How many of them are still to be decided.
    fn open(&self) -> usize {
        self.payments.iter().filter(|payment| !payment.progress.is_settled()).count()
    }

    /// What becomes of a copy that was changed like this.
    fn after(&self, change: impl FnOnce(&Path)) -> End {
        let copy = tempfile::tempdir().expect("a folder");
        let data = copy.path().join("data");
        copy_all(&self.data(), &data, &self.journal_ends);
        change(&data);
        let store = match open(&data) {
            Ok(store) => store,
            Err(error) => return End::Refused(error.to_string()),
        };
        self.runtime.block_on(async {
            let later = Timestamp::from_ms(START).plus_ms(3_600_000);
            let mut end = match store.due(Work::Wake, later, usize::MAX).await {
                Ok(leases) if leases.len() == self.open() => End::AllThere,
                Ok(_) => End::Missing,
                Err(_) => End::ReadRefused,
            };
            for payment in &self.payments {
                end = end.worst(match store.get(payment.terms.id).await {
                    Ok(Some(found)) if found.payment == *payment => End::AllThere,
                    Ok(Some(_)) => End::Wrong,
                    Ok(None) => End::Missing,
                    Err(_) => End::ReadRefused,
                });
            }
            store.close().await;
            end
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    AllThere,
    /// Opened, and a read of what is damaged fails.
    ReadRefused,
    Refused(String),
    /// Opened without an acknowledged payment.
    Missing,
    Wrong,
}

impl End {
    fn worst(self, other: Self) -> Self {
        self.max(other)
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::AllThere => "all there",
            Self::ReadRefused => "a read refused",
            Self::Refused(_) => "refused at start",
            Self::Missing => "MISSING",
            Self::Wrong => "WRONG",
        }
    }
}

fn copy_all(from: &Path, to: &Path, ends: &BTreeMap<PathBuf, u64>) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("its type").is_dir() {
            copy_all(&entry.path(), &target, ends);
        } else if let Some(&end) = ends.get(&entry.path()) {
            let source = File::open(entry.path()).expect("a journal");
            let room = source.metadata().expect("its length").len();
            let mut copy = File::create(target).expect("a copy");
            io::copy(&mut source.take(end), &mut copy).expect("a copy");
            copy.set_len(room).expect("room");
        } else {
            fs::copy(entry.path(), target).expect("a copy");
        }
    }
}

/// Files below a folder, by their paths in it, with their lengths.
fn files(folder: &Path) -> Vec<(PathBuf, u64)> {
    fn walk(at: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(at).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() { walk(&path, found) } else { found.push(path) }
        }
    }
    let mut found = Vec::new();
    walk(folder, &mut found);
    found.sort();
    let described = |path: PathBuf| {
        let length = path.metadata().expect("its length").len();
        (path.strip_prefix(folder).expect("below it").to_owned(), length)
    };
    found.into_iter().map(described).collect()
}

fn flip(path: &Path, at: u64, bit: u8) {
    let file = File::options().read(true).write(true).open(path).expect("a file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("a byte");
    file.write_all_at(&[byte[0] ^ (1 << bit)], at).expect("a byte");
}

fn cut(path: &Path, to: u64) {
    File::options().write(true).open(path).expect("a file").set_len(to).expect("a shorter file");
}

/// Where the journal's data ends: behind it lie only zeroes.
fn end_of_data(path: &Path) -> u64 {
    let bytes = fs::read(path).expect("a file");
    bytes.iter().rposition(|&byte| byte != 0).map_or(0, |at| at as u64 + 1)
}

#[derive(Default)]
struct Tally {
    ends: BTreeMap<(String, &'static str), usize>,
    words: BTreeSet<String>,
}

impl Tally {
    fn note(&mut self, what: &str, end: &End) {
        if let End::Refused(why) = end {
            // Without the path and the numbers, which differ.
            let why = why.split_once(": ").map_or(why.as_str(), |(_, why)| why);
            self.words.insert(why.replace(|c: char| c.is_ascii_digit(), ""));
        }
        *self.ends.entry((what.to_owned(), end.kind())).or_default() += 1;
    }

    fn print(&self) {
        for ((what, kind), count) in &self.ends {
            println!("{what}: {count} {kind}");
        }
        println!("{:#?}", self.words);
    }

    fn assert_nothing_is_served_wrongly(&self) {
        self.print();
        let wrong = self.ends.keys().filter(|(_, kind)| matches!(*kind, "MISSING" | "WRONG"));
        assert_eq!(wrong.collect::<Vec<_>>(), Vec::<&(String, &str)>::new());
    }
}

#[test]
fn damage_to_the_journal_is_noticed() {
    let original = Original::of(FEW, 0);
    let journal = journal_of(&original.data());
    let name = journal.strip_prefix(original.data()).expect("below it").to_owned();
    let end = end_of_data(&journal);
    let mut chance = Chance::seeded(SEED);
    let mut tally = Tally::default();
    assert_eq!(original.after(|_| {}), End::AllThere);
    for _ in 0..POSITIONS {
        let (at, bit) = (chance.below(end), u8::try_from(chance.below(8)).expect("a bit"));
        let flipped = original.after(|data| flip(&data.join(&name), at, bit));
        tally.note("journal, a bit flipped", &flipped);
        let shortened = original.after(|data| cut(&data.join(&name), at));
        tally.note("journal, cut off", &shortened);
    }
    tally.assert_nothing_is_served_wrongly();
}

/// What the mark cannot tell: it is written once a second, so that after a crash commits of the last
/// second lie behind it. Where a journal is damaged before those and after the mark, the engine takes the
/// rest for a write that the crash cut off (fjall-rs/fjall#311), and they are gone unseen.
#[test]
fn damage_behind_the_mark_is_not_noticed() {
    const MARKED: &str = "10\n";
    let original = Original::of(FEW, 0);
    let journal = journal_of(&original.data());
    let name = journal.strip_prefix(original.data()).expect("below it").to_owned();
    let end = end_of_data(&journal);
    let crashed = |cut_at: u64| {
        original.after(|data| {
            fs::write(data.join("commit.mark"), MARKED).expect("the mark of a second ago");
            cut(&data.join(&name), cut_at);
        })
    };
    assert_eq!(crashed(end), End::AllThere);
    assert_eq!(crashed(end * 3 / 4), End::Missing, "the limit of what is promised has moved: good");
    assert!(matches!(crashed(end / 4), End::Refused(_)), "before the mark");
}

#[test]
fn damage_to_a_table_is_noticed() {
    let original = Original::of(MANY, LARGE_ECHO_BYTES);
    let mut chance = Chance::seeded(SEED);
    let mut tally = Tally::default();
    assert_eq!(original.after(|_| {}), End::AllThere);
    let all = files(&original.data());
    let tables: Vec<_> = all
        .iter()
        .filter(|(path, length)| {
            *length > 0 && path.extension().is_none_or(|e| e != "jnl") && path.iter().count() > 2
        })
        .collect();
    for (path, length) in tables {
        let large = *length > 1 << 20;
        let what = path.parent().and_then(Path::file_name).expect("a folder").to_string_lossy();
        for _ in 0..if large { POSITIONS / 4 } else { 1 } {
            let (at, bit) = (chance.below(*length), u8::try_from(chance.below(8)).expect("a bit"));
            let flipped = original.after(|data| flip(&data.join(path), at, bit));
            tally.note(&format!("{what}, a bit flipped"), &flipped);
            let shortened = original.after(|data| cut(&data.join(path), at));
            tally.note(&format!("{what}, cut off"), &shortened);
        }
    }
    tally.assert_nothing_is_served_wrongly();
}
