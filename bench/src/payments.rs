//! Payments as callers make them: what is told apart is random, what repeats is text. They cost as little as can be: it
//! counts as the store's.

use std::{sync::Arc, time::Duration};

use payment_sim::{
    domain::{
        Text,
        delivery::{Attempt, Attempted, Channel, RetryPolicy, Verdict},
        event,
        ids::{Idempotency, KeyHash, PaymentId, RequestHash},
        money::{Currency, Money},
        payment::{Metadata, Method, Payment, Terms, Trace},
        scenario::{DrawKey, Plan, Scenario, Settings},
        time::Timestamp,
    },
    store::{Change, Commit},
};

pub const USERS: u64 = 10_000;

/// Makes payments; `notify_after` is when the webhook of each falls due.
pub struct Maker {
    settings: Settings,
    currency: Currency,
    users: Vec<Text>,
    are_bare: bool,
}

impl Maker {
    /// # Panics
    /// Never: KRW is a currency.
    pub fn new(notify_after: Duration) -> Self {
        let settings = Settings {
            default_scenario: Scenario::Approve,
            default_delay: notify_after,
            timeout_settle: Duration::from_secs(30),
            manual_ttl: Duration::from_secs(300),
            random_approval_rate: 0.8,
            seed: 0,
        };
        let currency = Currency::parse("KRW").expect("a currency of ISO 4217");
        let users = (0..USERS).map(|user| format!("user-{user:07}").into()).collect();
        Self { settings, currency, users, are_bare: false }
    }

    /// Of payments as the load creates them: with what a create must say and nothing else, so that none owes a webhook.
    ///
    /// # Panics
    /// Never, as above.
    pub fn bare() -> Self {
        Self { are_bare: true, ..Self::new(Duration::ZERO) }
    }

    /// The `n`-th payment, approved and, unless it is bare, with a webhook to be posted. Ids rise with `n`.
    pub fn payment(&self, n: u64, now: Timestamp) -> Payment {
        Payment::create(self.terms(n, now))
    }

    /// What the `n`-th payment is made on.
    pub fn terms(&self, n: u64, now: Timestamp) -> Arc<Terms> {
        let (a, b, c) = (mix(n), mix(n ^ 1 << 62), mix(n ^ 1 << 63));
        let words = |x: u64, y: u64| ((u128::from(x) << 64) | u128::from(y)).to_be_bytes();
        let webhook_url = || "http://127.0.0.1:9/hooks/payment?shop=0042".into();
        let metadata = || Metadata {
            source: "web".into(),
            user_agent: "Mozilla/5.0 (X11; Linux x86_64; rv:140.0)".into(),
            ip_address: "203.0.113.7".into(),
            session_id: uuid(c, a).into(),
            tags: [("campaign".into(), "summer".into())].into(),
        };
        Arc::new(Terms {
            id: id(n, now),
            reservation_id: uuid(a, b).into(),
            user_id: self.users[(mix(n ^ 0x77) % USERS) as usize].clone(),
            amount: Money { amount: 10_000 + a % 90_000, currency: self.currency },
            vat: None,
            method: Method::CreditCard,
            plan: Plan::draw(Scenario::Approve, &self.settings, &DrawKey::Idempotency(""), now),
            provider: "payment-sim".into(),
            webhook_url: (!self.are_bare).then(webhook_url),
            events: false,
            metadata: (!self.are_bare).then(metadata),
            echo: None,
            card: None,
            created_at: now,
            trace: Trace { trace_id: words(b, c), parent_span: a.to_be_bytes(), sampled: true },
            idempotency: Some(Idempotency {
                key: KeyHash(words(a, c)),
                request: RequestHash(words(c, b)),
            }),
            renderer: event::RENDERER,
        })
    }
}

/// What creates a payment in a store.
pub const fn created(terms: Arc<Terms>) -> Commit {
    Commit { change: Some(Change::Create { terms, draw: None }), reply: None }
}

/// The id of the `n`-th payment.
pub const fn id(n: u64, now: Timestamp) -> PaymentId {
    PaymentId::from_parts(now, (n as u128) << 24 | (mix(n) >> 40) as u128)
}

/// The payment once its receiver has answered 200; `None` where nothing is owed.
pub fn delivered(payment: &Payment, now: Timestamp) -> Option<Payment> {
    let attempt = Attempt { at: now, http_status: Some(200), latency_ms: 3, error: None };
    let done = Attempted { attempt, verdict: Verdict::Accepted };
    let policy = RetryPolicy {
        max_attempts: Some(10),
        backoff_base: Duration::from_secs(1),
        backoff_max: Duration::from_secs(3_600),
        dead_letters: false,
    };
    let n = payment.due_notification(Channel::Webhook, now)?.n;
    payment.after_attempt((n, Channel::Webhook), done, now, &policy, 0.5)
}

/// splitmix64: spreads a number over 64 bits.
pub const fn mix(n: u64) -> u64 {
    let n = n.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    n ^ (n >> 31)
}

/// # Panics
/// Never: there is room for two digits a byte.
pub fn uuid(a: u64, b: u64) -> String {
    let mut digits = [0; 32];
    let bytes = (u128::from(a) << 64 | u128::from(b)).to_be_bytes();
    hex::encode_to_slice(bytes, &mut digits).expect("two digits a byte");
    let digits = std::str::from_utf8(&digits).expect("hexadecimal digits");
    [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-")
}
