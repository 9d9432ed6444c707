//! Load on a gRPC server: a closed loop that keeps every stream busy, or an open one at a constant rate.
//!
//! Each stream of each connection is a task that takes the next call of its thread's schedule. A call of an
//! open loop has an intended start, and its latency counts from there, also when no stream was free by
//! then: a server that stalls is charged with all the calls that it held up.

mod calls;
mod plot;
mod report;
mod schedule;

use std::{
    net::SocketAddr,
    sync::{
        Arc, Barrier, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use payment_sim::clock::Stopwatch;
use tokio::{task::JoinSet, time};

use crate::argument;
use calls::Caller;
use report::Tally;
use schedule::Schedule;

pub use calls::{Calls, Kind, Life};
pub use plot::page;
pub use report::Report;

/// The last calls of a run may take so long; a server that hangs ends the run as an error.
const PATIENCE: Duration = Duration::from_secs(30);
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

#[derive(Clone)]
pub struct Load {
    pub calls: Calls,
    pub connections: usize,
    /// Calls at a time on each connection.
    pub streams: usize,
    /// Each with a runtime and its share of the connections.
    pub threads: usize,
    /// Calls a second; `None`: as many as are answered.
    pub rate: Option<u64>,
    pub duration: Duration,
}

/// What the threads of a run share.
struct Run {
    load: Load,
    target: SocketAddr,
    /// Nobody calls before all are connected.
    connected: Barrier,
    clock: OnceLock<Stopwatch>,
    answered: AtomicU64,
    failed: AtomicU64,
    /// Since the start, in microseconds: the latest answer, and the longest time without one.
    latest_us: AtomicU64,
    stall_us: AtomicU64,
}

impl Load {
    /// A closed loop as the command line says; without a word of it on 50 connections from every core.
    ///
    /// # Errors
    /// An argument that is no number.
    pub fn from_arguments(kind: Kind, streams: usize, seconds: u64) -> Result<Self, String> {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            calls: Calls { kind, run: 0 },
            connections: argument("connections", 50)?,
            streams: argument("streams", streams)?,
            threads: argument("threads", cores)?,
            rate: None,
            duration: Duration::from_secs(argument("seconds", seconds)?),
        })
    }

    /// Runs to its end, with a line each second on standard error.
    ///
    /// # Errors
    /// A connection that is refused or breaks; a call that is refused counts as failed.
    pub fn run(&self, target: SocketAddr) -> Result<Report, String> {
        if [self.connections, self.streams, self.threads].contains(&0) || self.rate == Some(0) {
            return Err("connections, streams, threads, rate: at least 1 each".to_owned());
        }
        let run = Run {
            load: self.clone(),
            target,
            connected: Barrier::new(self.threads),
            clock: OnceLock::new(),
            answered: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            latest_us: AtomicU64::new(0),
            stall_us: AtomicU64::new(0),
        };
        let run = Arc::new(run);
        let (running, ended) = mpsc::channel::<()>();
        let threads: Vec<_> = (0..self.threads)
            .map(|number| {
                let (run, running) = (Arc::clone(&run), running.clone());
                thread::spawn(move || {
                    let _running = running;
                    run.thread(number)
                })
            })
            .collect();
        drop(running);
        run.show_progress(&ended);
        let mut all = Tally::new();
        for thread in threads {
            all.add(&thread.join().map_err(|_| "a thread of the load panicked")??);
        }
        Ok(run.report(all))
    }
}

impl Run {
    fn thread(self: Arc<Self>, number: usize) -> Result<Tally, String> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| error.to_string())?;
        let mut drivers = JoinSet::new();
        let callers = runtime.block_on(self.connect(number, &mut drivers));
        self.connected.wait();
        self.clock.get_or_init(Stopwatch::start);
        runtime.block_on(Arc::clone(&self).call_all(number, callers?))
    }

    /// This thread's connections.
    async fn connect(
        &self,
        number: usize,
        drivers: &mut JoinSet<()>,
    ) -> Result<Vec<Caller>, String> {
        let mut callers = Vec::new();
        for _ in (number..self.load.connections).step_by(self.load.threads) {
            let (caller, driver) = Caller::connect(self.target, self.load.calls.path()).await?;
            drivers.spawn(driver);
            callers.push(caller);
        }
        Ok(callers)
    }

    async fn call_all(
        self: Arc<Self>,
        number: usize,
        callers: Vec<Caller>,
    ) -> Result<Tally, String> {
        let Load { threads, streams, rate, duration, .. } = self.load;
        let schedule = Arc::new(Schedule::new(number, threads, rate, duration));
        let tally = Arc::new(Mutex::new(Tally::new()));
        let mut all = JoinSet::new();
        // Neighbours in the schedule go to different connections.
        for _ in 0..streams {
            for caller in &callers {
                let (run, schedule) = (Arc::clone(&self), Arc::clone(&schedule));
                all.spawn(run.stream(caller.clone(), schedule, Arc::clone(&tally)));
            }
        }
        match time::timeout(duration + PATIENCE, ended(all)).await {
            Ok(ended) => ended?,
            Err(_) => return Err("calls were not answered at all".to_owned()),
        }
        Ok(lock(&tally).clone())
    }

    async fn stream(
        self: Arc<Self>,
        mut caller: Caller,
        schedule: Arc<Schedule>,
        tally: Arc<Mutex<Tally>>,
    ) -> Result<(), h2::Error> {
        while let Some(turn) = schedule.next(self.elapsed()) {
            if let Some(wait) = turn.wait {
                time::sleep(wait).await;
                let late = self.elapsed().saturating_sub(turn.due);
                lock(&tally).sent(late);
            } else if self.load.rate.is_some() {
                lock(&tally).held_up();
            }
            let ok = caller.call(self.load.calls.request(turn.n)).await?;
            let now = self.elapsed();
            if ok {
                lock(&tally).answered(now.saturating_sub(turn.due));
            } else {
                self.failed.fetch_add(1, Ordering::Relaxed);
            }
            self.note(now);
        }
        Ok(())
    }

    fn elapsed(&self) -> Duration {
        self.clock.get().map_or(Duration::ZERO, Stopwatch::elapsed)
    }

    fn note(&self, now: Duration) {
        let now_us = micros(now);
        let before_us = self.latest_us.fetch_max(now_us, Ordering::Relaxed);
        self.stall_us.fetch_max(now_us.saturating_sub(before_us), Ordering::Relaxed);
        self.answered.fetch_add(1, Ordering::Relaxed);
    }

    fn show_progress(&self, ended: &mpsc::Receiver<()>) {
        let mut before = 0;
        while ended.recv_timeout(PROGRESS_EVERY) == Err(RecvTimeoutError::Timeout) {
            let answered = self.answered.load(Ordering::Relaxed);
            eprintln!(
                "{:>4.0} s  {:>7} calls/s  {answered:>9} answered  {} failed  longest stall {:.0} ms",
                self.elapsed().as_secs_f64(),
                answered - before,
                self.failed.load(Ordering::Relaxed),
                self.stall_us.load(Ordering::Relaxed) as f64 / 1e3,
            );
            before = answered;
        }
    }

    fn report(&self, tally: Tally) -> Report {
        Report {
            answered: self.answered.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            seconds: self.latest_us.load(Ordering::Relaxed) as f64 / 1e6,
            stall_ms: self.stall_us.load(Ordering::Relaxed) as f64 / 1e3,
            tally,
        }
    }
}

async fn ended(mut streams: JoinSet<Result<(), h2::Error>>) -> Result<(), String> {
    while let Some(stream) = streams.join_next().await {
        stream.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
    }
    Ok(())
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn lock(tally: &Mutex<Tally>) -> MutexGuard<'_, Tally> {
    tally.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http::{HeaderMap, HeaderName, HeaderValue, Response};
    use tokio::net::TcpListener;

    use super::*;

    const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

    /// The n-th call is answered by the n-th of these, over and over.
    #[derive(Clone, Copy)]
    enum Answer {
        Status(&'static str),
        Refusal(&'static str),
        NoStatus,
        Reset,
    }

    /// Serves one connection until it is closed, at first after a while; the task ends with the set.
    async fn server(
        answers: &'static [Answer],
        mut stall: Duration,
        tasks: &mut JoinSet<()>,
    ) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tasks.spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut connection = h2::server::handshake(stream).await.unwrap();
            let mut answers = answers.iter().cycle();
            while let Some(Ok((_, reply))) = connection.accept().await {
                time::sleep(std::mem::take(&mut stall)).await;
                answer(*answers.next().unwrap(), reply);
            }
        });
        address
    }

    fn answer(answer: Answer, mut reply: h2::server::SendResponse<Bytes>) {
        let status = |code| HeaderMap::from_iter([(GRPC_STATUS, HeaderValue::from_static(code))]);
        let mut head = Response::new(());
        match answer {
            Answer::Status(code) => {
                let mut body = reply.send_response(head, false).unwrap();
                body.send_data(Bytes::from_static(&[0; 5]), false).unwrap();
                body.send_trailers(status(code)).unwrap();
            }
            Answer::Refusal(code) => {
                *head.headers_mut() = status(code);
                reply.send_response(head, true).unwrap();
            }
            Answer::NoStatus => {
                reply.send_response(head, true).unwrap();
            }
            Answer::Reset => reply.send_reset(h2::Reason::REFUSED_STREAM),
        }
    }

    /// A hundred calls in a tenth of a second.
    fn load() -> Load {
        Load {
            calls: Calls { kind: Kind::Create, run: 0 },
            connections: 1,
            streams: 3,
            threads: 1,
            rate: Some(1_000),
            duration: Duration::from_millis(100),
        }
    }

    fn run(answers: &'static [Answer], stall: Duration) -> Report {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let mut tasks = JoinSet::new();
        let target = runtime.block_on(server(answers, stall, &mut tasks));
        load().run(target).unwrap()
    }

    #[test]
    fn a_constant_rate_is_called_in_full() {
        let report = run(&[Answer::Status("0")], Duration::ZERO);
        assert_eq!((report.answered, report.failed), (100, 0));
        assert!(report.is_valid());
    }

    #[test]
    fn a_stall_is_charged_with_all_the_calls_that_it_held_up() {
        let report = run(&[Answer::Status("0")], 3 * load().duration);
        // All should have begun in the first of three tenths of a second; only three could.
        let fastest_ms = report.latency_ms(0.0);
        assert!(fastest_ms >= 199.0 && report.stall_ms >= 299.0, "{fastest_ms}");
        assert!(report.held_up_share() > 0.9);
    }

    #[test]
    fn whatever_is_not_ok_has_failed() {
        use Answer::{NoStatus, Refusal, Reset, Status};
        let answers = &[Status("0"), Status("8"), Refusal("14"), NoStatus, Reset];
        let report = run(answers, Duration::ZERO);
        assert_eq!((report.answered, report.failed), (100, 80));
        assert!(!report.is_valid());
    }

    #[test]
    fn nobody_listening_is_an_error_and_no_figure() {
        // A port that was free and is closed again.
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!(load().run(address).is_err_and(|error| error.contains("refused")));
    }
}
