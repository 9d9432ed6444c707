//! What the requests of one thread commit goes to the writer together: a wake-up and a socket write for
//! each of them would cost more than its commit.
//!
//! While some rounds are written the next one gathers, so that rounds size themselves and nothing waits for
//! a timer. A round is acknowledged with one wake-up, and all its callers are answered in one turn of the
//! thread, which then writes their replies together.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::pending,
    rc::Rc,
};

use tokio::{
    sync::{Notify, mpsc, oneshot},
    task::yield_now,
};

use super::{
    Answers, Commit, StoreError,
    writer::{Asker, Job, Round},
};

/// Commits that wait on one thread for the rounds before theirs: as many as requests are in flight at a
/// time, as shipped. More are refused at once.
const WAITING_MAX: usize = 8_192;
/// Commits of a round. The writer splits no job, and several threads' rounds fit into one of its syncs.
const ROUND_MAX: usize = 500;
/// Nothing more is handed on while the writer has so many rounds of a thread: when one sync has ended, what the
/// next one takes is there already. With more of them rounds would be small, and their bookkeeping dear.
const IN_FLIGHT_MAX: usize = 4;

thread_local! {
    /// Where commits of this thread gather, while somebody is there to hand them on.
    static HERE: RefCell<Option<Rc<Here>>> = const { RefCell::new(None) };
}

/// Makes threads gather what they commit to one store.
#[derive(Clone)]
pub struct Gatherer {
    jobs: mpsc::Sender<Job>,
}

struct Here {
    jobs: mpsc::Sender<Job>,
    gathered: RefCell<VecDeque<Gathered>>,
    /// Rounds that are over: the next ones take their room.
    spare: RefCell<Vec<Gathered>>,
    waiting: Cell<usize>,
    /// There is a round to hand on, or the thread is about to end.
    filled: Notify,
    ended: Cell<bool>,
}

/// Who waits for how many of a round's commits, in order.
type Callers = Vec<(usize, oneshot::Sender<Answers>)>;

#[derive(Default)]
struct Gathered {
    round: Round,
    callers: Callers,
}

/// Hands commits in, in one step: they run to their end whatever the caller does. On a thread that
/// gathers they join the next round, on any other they go straight to the writer.
pub fn hand_in(
    jobs: &mpsc::Sender<Job>,
    commits: Vec<Commit>,
    answer: oneshot::Sender<Answers>,
) -> Result<(), StoreError> {
    let here = HERE.with_borrow(|here| here.clone().filter(|here| here.jobs.same_channel(jobs)));
    match here {
        Some(here) => here.join(commits, answer),
        None => send(jobs, Job::Commit { round: Round::of(commits), asker: Asker::Caller(answer) }),
    }
}

/// Refused at once where the queue is full.
pub fn send(jobs: &mpsc::Sender<Job>, job: Job) -> Result<(), StoreError> {
    jobs.try_send(job).map_err(|error| match error {
        mpsc::error::TrySendError::Full(_) => StoreError::Overloaded,
        mpsc::error::TrySendError::Closed(_) => StoreError::Unavailable,
    })
}

impl Gatherer {
    pub(super) fn new(jobs: mpsc::Sender<Job>) -> Self {
        Self { jobs }
    }

    /// Runs `serving`, and gathers what is committed on this thread meanwhile. It is for the one future
    /// that a thread blocks on, and ends when nothing is left to hand on.
    pub async fn around<R>(self, serving: impl Future<Output = R>) -> R {
        let here = Rc::new(Here {
            jobs: self.jobs,
            gathered: RefCell::default(),
            spare: RefCell::default(),
            waiting: Cell::new(0),
            filled: Notify::new(),
            ended: Cell::new(false),
        });
        let _gathering = Gathering::begin(Rc::clone(&here));
        let serving = async {
            let result = serving.await;
            here.ended.set(true);
            here.filled.notify_one();
            result
        };
        tokio::join!(serving, here.hand_on()).0
    }
}

/// While this lives, its thread gathers.
struct Gathering;

impl Gathering {
    fn begin(here: Rc<Here>) -> Self {
        HERE.set(Some(here));
        Self
    }
}

impl Drop for Gathering {
    fn drop(&mut self) {
        HERE.set(None);
    }
}

impl Here {
    fn join(
        &self,
        commits: Vec<Commit>,
        answer: oneshot::Sender<Answers>,
    ) -> Result<(), StoreError> {
        let (count, waiting) = (commits.len(), self.waiting.get());
        if waiting + count > WAITING_MAX {
            return Err(StoreError::Overloaded);
        }
        self.waiting.set(waiting + count);
        let mut gathered = self.gathered.borrow_mut();
        if gathered.back().is_none_or(|last| last.round.commits.len() + count > ROUND_MAX) {
            gathered.push_back(self.spare.borrow_mut().pop().unwrap_or_default());
            self.filled.notify_one();
        }
        let last = gathered.back_mut().expect("there is one, or it was just added");
        last.round.commits.extend(commits);
        last.callers.push((count, answer));
        Ok(())
    }

    /// Hands on what has gathered and shares out what is answered, until the thread ends.
    async fn hand_on(&self) {
        let mut in_flight = VecDeque::new();
        loop {
            tokio::select! {
                biased;
                round = first_round(&mut in_flight) => {
                    let first = in_flight.pop_front().expect("the first one was answered");
                    self.keep(first.share_out(round));
                }
                () = self.filled.notified(), if in_flight.len() < IN_FLIGHT_MAX => {
                    // Those whose requests were read in the same turn come along.
                    yield_now().await;
                    self.hand_on_all(&mut in_flight);
                }
            }
            if self.ended.get() && in_flight.is_empty() && self.gathered.borrow().is_empty() {
                return;
            }
        }
    }

    fn hand_on_all(&self, in_flight: &mut VecDeque<InFlight>) {
        self.waiting.set(0);
        for Gathered { round, callers } in self.gathered.take() {
            let (to, answered) = oneshot::channel();
            match send(&self.jobs, Job::Commit { round, asker: Asker::Thread(to) }) {
                Ok(()) => in_flight.push_back(InFlight { callers, answered }),
                Err(error) => refuse(callers, &error),
            }
        }
    }

    fn keep(&self, spare: Option<Gathered>) {
        let mut all = self.spare.borrow_mut();
        if all.len() < IN_FLIGHT_MAX {
            all.extend(spare);
        }
    }
}

/// A round that the writer has.
struct InFlight {
    callers: Callers,
    answered: oneshot::Receiver<Round>,
}

impl InFlight {
    /// What is left has room for another round. `None`: the writer has ended without an answer, and leaves the callers
    /// without one too.
    fn share_out(mut self, round: Option<Round>) -> Option<Gathered> {
        let mut round = round?;
        // The writer has taken them; what it left would be handed in once more.
        round.commits.clear();
        let mut answers = round.answers.drain(..);
        for (count, caller) in self.callers.drain(..) {
            // As in `Asker::answer`.
            let _ = caller.send(answers.by_ref().take(count).collect());
        }
        drop(answers);
        Some(Gathered { round, callers: self.callers })
    }
}

/// Waits as long as there is none in flight.
async fn first_round(in_flight: &mut VecDeque<InFlight>) -> Option<Round> {
    match in_flight.front_mut() {
        Some(first) => (&mut first.answered).await.ok(),
        None => pending().await,
    }
}

fn refuse(callers: Callers, error: &StoreError) {
    for (count, caller) in callers {
        let _ = caller.send(vec![Err(error.clone()); count]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Committed, Revision};

    /// Tells commits apart: the writer of these tests answers with it.
    fn commits(ns: &[u64]) -> Vec<Commit> {
        let reply = |n: &u64| crate::store::Reply {
            idempotency: crate::domain::ids::Idempotency {
                key: crate::domain::ids::KeyHash([0; 16]),
                request: crate::domain::ids::RequestHash([0; 16]),
            },
            bytes: n.to_be_bytes().to_vec(),
            at: crate::domain::time::Timestamp::from_ms(0),
        };
        ns.iter().map(|n| Commit { change: None, reply: Some(reply(n)) }).collect()
    }

    fn number(commit: &Commit) -> u64 {
        let bytes = &commit.reply.as_ref().unwrap().bytes;
        u64::from_be_bytes(bytes.as_slice().try_into().unwrap())
    }

    fn done(n: u64) -> Result<Committed, StoreError> {
        Ok(Committed::Done(Revision(n)))
    }

    fn written(ns: &[u64]) -> Round {
        Round { commits: Vec::new(), answers: ns.iter().copied().map(done).collect() }
    }

    /// Each caller gets the answer to its one commit.
    async fn are_done(
        callers: impl IntoIterator<Item = oneshot::Receiver<Answers>>,
        ns: impl IntoIterator<Item = u64>,
    ) {
        for (answered, n) in callers.into_iter().zip(ns) {
            assert_eq!(answered.await.unwrap(), [done(n)]);
        }
    }

    struct Bed {
        sender: mpsc::Sender<Job>,
        jobs: mpsc::Receiver<Job>,
    }

    impl Bed {
        fn new(room: usize) -> Self {
            let (sender, jobs) = mpsc::channel(room);
            Self { sender, jobs }
        }

        fn gatherer(&self) -> Gatherer {
            Gatherer::new(self.sender.clone())
        }

        fn hand_in(&self, ns: &[u64]) -> oneshot::Receiver<Answers> {
            let (answer, answered) = oneshot::channel();
            hand_in(&self.sender, commits(ns), answer).unwrap();
            answered
        }

        /// Takes the next job and what it carries.
        async fn job(&mut self) -> (Vec<u64>, Asker) {
            let Some(Job::Commit { round, asker }) = self.jobs.recv().await else {
                panic!("no commits came");
            };
            (round.commits.iter().map(number).collect(), asker)
        }

        async fn write_one(&mut self) -> Vec<u64> {
            let (ns, asker) = self.job().await;
            asker.answer(written(&ns));
            ns
        }
    }

    #[tokio::test]
    async fn a_round_is_one_job_and_each_caller_gets_its_own_answers() {
        let mut bed = Bed::new(8);
        let gatherer = bed.gatherer();
        gatherer
            .around(async {
                let (one, two) = (bed.hand_in(&[1]), bed.hand_in(&[2, 3]));
                let three = bed.hand_in(&[4]);
                assert_eq!(bed.write_one().await, [1, 2, 3, 4]);
                assert_eq!(one.await.unwrap(), [done(1)]);
                assert_eq!(two.await.unwrap(), [done(2), done(3)]);
                assert_eq!(three.await.unwrap(), [done(4)]);
            })
            .await;
    }

    #[tokio::test]
    async fn the_writer_has_the_next_round_before_it_has_written_the_first() {
        let mut bed = Bed::new(8);
        let gatherer = bed.gatherer();
        gatherer
            .around(async {
                let first = bed.hand_in(&[1]);
                let (ns, asker) = bed.job().await;
                let rest = [bed.hand_in(&[2]), bed.hand_in(&[3])];
                assert_eq!(bed.write_one().await, [2, 3]);
                asker.answer(written(&ns));
                assert_eq!(first.await.unwrap(), [done(1)]);
                are_done(rest, 2..).await;
            })
            .await;
    }

    #[tokio::test]
    async fn the_room_of_a_round_is_used_again() {
        const ROOM: usize = 1_000;
        let mut bed = Bed::new(8);
        let gatherer = bed.gatherer();
        gatherer
            .around(async {
                let one = bed.hand_in(&[1]);
                let Some(Job::Commit { mut round, asker }) = bed.jobs.recv().await else {
                    panic!()
                };
                round.commits.reserve(ROOM);
                round.answers.reserve(ROOM);
                round.answers.push(done(1));
                asker.answer(round);
                assert_eq!(one.await.unwrap(), [done(1)]);

                let two = bed.hand_in(&[2]);
                let Some(Job::Commit { round, asker }) = bed.jobs.recv().await else { panic!() };
                assert_eq!(round.commits.iter().map(number).collect::<Vec<_>>(), [2]);
                assert_eq!(round.answers, [], "what was answered is gone");
                assert!(round.commits.capacity() >= ROOM && round.answers.capacity() >= ROOM);
                asker.answer(written(&[2]));
                assert_eq!(two.await.unwrap(), [done(2)]);
            })
            .await;
    }

    #[tokio::test]
    async fn what_comes_while_enough_rounds_are_in_flight_is_one_round() {
        let mut bed = Bed::new(8);
        let gatherer = bed.gatherer();
        gatherer
            .around(async {
                let mut jobs = Vec::new();
                for n in 0..IN_FLIGHT_MAX as u64 {
                    drop(bed.hand_in(&[n]));
                    jobs.push(bed.job().await);
                }
                let rest = [bed.hand_in(&[10]), bed.hand_in(&[11])];
                yield_now().await;
                yield_now().await;
                assert!(bed.jobs.try_recv().is_err(), "no more are in flight");
                for (ns, asker) in jobs {
                    asker.answer(written(&ns));
                }
                assert_eq!(bed.write_one().await, [10, 11]);
                are_done(rest, 10..).await;
            })
            .await;
    }

    #[tokio::test]
    async fn a_round_is_no_larger_than_the_writer_takes_at_once() {
        let mut bed = Bed::new(8);
        let gatherer = bed.gatherer();
        gatherer
            .around(async {
                let ns: Vec<u64> = (0..2 * ROUND_MAX as u64 + 1).collect();
                let waiting: Vec<_> = ns.iter().map(|n| bed.hand_in(&[*n])).collect();
                for expected in ns.chunks(ROUND_MAX) {
                    assert_eq!(bed.write_one().await, expected);
                }
                are_done(waiting, ns).await;
            })
            .await;
    }

    #[tokio::test]
    async fn who_hangs_up_has_committed_all_the_same() {
        let mut bed = Bed::new(8);
        let gatherer = bed.gatherer();
        gatherer
            .around(async {
                drop(bed.hand_in(&[1]));
                let other = bed.hand_in(&[2]);
                assert_eq!(bed.write_one().await, [1, 2]);
                assert_eq!(other.await.unwrap(), [done(2)]);
            })
            .await;
    }

    #[tokio::test]
    async fn the_end_waits_for_what_has_gathered() {
        let mut bed = Bed::new(8);
        let (gatherer, sender) = (bed.gatherer(), bed.sender.clone());
        let serving = gatherer.around(async {
            let (answer, _hung_up) = oneshot::channel();
            hand_in(&sender, commits(&[1]), answer).unwrap();
        });
        let writing = async {
            let (ns, asker) = bed.job().await;
            assert_eq!(ns, [1]);
            // From here on the thread has ended, save for this.
            asker.answer(written(&ns));
        };
        tokio::join!(serving, writing);
        let _straight = bed.hand_in(&[2]);
        assert!(bed.jobs.try_recv().is_ok());
    }

    #[tokio::test]
    async fn a_writer_that_is_gone_leaves_no_caller_waiting() {
        let mut bed = Bed::new(8);
        let gatherer = bed.gatherer();
        gatherer
            .around(async {
                let in_flight = bed.hand_in(&[1]);
                let (_, asker) = bed.job().await;
                let gathered = bed.hand_in(&[2]);
                bed.jobs.close();
                drop(asker);
                assert!(in_flight.await.is_err());
                assert_eq!(gathered.await.unwrap(), [Err(StoreError::Unavailable)]);
            })
            .await;
    }

    #[tokio::test]
    async fn a_full_queue_and_a_full_thread_refuse_at_once() {
        let bed = Bed::new(1);
        let gatherer = bed.gatherer();
        gatherer
            .around(async {
                let (answer, _) = oneshot::channel();
                let asker = Asker::Caller(answer);
                bed.sender.try_send(Job::Commit { round: Round::default(), asker }).unwrap();
                let refused = bed.hand_in(&[1, 2]);
                let overloaded = || Err(StoreError::Overloaded);
                assert_eq!(refused.await.unwrap(), [overloaded(), overloaded()]);

                let ns: Vec<u64> = (0..WAITING_MAX as u64).collect();
                let all = bed.hand_in(&ns);
                let (answer, _) = oneshot::channel();
                let more = hand_in(&bed.sender, commits(&[0]), answer);
                assert_eq!(more, Err(StoreError::Overloaded));
                assert_eq!(all.await.unwrap().len(), WAITING_MAX);
            })
            .await;
    }

    #[tokio::test]
    async fn another_stores_commits_do_not_gather_here() {
        let (bed, mut other) = (Bed::new(8), Bed::new(8));
        let gatherer = bed.gatherer();
        gatherer
            .around(async {
                let _answered = other.hand_in(&[1]);
                assert!(other.jobs.try_recv().is_ok());
            })
            .await;
    }
}
