//! What goes out in batches: events to their sink, letters to the dead-letter queue.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Claim, Done, Jitter, Shared, drain};
use crate::{
    courier::{Courier, Parcel},
    domain::{
        delivery::{Attempted, Channel, RetryPolicy, Verdict},
        time::Timestamp,
    },
    driver::{self, Step},
    store::{StoreError, Work},
};

/// The pause of a whole sink that is down: doubled each time, up to here.
const PAUSE_BASE_MS: u64 = 500;
const PAUSE_MAX_MS: u64 = 60_000;

/// When an entry that its sink did not take is tried again, the sink as a whole being well.
pub const RETRIES: RetryPolicy = RetryPolicy {
    max_attempts: None,
    backoff_base: Duration::from_millis(PAUSE_BASE_MS),
    backoff_max: Duration::from_millis(PAUSE_MAX_MS),
    dead_letters: false,
};

/// What is sent, and for whom it is counted.
#[derive(Clone, Copy, Debug)]
pub enum Mail {
    /// To the sink of this name.
    Events(&'static str),
    DeadLetters,
}

impl Mail {
    const fn channel(self) -> Channel {
        match self {
            Self::Events(_) => Channel::Event,
            Self::DeadLetters => Channel::DeadLetter,
        }
    }

    const fn work(self) -> Work {
        match self {
            Self::Events(_) => Work::Event,
            Self::DeadLetters => Work::DeadLetter,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Events(sink) => sink,
            Self::DeadLetters => "dead-letter queue",
        }
    }
}

/// Several calls at a time, but only while each is full: what comes in during a call that is not goes
/// along in the next. That keeps calls few, which is what a sink counts, at no cost in delay beyond
/// one call's.
pub struct Batches {
    shared: Shared,
    courier: Arc<dyn Courier>,
    mail: Mail,
    /// Leased, and not enough for a call yet.
    gathered: Mutex<Vec<(Claim, Parcel)>>,
    places: Arc<Semaphore>,
    sink: Arc<Mutex<Sink>>,
    jitter: Jitter,
    calls: TaskTracker,
    /// Ends the calls under way; what they carry stays owed.
    abandon: CancellationToken,
    done: mpsc::Sender<Done>,
}

impl Batches {
    pub fn new(
        shared: Shared,
        courier: Arc<dyn Courier>,
        mail: Mail,
        jitter: Jitter,
        done: mpsc::Sender<Done>,
    ) -> Self {
        let places = Arc::new(Semaphore::new(courier.calls_max()));
        Self {
            shared,
            courier,
            mail,
            gathered: Mutex::default(),
            places,
            sink: Arc::default(),
            jitter,
            calls: TaskTracker::new(),
            abandon: CancellationToken::new(),
            done,
        }
    }

    /// Waits for the calls under way, and abandons those that take longer; false: there were some.
    pub async fn drain(&self, grace: Duration) -> bool {
        drain(&self.calls, &self.abandon, grace).await
    }

    async fn send_due(&self) -> Result<usize, StoreError> {
        if !self.shared.can_finish() {
            return Ok(0);
        }
        let now = self.shared.now();
        let sink = self.lock_sink().at(now);
        if now < sink.paused_until {
            // Given back, so that whoever asks what is due is told of them.
            self.lock_gathered().clear();
            return Ok(0);
        }
        let under_way = self.courier.calls_max() - self.places.available_permits();
        // After a failure one call finds out whether the sink is back.
        let is_probing = sink.failures > 0 && under_way > 0;
        if is_probing {
            return Ok(0);
        }
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else { return Ok(0) };
        let batch = self.gather(now).await?;
        if batch.is_empty() {
            return Ok(0);
        }
        if batch.len() < self.courier.batch_max() && under_way > 0 {
            *self.lock_gathered() = batch;
            return Ok(0);
        }
        let count = batch.len();
        self.start(batch, place, now);
        Ok(count)
    }

    async fn gather(&self, now: Timestamp) -> Result<Vec<(Claim, Parcel)>, StoreError> {
        let mut batch = std::mem::take(&mut *self.lock_gathered());
        let room = self.courier.batch_max() - batch.len();
        for lease in self.shared.store.due(self.mail.work(), now, room).await? {
            let Some(claim) = self.shared.claim(lease, now).await? else { continue };
            let parcel = claim.parcel(&self.shared.bodies, self.mail.channel(), now);
            batch.extend(parcel.map(|parcel| (claim, parcel)));
        }
        Ok(batch)
    }

    fn start(&self, batch: Vec<(Claim, Parcel)>, place: OwnedSemaphorePermit, now: Timestamp) {
        let (courier, done, abandon) =
            (Arc::clone(&self.courier), self.done.clone(), self.abandon.clone());
        let outcome = Outcome {
            shared: self.shared.clone(),
            sink: Arc::clone(&self.sink),
            mail: self.mail,
            jitter: Arc::clone(&self.jitter),
            began: now,
        };
        self.calls.spawn(async move {
            let (claims, parcels): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
            let call = courier.attempt(&parcels, now);
            let Some(attempts) = abandon.run_until_cancelled(call).await else { return };
            outcome.note(&attempts);
            drop(place);
            outcome.shared.store.changed(outcome.mail.work()).notify_one();
            let channel = outcome.mail.channel();
            for ((Claim { lease, .. }, parcel), attempted) in
                claims.into_iter().zip(parcels).zip(attempts)
            {
                // Only gone when the process ends; what is not written down is still owed.
                let _ = done.send(Done { lease, n: parcel.n, channel, attempted }).await;
            }
        });
    }

    fn lock_sink(&self) -> std::sync::MutexGuard<'_, Sink> {
        self.sink.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_gathered(&self) -> std::sync::MutexGuard<'_, Vec<(Claim, Parcel)>> {
        self.gathered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Step for Batches {
    fn work(&self) -> Work {
        self.mail.work()
    }

    async fn step(&self) -> usize {
        match self.send_due().await {
            Ok(taken) => taken,
            Err(error) => {
                tracing::warn!(%error, sink = self.mail.name(), "what is owed could not be read");
                driver::pause_after_failure().await;
                0
            }
        }
    }

    fn resumes_at(&self) -> Option<Timestamp> {
        Some(self.lock_sink().paused_until)
    }
}

/// How the sink as a whole is doing.
#[derive(Clone, Debug, Default)]
struct Sink {
    failures: u32,
    paused_until: Timestamp,
}

impl Sink {
    /// No pause is longer than the longest: where it seems so, the clock was set back.
    fn at(&mut self, now: Timestamp) -> Self {
        if self.paused_until > now.plus_ms(PAUSE_MAX_MS) {
            self.paused_until = now;
        }
        self.clone()
    }

    /// Whether it was well in a call that began at `began`; how long it is left alone now, if it is.
    fn note(&mut self, well: bool, began: Timestamp, now: Timestamp, jitter: f64) -> Option<u64> {
        if began < self.paused_until {
            // Others of its time have failed already: that is one failure, not many.
            return None;
        }
        if well {
            self.failures = 0;
            return None;
        }
        let cap = (PAUSE_BASE_MS << self.failures.min(16)).min(PAUSE_MAX_MS);
        self.failures += 1;
        // At least half of it, so that it does grow; not the same for all who call.
        let pause_ms = ((cap as f64 / 2.0) * (1.0 + jitter.clamp(0.0, 1.0))) as u64;
        self.paused_until = now.plus_ms(pause_ms);
        Some(pause_ms)
    }
}

/// What a call under way needs to say how it went.
struct Outcome {
    shared: Shared,
    sink: Arc<Mutex<Sink>>,
    mail: Mail,
    jitter: Jitter,
    began: Timestamp,
}

impl Outcome {
    fn note(&self, attempts: &[Attempted]) {
        let [mut accepted, mut retried, mut refused, mut down] = [0; 4];
        for attempted in attempts {
            match attempted.verdict {
                Verdict::Accepted => accepted += 1,
                Verdict::Retry { .. } => retried += 1,
                Verdict::Unavailable => down += 1,
                Verdict::Refused => refused += 1,
            }
        }
        self.count("published", accepted);
        self.count("retry", retried + down);
        self.count("dead", refused);
        let well = down == 0 && (accepted > 0 || retried == 0);
        let mut sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
        let paused = sink.note(well, self.began, self.shared.now(), (self.jitter)());
        drop(sink);
        if let Some(pause_ms) = paused {
            let failed =
                |a: &&Attempted| matches!(a.verdict, Verdict::Retry { .. } | Verdict::Unavailable);
            let first = attempts.iter().find(failed);
            let error = first.and_then(|a| a.attempt.error.as_deref()).unwrap_or("");
            let sink = self.mail.name();
            tracing::warn!(sink, error, pause_ms, "it takes nothing; trying again later");
        }
    }

    fn count(&self, result: &'static str, n: u64) {
        match self.mail {
            _ if n == 0 => {}
            Mail::Events(sink) => self.shared.metrics.event_published(sink, result, n),
            Mail::DeadLetters => self.shared.metrics.dead_letter(result, n),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_ms(1_000_000);

    #[test]
    fn a_sink_that_is_down_is_left_alone_longer_each_time_up_to_a_minute() {
        let mut sink = Sink::default();
        let mut now = NOW;
        let pauses: Vec<_> = (0..10)
            .map(|_| {
                let pause = sink.note(false, now, now, 1.0).expect("it is paused");
                now = sink.paused_until;
                pause
            })
            .collect();
        assert_eq!(pauses, [500, 1000, 2000, 4000, 8000, 16000, 32000, 60000, 60000, 60000]);
        assert_eq!(sink.note(true, now, now, 1.0), None);
        assert_eq!(sink.note(false, now, now, 0.0), Some(250), "it begins anew");
    }

    #[test]
    fn a_clock_that_is_set_back_ends_the_pause() {
        let mut sink = Sink::default();
        sink.note(false, NOW, NOW, 1.0);
        let earlier = Timestamp::from_ms(NOW.ms() - 3_600_000);
        assert_eq!(sink.at(NOW).paused_until, NOW.plus_ms(500));
        assert_eq!(sink.at(earlier).paused_until, earlier);
    }

    #[test]
    fn calls_that_fail_together_are_one_failure() {
        let mut sink = Sink::default();
        assert!(sink.note(false, NOW, NOW.plus_ms(30), 1.0).is_some());
        assert!(sink.note(false, NOW.plus_ms(5), NOW.plus_ms(40), 1.0).is_none());
        sink.note(true, NOW.plus_ms(5), NOW.plus_ms(50), 1.0);
        assert_eq!(sink.failures, 1, "a success of before says nothing of now");
    }
}
