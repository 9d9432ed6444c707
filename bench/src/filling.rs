//! A folder with millions of payments in it, put there through the store alone.

use std::{fs, path::Path, str::FromStr, sync::Arc, time::Duration};

use payment_sim::{
    clock::{Clock, Stopwatch, SystemClock},
    domain::{ids::PaymentId, time::Timestamp},
    store::{
        self, Change, Commit, Embedded, Location, Options, Retention, Revision, Store, Versioned,
    },
};
use tokio::task::JoinSet;

use crate::payments::{self, Maker, created, delivered};

/// Payments a commit while filling, and commits under way at a time.
const BATCH: u64 = 500;
const FILLING_MAX: usize = 8;
/// The stored payments were made over this time, the owed ones just now.
const SPREAD_MS: u64 = 60 * 60 * 1_000;
/// Due so late that nothing is posted while it is measured, yet in memory from the start.
const OWED_FOR: Duration = Duration::from_secs(60);

/// What is stored: `settled` payments, made from `since_ms` on, and then those that are owed.
#[derive(Clone, Copy)]
pub struct Filling {
    pub settled: u64,
    pub owed: u64,
    since_ms: i64,
}

/// How the settled ones are.
#[derive(Clone, Copy)]
pub enum Settled {
    /// Each has had its webhook: it has changed since it was created.
    Told,
    /// As the load creates them: settled from the start, with nobody to be told.
    Bare,
}

impl FromStr for Settled {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "told" => Ok(Self::Told),
            "bare" => Ok(Self::Bare),
            _ => Err("told or bare is allowed"),
        }
    }
}

impl Filling {
    /// Fills the folder unless that was done before.
    ///
    /// # Errors
    /// Where the folder holds something else, or the store does not take them.
    pub async fn fill(dir: &Path, payments: u64, owed: u64, how: Settled) -> Result<Self, String> {
        let note = dir.join("filled");
        let settled = payments.checked_sub(owed).ok_or("more are owed than stored")?;
        let text = match how {
            Settled::Told => format!("{settled} {owed}"),
            Settled::Bare => format!("{settled} bare {owed}"),
        };
        if let Ok(found) = fs::read_to_string(&note) {
            let since_ms = found.strip_prefix(&text).and_then(|ms| ms.trim().parse().ok());
            let since_ms =
                since_ms.ok_or_else(|| format!("{} holds other payments", dir.display()))?;
            println!("{} is filled; what was owed there is overdue", dir.display());
            return Ok(Self { settled, owed, since_ms });
        }
        fs::create_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        let since_ms = SystemClock.now_ms() - SPREAD_MS.cast_signed();
        let filling = Self { settled, owed, since_ms };
        let took = Stopwatch::start();
        filling.store(dir, how).await?;
        println!("stored {payments} payments in {:.0} s", took.elapsed().as_secs_f64());
        fs::write(&note, format!("{text} {since_ms}\n")).map_err(|error| error.to_string())?;
        Ok(filling)
    }

    pub fn made_at(&self, n: u64) -> Timestamp {
        Timestamp::from_ms(self.since_ms).plus_ms(n * SPREAD_MS / self.settled.max(1))
    }

    /// The id of the `n`-th settled payment.
    pub fn id(&self, n: u64) -> PaymentId {
        payments::id(n, self.made_at(n))
    }

    async fn store(&self, dir: &Path, how: Settled) -> Result<(), String> {
        let day = Duration::from_secs(86_400);
        let options = Options {
            retention: Retention { payments: 7 * day, idempotency: day, payments_max: None },
            clock: Arc::new(SystemClock),
            on_commit: Arc::new(|_, _| {}),
            on_dropped_early: Arc::new(|_| {}),
        };
        let location = Location::Folder(dir.join("data"));
        let store = store::open(&location, options).map_err(|error| error.to_string())?;
        let (bare, at_once) = (Maker::bare(), Maker::new(Duration::ZERO));
        let later = Maker::new(OWED_FOR);
        let all = self.settled + self.owed;
        let batches = (0..all).step_by(BATCH as usize).map(|first| {
            let mut commits = Vec::new();
            for n in first..(first + BATCH).min(all) {
                if n >= self.settled {
                    let now = Timestamp::from_ms(SystemClock.now_ms());
                    commits.push(created(later.terms(n, now)));
                    continue;
                }
                match how {
                    Settled::Told => commits.extend(settled(&at_once, n, self.made_at(n))?),
                    Settled::Bare => commits.push(created(bare.terms(n, self.made_at(n)))),
                }
            }
            Ok(commits)
        });
        put(&store, batches).await?;
        store.close().await;
        Ok(())
    }
}

/// A payment's whole life: its creation, and its webhook delivered.
fn settled(maker: &Maker, n: u64, at: Timestamp) -> Result<[Commit; 2], String> {
    let payment = maker.payment(n, at);
    let after = delivered(&payment, at).ok_or("nothing was owed")?;
    let before = Arc::new(Versioned { payment: payment.clone(), revision: Revision(0) });
    let change = Change::update(before, after);
    Ok([created(payment.terms), Commit { change: Some(change), reply: None }])
}

/// Commits batches, several at a time.
///
/// # Errors
/// Where one cannot be made, or the store does not take it.
pub async fn put(
    store: &Arc<Embedded>,
    batches: impl IntoIterator<Item = Result<Vec<Commit>, String>>,
) -> Result<(), String> {
    let mut answers = JoinSet::new();
    for batch in batches {
        answers.spawn(commit(Arc::clone(store), batch?));
        if answers.len() == FILLING_MAX {
            answers.join_next().await.transpose().map_err(|e| e.to_string())?.transpose()?;
        }
    }
    for answer in answers.join_all().await {
        answer?;
    }
    Ok(())
}

async fn commit(store: Arc<Embedded>, commits: Vec<Commit>) -> Result<(), String> {
    match store.commit(commits).await.into_iter().find_map(Result::err) {
        Some(error) => Err(format!("a commit came to {error:?}")),
        None => Ok(()),
    }
}
