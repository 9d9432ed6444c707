//! Events as lines of JSON, for development: one line an event, written by a thread of its own.
//!
//! A pipe whose reader is slow blocks its writer. Here that is a thread that nobody waits for but the
//! attempts themselves: the outbox grows, no RPC slows down.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsFd,
    thread,
};

use async_trait::async_trait;
use serde::Serialize;
use serde_json::value::RawValue;
use tokio::sync::{mpsc, oneshot};

use super::{Courier, Noted, Parcel};
use crate::{
    clock::Stopwatch,
    domain::{delivery::Attempted, time::Timestamp},
};

/// Events of one attempt: written and flushed together.
const BATCH_MAX: usize = 100;
/// Attempts that wait for the thread; more wait outside. Together at most a few MiB.
const QUEUE_BATCHES: usize = 16;
const LINE_CAPACITY_BYTES: usize = 1024;

/// EventBridge's envelope, as far as a log has something to say.
#[derive(Serialize)]
struct Envelope<'a> {
    id: &'a str,
    time: String,
    source: &'a str,
    #[serde(rename = "detail-type")]
    detail_type: &'a str,
    detail: &'a RawValue,
}

/// Lines on their way to the thread, and who wants to know.
struct Lines {
    bytes: Vec<u8>,
    written: oneshot::Sender<Result<(), io::ErrorKind>>,
}

pub struct LogCourier {
    source: String,
    queue: mpsc::Sender<Lines>,
}

/// Standard output, past the lock and the buffer of `std::io::Stdout`: a `println!` elsewhere must not
/// wait for a slow reader of events, nor a line be held back when it is said to be written.
pub fn stdout() -> io::Result<File> {
    Ok(File::from(io::stdout().as_fd().try_clone_to_owned()?))
}

impl LogCourier {
    /// Starts the thread. It ends by itself once the courier is dropped and the queue is written. Nobody
    /// joins it: it may be stuck in a write until the reader goes away, and what it had not written is
    /// still owed.
    pub fn start(source: String, to: impl Write + Send + 'static) -> io::Result<Self> {
        let (queue, lines) = mpsc::channel(QUEUE_BATCHES);
        thread::Builder::new().name("event-log".to_owned()).spawn(move || write_all(lines, to))?;
        Ok(Self { source, queue })
    }

    /// Adds a line, or nothing for a body that is not JSON.
    fn render(&self, parcel: &Parcel, lines: &mut Vec<u8>) -> Option<()> {
        let envelope = Envelope {
            id: &parcel.event_id,
            time: jiff::Timestamp::from_millisecond(parcel.at.ms()).ok()?.to_string(),
            source: &self.source,
            detail_type: parcel.topic.detail_type(),
            detail: serde_json::from_slice(&parcel.body).ok()?,
        };
        let start = lines.len();
        serde_json::to_writer(&mut *lines, &envelope)
            .expect("an envelope has string keys, and memory takes every write");
        // In JSON a raw line break can only be white space between tokens.
        lines[start..].iter_mut().filter(|b| matches!(b, b'\n' | b'\r')).for_each(|b| *b = b' ');
        lines.push(b'\n');
        Some(())
    }

    async fn write(&self, bytes: Vec<u8>) -> Result<(), &'static str> {
        const GONE: &str = "LOG_STOPPED";
        if bytes.is_empty() {
            return Ok(());
        }
        let (written, done) = oneshot::channel();
        self.queue.send(Lines { bytes, written }).await.map_err(|_| GONE)?;
        done.await.map_err(|_| GONE)?.map_err(|kind| match kind {
            io::ErrorKind::BrokenPipe => "BROKEN_PIPE",
            io::ErrorKind::StorageFull => "STORAGE_FULL",
            _ => "WRITE_FAILED",
        })
    }
}

#[async_trait]
impl Courier for LogCourier {
    fn batch_max(&self) -> usize {
        BATCH_MAX
    }

    /// Waits as long as the reader takes: giving up sooner would only write the same lines again.
    async fn attempt(&self, batch: &[Parcel], now: Timestamp) -> Vec<Attempted> {
        let watch = Stopwatch::start();
        let mut lines = Vec::with_capacity(batch.len() * LINE_CAPACITY_BYTES);
        let rendered: Vec<_> = batch.iter().map(|parcel| self.render(parcel, &mut lines)).collect();
        let written = self.write(lines).await;
        let noted = Noted { at: now, took: watch.elapsed(), http_status: None };
        let verdict = |rendered| match (rendered, written) {
            (None, _) => noted.refused("MALFORMED_DETAIL"),
            (Some(()), Ok(())) => noted.accepted(),
            (Some(()), Err(why)) => noted.unavailable(why),
        };
        rendered.into_iter().map(verdict).collect()
    }
}

/// The thread. A write that fails fails its lines only: the next may find a reader again.
fn write_all(mut queue: mpsc::Receiver<Lines>, mut to: impl Write) {
    let mut is_torn = false;
    while let Some(Lines { bytes, written }) = queue.blocking_recv() {
        // What a failed write left of a line must not run into the next one.
        let start: &[u8] = if is_torn { b"\n" } else { b"" };
        let done =
            to.write_all(start).and_then(|()| to.write_all(&bytes)).and_then(|()| to.flush());
        is_torn = done.is_err();
        // An attempt that was dropped needs no answer: its lines are owed, and come again.
        let _nobody_waits = written.send(done.map_err(|e| e.kind()));
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Read},
        os::unix::net::UnixStream,
        sync::{Arc, Mutex},
        time::Duration,
    };

    use super::*;
    use crate::{
        courier::receiver::{NOW, parcel},
        domain::delivery::{Topic, Verdict},
    };

    const DEADLINE: Duration = Duration::from_secs(10);

    fn courier(to: impl Write + Send + 'static) -> LogCourier {
        LogCourier::start("payment-sim-api".into(), to).unwrap()
    }

    /// Counts flushes: what is accepted was flushed.
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<(Vec<u8>, usize)>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().0.extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            self.0.lock().unwrap().1 += 1;
            Ok(())
        }
    }

    #[tokio::test]
    async fn an_accepted_event_is_one_flushed_line_of_json() {
        let sink = Sink::default();
        let mut refund = parcel(2, None);
        refund.topic = Topic::RefundUpdated;
        refund.body = "{\"a\":\n1}".into();
        let done = courier(sink.clone()).attempt(&[parcel(1, None), refund], NOW).await;
        assert!(done.iter().all(|d| d.verdict == Verdict::Accepted), "{done:?}");

        let (bytes, flushes) = sink.0.lock().unwrap().clone();
        assert_eq!(flushes, 1);
        let lines: Vec<serde_json::Value> = bytes
            .strip_suffix(b"\n")
            .unwrap()
            .split(|b| *b == b'\n')
            .map(|line| serde_json::from_slice(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0]["id"], parcel(1, None).event_id);
        assert_eq!(lines[0]["time"], "2026-01-01T00:00:00.25Z");
        assert_eq!(lines[0]["source"], "payment-sim-api");
        assert_eq!(lines[0]["detail-type"], "Payment Status Updated");
        assert_eq!(lines[0]["detail"]["n"], 1);
        assert_eq!(lines[1]["detail-type"], "Payment Refund Updated");
    }

    #[tokio::test]
    async fn a_body_that_is_not_json_is_refused_and_the_rest_written() {
        let sink = Sink::default();
        let mut bad = parcel(1, None);
        bad.body = "{".into();
        let done = courier(sink.clone()).attempt(&[bad, parcel(2, None)], NOW).await;
        assert_eq!(done[0].verdict, Verdict::Refused);
        assert_eq!(done[1].verdict, Verdict::Accepted);
        assert_eq!(sink.0.lock().unwrap().0.iter().filter(|b| **b == b'\n').count(), 1);
    }

    #[tokio::test]
    async fn a_closed_reader_is_an_error_to_try_again() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let courier = courier(ours);
        drop(theirs);
        for _ in 0..3 {
            let done = courier.attempt(&[parcel(1, None)], NOW).await;
            assert_eq!(done[0].verdict, Verdict::Unavailable);
            assert_eq!(done[0].attempt.error.as_deref(), Some("BROKEN_PIPE"));
        }
    }

    /// A reader that does not read holds up the attempts, and nothing else; reading lets them go.
    #[tokio::test]
    async fn a_slow_reader_holds_up_the_attempts_only() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let courier = courier(ours);
        // More than the socket and the queue hold together.
        let big =
            vec![
                Parcel { body: format!("\"{}\"", "x".repeat(1 << 20)).into(), ..parcel(1, None) };
                8
            ];
        let slow = courier.attempt(&big, NOW);
        tokio::pin!(slow);
        // The thread is in its write once the first bytes are there; on this single-threaded runtime
        // that this line goes on at all shows that nothing blocks it.
        let early = tokio::time::timeout(Duration::from_millis(50), &mut slow).await;
        assert!(early.is_err(), "accepted before anybody read it");

        let reader = thread::spawn(move || {
            theirs.set_read_timeout(Some(DEADLINE)).unwrap();
            BufReader::new(theirs.take(8 << 21))
                .lines()
                .take(8)
                .map(|l| l.unwrap().len())
                .sum::<usize>()
        });
        let done = tokio::time::timeout(DEADLINE, slow).await.unwrap();
        assert!(done.iter().all(|d| d.verdict == Verdict::Accepted));
        assert!(reader.join().unwrap() > 8 << 20);
    }

    /// Fails in the middle of the first line, then works.
    struct Torn(Sink, usize);

    impl Write for Torn {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1 += 1;
            match self.1 {
                1 => self.0.write(&bytes[..10]),
                2 => Err(io::ErrorKind::StorageFull.into()),
                _ => self.0.write(bytes),
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            self.0.flush()
        }
    }

    #[tokio::test]
    async fn a_torn_line_does_not_spoil_the_next() {
        let sink = Sink::default();
        let courier = courier(Torn(sink.clone(), 0));
        let first = courier.attempt(&[parcel(1, None)], NOW).await;
        assert_eq!(first[0].attempt.error.as_deref(), Some("STORAGE_FULL"));
        let again = courier.attempt(&[parcel(1, None)], NOW).await;
        assert_eq!(again[0].verdict, Verdict::Accepted);
        let text = String::from_utf8(sink.0.lock().unwrap().0.clone()).unwrap();
        let last = text.lines().last().unwrap();
        assert!(serde_json::from_str::<serde_json::Value>(last).is_ok(), "{text}");
    }

    #[test]
    fn standard_output_can_be_taken() {
        assert!(stdout().is_ok());
    }
}
