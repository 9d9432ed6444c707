//! `payment.v1.PaymentService`: each call is checked whole, run, and answered.

use std::sync::{Arc, OnceLock};

use prost::Message;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{
    convert::{self, WebhookUrls},
    cursor::{self, Filters},
    error::{Failure, Reason},
    pb::{common::v1 as common, payment::v1 as pb},
    unary::{Answered, Call, Calls, Reply},
};
use crate::{
    app::{self, App, Caller, Executed, Key, NewPayment},
    domain::{
        ids::PaymentId,
        payment::{Answer, Command, Payment, Refusal},
        time::Timestamp,
        validation::{Violation, Violations},
    },
    slot::Slot,
    store::{Direction, ListQuery, Remembered, StoreError, Versioned},
};

/// Calls that are held at a time. They keep no place among the requests in flight, so they have a
/// limit of their own.
const HELD_MAX: usize = 10_000;
const PAGE_SIZE: u32 = 20;
const PAGE_SIZE_MAX: u32 = 100;
/// `page` × `page_size`: to get further, follow the cursor.
const PAGED_MAX: u32 = 10_000;
/// A page ends before its reply is larger than this: half of what a reply may be.
pub const PAGE_BYTES: usize = 512 << 10;

/// The service, to be cloned into every connection.
#[derive(Clone)]
pub struct Payments(Arc<Inner>);

struct Inner {
    app: Arc<App>,
    public_url: Option<String>,
    urls: WebhookUrls,
    held: Arc<Semaphore>,
    /// Held calls end with it.
    drain: CancellationToken,
}

impl Payments {
    pub fn new(app: Arc<App>, public_url: Option<String>, drain: CancellationToken) -> Self {
        let held = Arc::new(Semaphore::new(HELD_MAX));
        Self(Arc::new(Inner { app, public_url, urls: WebhookUrls::default(), held, drain }))
    }

    fn app(&self) -> &App {
        &self.0.app
    }

    fn created(&self, created: &app::Created) -> Reply<pb::CreatePaymentIntentResponse> {
        let public_url = self.0.public_url.as_deref();
        let message = convert::created(&created.terms, self.app().secret(), public_url);
        Reply { message, replayed: created.replayed }
    }

    /// Runs a command that may have a key: a known key is answered before anything else is looked at.
    async fn run<R: Message + Default>(
        &self,
        id: PaymentId,
        command: Command,
        key: Option<&Key>,
        slot: Option<Slot>,
        reply: impl Fn(&Payment, &Answer) -> R + Send + Sync,
    ) -> Answered<R> {
        let place = OnceLock::new();
        let hold = || {
            let free = || Arc::clone(&self.0.held).try_acquire_owned();
            place.get().is_some() || free().is_ok_and(|free| place.set(free).is_ok())
        };
        let render = |payment: &Payment, answer: &Answer| reply(payment, answer).encode_to_vec();
        let caller = Caller { key, render: &render, hold: &hold };
        match self.app().execute(id, command, caller).await.map_err(failure)? {
            Executed::Done { payment, answer } => Ok(Reply::new(reply(&payment, &answer))),
            Executed::Replayed(bytes) => replayed(&bytes),
            Executed::Held => Err(self.hold(slot).await),
        }
    }

    /// Reads a create whole, so that nothing of its request is kept while it is committed.
    fn read_create(
        &self,
        call: Call<pb::CreatePaymentIntentRequest>,
        now: Timestamp,
    ) -> (Option<Key>, Result<NewPayment, Vec<Violation>>) {
        let Call { head, mut message } = call;
        let secret = self.app().secret();
        let mut found = Violations::default();
        let key = convert::key(&head.headers, &mut message, secret, &mut found);
        (key, convert::new_payment(message, now, secret, &self.0.urls, head.trace, found))
    }

    /// The payment of a create whose key is known.
    async fn recall(&self, key: Option<&Key>) -> Result<Option<app::Created>, Status> {
        let Some(key) = key else { return Ok(None) };
        match self.app().remembered(key).await.map_err(failure)? {
            Some(known) => Ok(Some(self.app().recall(known).await.map_err(failure)?)),
            None => Ok(None),
        }
    }

    /// The stored reply of a key that is known.
    async fn known<R: Message + Default>(
        &self,
        key: Option<&Key>,
    ) -> Result<Option<Reply<R>>, Status> {
        let Some(key) = key else { return Ok(None) };
        match self.app().remembered(key).await.map_err(failure)? {
            Some(Remembered::Replied { bytes, .. }) => replayed(&bytes).map(Some),
            Some(Remembered::Created { .. }) => {
                Err(Failure::internal("a command's key holds a create").into())
            }
            None => Ok(None),
        }
    }

    /// Never answers: the caller's deadline ends it, or the server's, or the drain.
    async fn hold(&self, slot: Option<Slot>) -> Status {
        if let Some(slot) = slot {
            slot.release();
        }
        self.0.drain.cancelled().await;
        Failure::new(Reason::Draining, "the server is going down; try again").into()
    }
}

impl Calls for Payments {
    fn create_payment_intent(
        &self,
        call: Call<pb::CreatePaymentIntentRequest>,
    ) -> impl Future<Output = Answered<pb::CreatePaymentIntentResponse>> + Send {
        let now = self.app().now();
        let (key, new) = self.read_create(call, now);
        let creating = match new {
            Ok(new) => Ok(self.app().create(new, key, now)),
            Err(bad) => Err((key, bad)),
        };
        async {
            let created = match creating {
                Ok(creating) => creating.await.map_err(failure)?,
                // What was valid once may be so no more (a card expires): its key is answered all the same.
                Err((key, bad)) => match self.recall(key.as_ref()).await? {
                    Some(created) => created,
                    None => return Err(Failure::invalid(bad).into()),
                },
            };
            Ok(self.created(&created))
        }
    }

    async fn get_payment_intent(
        &self,
        call: Call<pb::GetPaymentIntentRequest>,
    ) -> Answered<pb::GetPaymentIntentResponse> {
        let message = call.message;
        let payment = self.look_up(&message.payment_intent_id, message.user_id).await?;
        Ok(Reply::new(pb::GetPaymentIntentResponse {
            deliveries: convert::deliveries(&payment),
            payment: Some(convert::payment(&payment)),
        }))
    }

    async fn get_payment_status(
        &self,
        call: Call<pb::GetPaymentStatusRequest>,
    ) -> Answered<pb::GetPaymentStatusResponse> {
        let message = call.message;
        let payment = self.look_up(&message.payment_intent_id, message.user_id).await?;
        let payment = Some(convert::payment(&payment));
        Ok(Reply::new(pb::GetPaymentStatusResponse { payment, error: None }))
    }

    async fn process_payment(
        &self,
        call: Call<pb::ProcessPaymentRequest>,
    ) -> Answered<pb::ProcessPaymentResponse> {
        let Call { head, mut message } = call;
        let secret = self.app().secret();
        let mut found = Violations::default();
        let key = convert::key(&head.headers, &mut message, secret, &mut found);
        if let Some(reply) = self.known(key.as_ref()).await? {
            return Ok(reply);
        }
        let id = convert::payment_id(&message.payment_intent_id, &mut found);
        let now = self.app().now();
        let details = convert::details(message.payment_details.as_ref(), now, secret, &mut found);
        let id = checked(id, found)?;
        let vat = self.process_vat(id, &details).await?;
        let command = Command::Process { card: details.card, vat };
        self.run(id, command, key.as_ref(), head.slot, |payment, _| convert::processed(payment))
            .await
    }

    async fn cancel_payment(
        &self,
        call: Call<pb::CancelPaymentRequest>,
    ) -> Answered<pb::CancelPaymentResponse> {
        let Call { head, mut message } = call;
        let mut found = Violations::default();
        let secret = self.app().secret();
        let key = convert::key(&head.headers, &mut message, secret, &mut found);
        if let Some(reply) = self.known(key.as_ref()).await? {
            return Ok(reply);
        }
        let id = convert::payment_id(&message.payment_intent_id, &mut found);
        let cancel = convert::cancel(&message, &mut found);
        let id = checked(id, found)?;
        let reply = |payment: &Payment, answer: &Answer| match *answer {
            Answer::Refunded { n, at } => convert::cancelled(payment, at, Some(n)),
            Answer::Cancelled { at } | Answer::Simulated { at, .. } => {
                convert::cancelled(payment, at, None)
            }
            Answer::Woken | Answer::Decided | Answer::Held | Answer::Redelivered { .. } => {
                convert::cancelled(payment, payment.progress.updated_at, None)
            }
        };
        self.run(id, Command::Cancel(cancel), key.as_ref(), head.slot, reply).await
    }

    async fn list_payments(
        &self,
        call: Call<pb::ListPaymentsRequest>,
    ) -> Answered<pb::ListPaymentsResponse> {
        let asked = Listing::read(call.message).map_err(Failure::invalid)?;
        let page = self.app().list(asked.query.clone()).await.map_err(failure)?;
        Ok(Reply::new(asked.reply(page)))
    }

    async fn simulate_webhook(
        &self,
        call: Call<pb::SimulateWebhookRequest>,
    ) -> Answered<pb::SimulateWebhookResponse> {
        let message = call.message;
        let mut found = Violations::default();
        let id = convert::payment_id(&message.payment_intent_id, &mut found);
        let target = convert::status_filter("target_status", message.target_status, &mut found);
        let delay_s = u64::try_from(message.delay_seconds)
            .ok()
            .filter(|_| message.delay_seconds <= convert::SIMULATED_DELAY_MAX_S);
        if delay_s.is_none() {
            let allowed = format!("must be 0 to {}", convert::SIMULATED_DELAY_MAX_S);
            found.add("delay_seconds", allowed);
        }
        let id = checked(id, found)?;
        let delay_s = if message.force_trigger { 0 } else { delay_s.unwrap_or(0) };
        let at = self.app().now().plus_ms(delay_s * 1_000);
        let command = Command::SimulateWebhook { target, at };
        let reply = |payment: &Payment, answer: &Answer| {
            let n = match *answer {
                Answer::Simulated { n, .. } => n,
                Answer::Woken
                | Answer::Decided
                | Answer::Held
                | Answer::Cancelled { .. }
                | Answer::Refunded { .. }
                | Answer::Redelivered { .. } => payment.progress.notified,
            };
            pb::SimulateWebhookResponse {
                webhook_sent: true,
                webhook_id: payment.terms.id.event(n),
                scheduled_at: Some(convert::wire_time(at)),
                error: None,
            }
        };
        self.run(id, command, None, None, reply).await
    }
}

impl Payments {
    async fn look_up(&self, id: &str, user_id: String) -> Result<Payment, Status> {
        let mut found = Violations::default();
        let id = convert::payment_id(id, &mut found);
        let user_id = convert::optional_name("user_id", user_id, &mut found);
        let id = checked(id, found)?;
        self.app().get(id, user_id.as_deref()).await.map_err(|error| failure(error).into())
    }

    /// VAT that ProcessPayment brings is part of the payment's amount.
    async fn process_vat(
        &self,
        id: PaymentId,
        details: &convert::Details,
    ) -> Result<Option<u64>, Status> {
        if details.vat.is_none() {
            return Ok(None);
        }
        let payment = self.app().get(id, None).await.map_err(failure)?;
        let mut found = Violations::default();
        let path = "payment_details.credit_card.vat";
        let vat = convert::vat(path, details, Some(payment.terms.amount), &mut found);
        found.into_result().map_err(Failure::invalid)?;
        Ok(vat)
    }
}

fn checked<T>(value: Option<T>, found: Violations) -> Result<T, Failure> {
    match (value, found.into_result()) {
        (Some(value), Ok(())) => Ok(value),
        (_, Err(bad)) => Err(Failure::invalid(bad)),
        (None, Ok(())) => Err(Failure::internal("a missing value left no violation")),
    }
}

fn replayed<R: Message + Default>(bytes: &[u8]) -> Answered<R> {
    let message = R::decode(bytes).map_err(Failure::internal)?;
    Ok(Reply { message, replayed: true })
}

/// Every error of the app, as callers see it.
pub fn failure(error: app::Error) -> Failure {
    let text = error.to_string();
    match error {
        app::Error::NotFound => Failure::new(Reason::PaymentNotFound, text),
        app::Error::NotYours => Failure::new(Reason::NotYours, text),
        app::Error::TooManyHeld => Failure::new(Reason::Overloaded, text),
        app::Error::Refused(refusal) => match refusal {
            Refusal::InvalidState { status, .. } => {
                Failure::new(Reason::InvalidState, text).with("status", status.as_str())
            }
            Refusal::NoWebhookUrl => Failure::new(Reason::NoWebhookUrl, text),
            Refusal::RefundExceedsRemaining { left, .. } => {
                let failure = Failure::new(Reason::RefundExceedsRemaining, text);
                failure.with("remaining_amount", left.to_string())
            }
            Refusal::Invalid(bad) => Failure::invalid(bad),
        },
        app::Error::Store(error) => match error {
            StoreError::KeyConflict => Failure::new(Reason::IdempotencyConflict, text),
            StoreError::Full => Failure::new(Reason::StoreFull, text),
            StoreError::Overloaded | StoreError::Conflict => Failure::new(Reason::Overloaded, text),
            StoreError::Unavailable => Failure::new(Reason::StoreUnavailable, text),
            StoreError::Corrupt(what) => Failure::internal(what),
        },
    }
}

/// A list as it was asked for.
struct Listing {
    query: ListQuery,
    filters: Filters,
    page: u32,
    cursor: Option<Cursor>,
}

/// Where a page ends, and which list it belongs to.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Cursor {
    filters: Filters,
    beyond: PaymentId,
    newer: bool,
    counted: u32,
}

impl Listing {
    fn read(message: pb::ListPaymentsRequest) -> Result<Self, Vec<Violation>> {
        let mut found = Violations::default();
        let filters = filters(&message);
        let pagination = message.pagination.unwrap_or_default();
        let size = page_size("pagination.page_size", pagination.page_size, &mut found);
        let page = page_number(&pagination, size, &mut found);
        let cursor =
            (!pagination.cursor.is_empty()).then(|| cursor::read::<Cursor>(&pagination.cursor));
        match &cursor {
            Some(Some(cursor)) if cursor.filters == filters => {}
            Some(Some(_)) => found.add("pagination.cursor", "belongs to a list with other filters"),
            Some(None) => found.add("pagination.cursor", "is no cursor of ours"),
            None => {}
        }
        let cursor = cursor.flatten();
        let query = ListQuery {
            user: convert::optional_name("user_id", message.user_id, &mut found),
            reservation: convert::optional_name(
                "reservation_id",
                message.reservation_id,
                &mut found,
            ),
            status: convert::status_filter("status", message.status, &mut found),
            created_from: convert::moment("created_from", message.created_from, &mut found),
            created_to: convert::moment("created_to", message.created_to, &mut found),
            beyond: cursor.as_ref().map(|cursor| cursor.beyond),
            direction: match &cursor {
                Some(Cursor { newer: true, .. }) => Direction::Newer,
                Some(_) | None => Direction::Older,
            },
            skip: if cursor.is_some() { 0 } else { ((page - 1) * size) as usize },
            limit: size as usize,
        };
        found.into_result()?;
        Ok(Self { query, filters, page, cursor })
    }

    fn reply(&self, page: crate::store::Page) -> pb::ListPaymentsResponse {
        let newer = self.query.direction == Direction::Newer;
        let counted = self.cursor.as_ref().map_or(page.counted, |cursor| cursor.counted);
        let (payments, cut_at) = fit(page.payments, newer);
        let cursor = |beyond, newer| {
            cursor::write(&Cursor { filters: self.filters, beyond, newer, counted })
        };
        let first = payments.first().map(|stored| stored.payment.terms.id);
        let last = payments.last().map(|stored| stored.payment.terms.id);
        let more = cut_at.or(page.more_beyond);
        let (next, previous) = match (newer, &self.cursor) {
            (false, None) if self.page == 1 => (more, None),
            (false, _) => (more, first),
            (true, _) => (last.or(self.query.beyond), more),
        };
        let page_info = common::PageInfo {
            total_count: i32::try_from(counted).unwrap_or(i32::MAX),
            has_next_page: next.is_some(),
            has_previous_page: previous.is_some(),
            next_cursor: next.map(|id| cursor(id, false)).unwrap_or_default(),
            previous_cursor: previous.map(|id| cursor(id, true)).unwrap_or_default(),
        };
        pb::ListPaymentsResponse {
            payments: payments.iter().map(|stored| listed(stored)).collect(),
            page_info: Some(page_info),
            error: None,
        }
    }
}

/// Payments in a list carry no timeline.
fn listed(stored: &Versioned) -> pb::Payment {
    pb::Payment { timeline: Vec::new(), ..convert::payment(&stored.payment) }
}

/// As many payments as fit into a reply, counted from where the walk began; where it was cut, if it was.
fn fit(mut payments: Vec<Arc<Versioned>>, newer: bool) -> (Vec<Arc<Versioned>>, Option<PaymentId>) {
    if newer {
        payments.reverse();
    }
    let mut bytes = 0;
    let fitting = payments.iter().take_while(|stored| {
        let first = bytes == 0;
        bytes += listed(stored).encoded_len();
        first || bytes <= PAGE_BYTES
    });
    let count = fitting.count();
    let cut = count < payments.len();
    payments.truncate(count);
    let cut_at = payments.last().filter(|_| cut).map(|stored| stored.payment.terms.id);
    if newer {
        payments.reverse();
    }
    (payments, cut_at)
}

/// What a cursor must agree with: everything but where the page is.
fn filters(message: &pb::ListPaymentsRequest) -> Filters {
    let bare = pb::ListPaymentsRequest { pagination: None, ..message.clone() };
    cursor::filters("payments", &bare)
}

pub fn page_size(field: &str, asked: i32, found: &mut Violations) -> u32 {
    match u32::try_from(asked) {
        Ok(0) => PAGE_SIZE,
        Ok(size) if size <= PAGE_SIZE_MAX => size,
        Ok(_) | Err(_) => {
            found.add(field, format!("must be 0 to {PAGE_SIZE_MAX}"));
            PAGE_SIZE
        }
    }
}

fn page_number(pagination: &common::Pagination, size: u32, found: &mut Violations) -> u32 {
    if !pagination.cursor.is_empty() {
        return 1;
    }
    let page = u32::try_from(pagination.page).map(|page| page.max(1));
    match page {
        Ok(page) if page.saturating_mul(size) <= PAGED_MAX => page,
        Ok(_) | Err(_) => {
            let allowed = format!("must be 0 or more, and page × page_size at most {PAGED_MAX}");
            found.add("pagination.page", allowed);
            1
        }
    }
}
