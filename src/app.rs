//! Use cases: load → transition → commit, again when somebody else was quicker.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    clock::Clock,
    domain::{
        Text,
        card::Card,
        deliveries::{DeliveryFilter, DeliveryId, DeliveryNo, Standing},
        event,
        ids::{Idempotency, PaymentId, StoreSecret},
        money::Money,
        payment::{Answer, Command, Metadata, Method, Payment, Refusal, Terms, Trace},
        scenario::{self, DrawKey, Outcome, Plan, Scenario},
        status::Status,
        time::Timestamp,
    },
    metrics::Metrics,
    store::{
        self, Answers, Change, Commit, Committed, DeliveryPage, DeliveryQuery, Draw, Found,
        ListQuery, Page, Reached, Remembered, Reply, Store, StoreError, Versioned,
    },
};

/// The provider of every payment until the simulation file names others.
pub const PROVIDER: &str = "sim";
/// How often a command is tried against a payment that others change at the same time.
const TRIES: usize = 16;
/// Dead deliveries ordered again in one commit: no more payments are in memory at a time.
const REDELIVERED_AT_A_TIME: usize = 100;
/// And in one call, so that it ends well before its deadline.
const REDELIVERED_MAX: usize = 1_000;

pub struct App {
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
    ids: IdMaker,
    settings: Settings,
}

#[derive(Clone, Debug)]
pub struct Settings {
    pub scenario: scenario::Settings,
    /// Whether changes are published as events (`EVENT_SINK` is not `none`).
    pub events: bool,
}

/// A create that has passed validation.
#[derive(Debug)]
pub struct NewPayment {
    pub reservation_id: Text,
    pub user_id: Text,
    pub amount: Money,
    pub vat: Option<u64>,
    pub method: Method,
    /// `None`: the default scenario.
    pub scenario: Option<Scenario>,
    pub webhook_url: Option<Text>,
    pub metadata: Option<Metadata>,
    pub echo: Option<String>,
    pub card: Option<Card>,
    pub trace: Trace,
}

/// An idempotency key: its text, which draws depend on, and what is compared.
#[derive(Clone, Debug)]
pub struct Key {
    pub text: String,
    pub idempotency: Idempotency,
}

#[derive(Debug, PartialEq, thiserror::Error)]
pub enum Error {
    #[error("there is no such payment")]
    NotFound,
    #[error("the payment belongs to another user")]
    NotYours,
    #[error("too many calls are held")]
    TooManyHeld,
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A create that is being committed.
struct Creating<'a> {
    terms: Arc<Terms>,
    committing: Pin<Box<dyn Future<Output = Answers> + Send + 'a>>,
}

/// How far a create has come before anything is waited for. The rarer one is boxed, so that the other need not
/// be as large.
enum Begun<'a, F> {
    Commits(Creating<'a>),
    WaitsForNumber(Pin<Box<F>>),
}

/// What was agreed for a created payment; `replayed` when its key was known.
#[derive(Debug)]
pub struct Created {
    pub terms: Arc<Terms>,
    pub replayed: bool,
}

#[derive(Debug)]
pub enum Executed {
    Done {
        payment: Box<Payment>,
        answer: Answer,
    },
    /// The first reply under this key.
    Replayed(Vec<u8>),
    /// Not to be answered.
    Held,
}

/// What an order for dead deliveries came to.
#[derive(Debug)]
pub struct Redelivered {
    pub ordered: usize,
    /// There may be more dead ones beyond this.
    pub more_beyond: Option<Reached>,
}

/// Who asked for a command, as far as it matters here.
#[derive(Clone, Copy)]
pub struct Caller<'a> {
    pub key: Option<&'a Key>,
    /// Renders the reply to be stored with a keyed request.
    pub render: &'a (dyn Fn(&Payment, &Answer) -> Vec<u8> + Send + Sync),
    /// Finds the call a place to be held in. Asked before anything is stored: a call that is refused
    /// has changed nothing.
    pub hold: &'a (dyn Fn() -> bool + Send + Sync),
}

impl App {
    pub fn new(
        store: Arc<dyn Store>,
        clock: Arc<dyn Clock>,
        metrics: Arc<Metrics>,
        settings: Settings,
    ) -> Self {
        let ids = IdMaker::after(store.newest());
        Self { store, clock, metrics, ids, settings }
    }

    pub fn secret(&self) -> &StoreSecret {
        self.store.secret()
    }

    pub fn now(&self) -> Timestamp {
        Timestamp::from_ms(self.clock.now_ms())
    }

    /// What a key is known for. A request whose key is known needs no further look.
    pub async fn remembered(&self, key: &Key) -> Result<Option<Remembered>, Error> {
        let known = self.store.remembered(key.idempotency.key, self.now()).await?;
        match known {
            Some(known) if known.request() != key.idempotency.request => {
                Err(StoreError::KeyConflict.into())
            }
            Some(known) => {
                self.metrics.idempotency_hit();
                Ok(Some(known))
            }
            None => Ok(None),
        }
    }

    /// A create whose key is known: the payment that it made.
    pub async fn recall(&self, known: Remembered) -> Result<Created, Error> {
        match known {
            Remembered::Created { id, .. } => {
                let stored = self.store.get(id).await?.ok_or(Error::NotFound)?;
                Ok(Created { terms: Arc::clone(&stored.payment.terms), replayed: true })
            }
            Remembered::Replied { .. } => {
                Err(StoreError::Corrupt("a create's key holds a reply".to_owned()).into())
            }
        }
    }

    /// A known key is answered by the commit: nothing of the request is looked at before. The future keeps
    /// of it no more than its reply needs.
    pub fn create(
        &self,
        new: NewPayment,
        key: Option<Key>,
        now: Timestamp,
    ) -> impl Future<Output = Result<Created, Error>> + Send {
        let scenario = new.scenario.unwrap_or(self.settings.scenario.default_scenario);
        let begun = if key.is_none() && scenario.draws() {
            Begun::WaitsForNumber(Box::pin(self.create_numbered(new, scenario, now)))
        } else {
            Begun::Commits(self.begin(new, scenario, key, None, now))
        };
        async {
            match begun {
                Begun::Commits(creating) => self.end(creating).await,
                Begun::WaitsForNumber(created) => created.await,
            }
        }
    }

    /// Draws by the reservation's next number.
    async fn create_numbered(
        &self,
        new: NewPayment,
        scenario: Scenario,
        now: Timestamp,
    ) -> Result<Created, Error> {
        let draw = self.store.draw_number(&new.reservation_id).await?;
        self.end(self.begin(new, scenario, None, Some(draw), now)).await
    }

    fn begin(
        &self,
        new: NewPayment,
        scenario: Scenario,
        key: Option<Key>,
        draw: Option<Draw>,
        now: Timestamp,
    ) -> Creating<'_> {
        let draw_key = match (&key, &draw) {
            (Some(key), _) => DrawKey::Idempotency(&key.text),
            (None, draw) => {
                DrawKey::Reservation(&new.reservation_id, draw.as_ref().map_or(0, |draw| draw.n))
            }
        };
        let plan = Plan::draw(scenario, &self.settings.scenario, &draw_key, now);
        let idempotency = key.map(|key| key.idempotency);
        let terms = Arc::new(self.terms(new, plan, idempotency, now));
        let change = Some(Change::Create { terms: Arc::clone(&terms), draw });
        let committing = self.store.commit(vec![Commit { change, reply: None }]);
        Creating { terms, committing }
    }

    async fn end(&self, Creating { terms, committing }: Creating<'_>) -> Result<Created, Error> {
        match committing.await.pop().expect("one answer a commit")? {
            Committed::Done(_) => {
                self.metrics.payment_created(terms.plan.scenario.as_str());
                if let Some(outcome) = terms.plan.decided_at_once() {
                    count_decision(&self.metrics, outcome, &terms.provider);
                }
                Ok(Created { terms, replayed: false })
            }
            Committed::Replayed(known) => {
                self.metrics.idempotency_hit();
                self.recall(known).await
            }
        }
    }

    fn terms(
        &self,
        new: NewPayment,
        plan: Plan,
        idempotency: Option<Idempotency>,
        now: Timestamp,
    ) -> Terms {
        Terms {
            id: self.ids.make(now),
            reservation_id: new.reservation_id,
            user_id: new.user_id,
            amount: new.amount,
            vat: new.vat,
            method: new.method,
            plan,
            provider: Text::const_new(PROVIDER),
            webhook_url: new.webhook_url,
            events: self.settings.events,
            metadata: new.metadata,
            echo: new.echo,
            card: new.card,
            created_at: now,
            trace: new.trace,
            idempotency,
            renderer: event::RENDERER,
        }
    }

    /// `user_id`, when given, must be the payment's.
    pub async fn get(&self, id: PaymentId, user_id: Option<&str>) -> Result<Payment, Error> {
        let stored = self.store.get(id).await?.ok_or(Error::NotFound)?;
        if user_id.is_some_and(|user| user != stored.payment.terms.user_id) {
            return Err(Error::NotYours);
        }
        Ok(Arc::unwrap_or_clone(stored).payment)
    }

    pub async fn list(&self, query: ListQuery) -> Result<Page, Error> {
        Ok(self.store.list(query).await?)
    }

    pub async fn deliveries(&self, query: DeliveryQuery) -> Result<DeliveryPage, Error> {
        Ok(self.store.deliveries(query).await?)
    }

    /// Owes a delivery that is over once more.
    pub async fn redeliver(&self, id: DeliveryId) -> Result<(), Error> {
        // Such a call has no key and is never held.
        let caller = Caller { key: None, render: &|_, _| Vec::new(), hold: &|| false };
        self.execute(id.payment, Command::Redeliver(id.no), caller).await.map(|_| ())
    }

    /// Owes once more what is dead of a filter.
    pub async fn redeliver_dead(
        &self,
        filter: DeliveryFilter,
        beyond: Option<Reached>,
    ) -> Result<Redelivered, Error> {
        let filter = DeliveryFilter { standing: Some(Standing::Dead), ..filter };
        let mut done = Redelivered { ordered: 0, more_beyond: beyond };
        for _ in 0..REDELIVERED_MAX / REDELIVERED_AT_A_TIME {
            let (filter, limit) = (filter.clone(), REDELIVERED_AT_A_TIME);
            let query = DeliveryQuery { filter, beyond: done.more_beyond, limit };
            let page = self.store.deliveries(query).await?;
            done.ordered += self.order(page.found).await?;
            done.more_beyond = page.more_beyond;
            if done.more_beyond.is_none() {
                break;
            }
        }
        Ok(done)
    }

    /// All of them in one commit, those whose payment changed meanwhile in the next.
    async fn order(&self, found: Vec<Found>) -> Result<usize, Error> {
        let mut left: BTreeMap<PaymentId, Vec<DeliveryNo>> = BTreeMap::new();
        for Found { payment, no } in found {
            left.entry(payment.terms.id).or_default().push(no);
        }
        let mut ordered = 0;
        for _ in 0..TRIES {
            if left.is_empty() {
                return Ok(ordered);
            }
            ordered += self.try_order(&mut left).await?;
        }
        Err(StoreError::Overloaded.into())
    }

    /// What is ordered, or dead no more, leaves `left`.
    async fn try_order(
        &self,
        left: &mut BTreeMap<PaymentId, Vec<DeliveryNo>>,
    ) -> Result<usize, Error> {
        let now = self.now();
        let (mut commits, mut tried) = (Vec::new(), Vec::new());
        for (id, wanted) in std::mem::take(left) {
            // Dropped by retention meanwhile: there is nothing to send any more.
            let Some(before) = self.store.get(id).await? else { continue };
            let step = before.payment.transition(Command::RedeliverDead(wanted.clone()), now);
            if let (Some(after), Ok(Answer::Redelivered { ordered })) = (step.changed, step.answer)
            {
                tried.push((id, wanted, ordered as usize, before.payment.clone(), after.clone()));
                let change = Some(Change::update(before, after));
                commits.push(Commit { change, reply: None });
            }
        }
        let mut done = 0;
        for ((id, wanted, ordered, before, after), answer) in
            tried.into_iter().zip(self.store.commit(commits).await)
        {
            match answer {
                Ok(_) => {
                    self.count_outcome(Some(&before), &after);
                    done += ordered;
                }
                Err(StoreError::Conflict) => drop(left.insert(id, wanted)),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(done)
    }

    /// Runs a command against a payment. The reply to a keyed request is stored in the same commit.
    pub async fn execute(
        &self,
        id: PaymentId,
        command: Command,
        caller: Caller<'_>,
    ) -> Result<Executed, Error> {
        for _ in 0..TRIES {
            let before = self.store.get(id).await?.ok_or(Error::NotFound)?;
            match self.attempt(&before, &command, caller).await {
                Err(Error::Store(StoreError::Conflict)) => {}
                done => return done,
            }
        }
        Err(StoreError::Overloaded.into())
    }

    async fn attempt(
        &self,
        before: &Arc<Versioned>,
        command: &Command,
        caller: Caller<'_>,
    ) -> Result<Executed, Error> {
        let (now, key) = (self.now(), caller.key);
        let step = before.payment.transition(command.clone(), now);
        if step.answer.is_err()
            && let Some(key) = key
            && let Some(Remembered::Replied { bytes, .. }) = self.remembered(key).await?
        {
            // The first call under this key came through since it was looked up: what refuses this one
            // is what that one did.
            return Ok(Executed::Replayed(bytes));
        }
        if step.answer == Ok(Answer::Held) && !(caller.hold)() {
            return Err(Error::TooManyHeld);
        }
        let after = step.changed.as_ref().unwrap_or(&before.payment);
        let reply = match (&step.answer, key) {
            // A held call stores no reply, ever.
            (Ok(Answer::Held) | Err(_), _) | (_, None) => None,
            (Ok(answer), Some(key)) => {
                let bytes = (caller.render)(after, answer);
                Some(Reply { idempotency: key.idempotency, bytes, at: now })
            }
        };
        let after = after.clone();
        let change = step.changed.map(|after| Change::update(Arc::clone(before), after));
        if change.is_some() || reply.is_some() {
            match store::commit_one(&*self.store, Commit { change, reply }).await? {
                Committed::Done(_) => self.count_outcome(Some(&before.payment), &after),
                Committed::Replayed(Remembered::Replied { bytes, .. }) => {
                    self.metrics.idempotency_hit();
                    return Ok(Executed::Replayed(bytes));
                }
                Committed::Replayed(Remembered::Created { .. }) => {
                    let why = "a command's key holds a create".to_owned();
                    return Err(StoreError::Corrupt(why).into());
                }
            }
        }
        match step.answer? {
            Answer::Held => Ok(Executed::Held),
            answer => Ok(Executed::Done { payment: Box::new(after), answer }),
        }
    }

    fn count_outcome(&self, before: Option<&Payment>, after: &Payment) {
        count_outcome(&self.metrics, before, after);
    }
}

/// Counts what a commit has brought about: a decision, an end without one, a refund of the whole. One
/// commit may bring two of them, where a command found a decision due.
pub fn count_outcome(metrics: &Metrics, before: Option<&Payment>, after: &Payment) {
    let provider = &after.terms.provider;
    let decision = |payment: &Payment| payment.progress.state.decision();
    match decision(after) {
        Some((outcome, _)) if before.and_then(decision).is_none() => {
            count_decision(metrics, outcome, provider);
        }
        Some(_) | None => {}
    }
    if before.is_some_and(|before| before.status() == after.status()) {
        return;
    }
    match after.status() {
        Status::Cancelled | Status::Expired | Status::Refunded => {
            metrics.payment_outcome(after.status().short(), "", provider);
        }
        Status::Pending | Status::Processing | Status::Completed | Status::Failed => {}
    }
}

fn count_decision(metrics: &Metrics, outcome: Outcome, provider: &str) {
    let (status, reason) = match outcome {
        Outcome::Completed => (Status::Completed, ""),
        Outcome::Failed(reason) => (Status::Failed, reason.as_str()),
    };
    metrics.payment_outcome(status.short(), reason, provider);
}

/// Makes ids that rise within this process and past what the store held at start, whatever the clock
/// does: lists and scans go by them.
struct IdMaker(Mutex<(i64, u128)>);

impl IdMaker {
    fn after(newest: Option<PaymentId>) -> Self {
        let last_ms = newest.map_or(0, |id| id.made_at().ms());
        Self(Mutex::new((last_ms, random_start())))
    }

    fn make(&self, now: Timestamp) -> PaymentId {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *last = match *last {
            (ms, _) if now.ms() > ms => (now.ms(), random_start()),
            (ms, unique) => (ms, unique + 1),
        };
        PaymentId::from_parts(Timestamp::from_ms(last.0), last.1)
    }
}

/// 79 random bits: what is left of 80 is room to count on within the millisecond.
fn random_start() -> u128 {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes[6..]).expect("the system gives randomness, or nothing here is safe");
    bytes[6] &= 0x7f;
    u128::from_be_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{clock::ManualClock, domain::money::Currency};

    const DAY: Duration = Duration::from_secs(86_400);

    #[test]
    fn ids_rise_even_when_the_clock_falls() {
        let ids = IdMaker::after(None);
        let first = ids.make(Timestamp::from_ms(2_000));
        let second = ids.make(Timestamp::from_ms(1_000));
        let third = ids.make(Timestamp::from_ms(2_001));
        assert!(first < second && second < third);
        let later = IdMaker::after(Some(third)).make(Timestamp::from_ms(5));
        assert!(later.made_at() == third.made_at());
    }

    #[tokio::test]
    async fn a_call_that_finds_no_place_to_be_held_in_changes_nothing() {
        let clock: Arc<dyn Clock> = Arc::new(ManualClock::at_ms(1_767_225_600_000));
        let options = store::Options {
            retention: store::Retention { payments: DAY, idempotency: DAY, payments_max: None },
            clock: Arc::clone(&clock),
            on_commit: Arc::new(|_, _| {}),
            on_dropped_early: Arc::new(|_| {}),
        };
        let store = store::open(&store::Location::Memory, options).unwrap();
        let settings = Settings {
            scenario: scenario::Settings {
                default_scenario: Scenario::Timeout,
                default_delay: Duration::from_secs(2),
                timeout_settle: Duration::from_secs(30),
                manual_ttl: Duration::from_secs(20),
                random_approval_rate: 0.8,
                seed: 0,
            },
            events: true,
        };
        let app = App::new(store, clock, Arc::new(Metrics::new()), settings);
        let id = app.create(new_payment(), None, app.now()).await.unwrap().terms.id;
        let payment = app.get(id, None).await.unwrap();
        let process = |hold| {
            let command = Command::Process { card: None, vat: None };
            let caller = Caller { key: None, render: &|_, _| Vec::new(), hold };
            app.execute(payment.terms.id, command, caller)
        };
        assert_eq!(process(&|| false).await.unwrap_err(), Error::TooManyHeld);
        assert_eq!(app.get(payment.terms.id, None).await.unwrap(), payment);
        assert!(matches!(process(&|| true).await, Ok(Executed::Held)));
        let held = app.get(payment.terms.id, None).await.unwrap();
        assert_eq!(held.status(), Status::Processing);
        assert_eq!(process(&|| false).await.unwrap_err(), Error::TooManyHeld);
    }

    fn new_payment() -> NewPayment {
        NewPayment {
            reservation_id: "res".into(),
            user_id: "user".into(),
            amount: Money { amount: 1_000, currency: Currency::parse("KRW").unwrap() },
            vat: None,
            method: Method::CreditCard,
            scenario: None,
            webhook_url: None,
            metadata: None,
            echo: None,
            card: None,
            trace: Trace::default(),
        }
    }
}
