//! A store with the commands on it, without a server around them.

use std::{sync::Arc, time::Duration};

use payment_sim::{
    app::{App, NewPayment, Settings},
    clock::{Clock, ManualClock},
    domain::{
        money::{Currency, Money},
        payment::{Method, Trace},
        scenario::{self, Scenario},
    },
    metrics::Metrics,
    outbox::Shared,
    store::{self, Location, Retention, Store},
};

/// What the outbox and the commands need; deliveries are due at once.
pub fn outbox(clock: &ManualClock) -> (Shared, App) {
    let clock: Arc<dyn Clock> = Arc::new(clock.clone());
    let day = Duration::from_secs(86_400);
    let options = store::Options {
        retention: Retention { payments: day, idempotency: day, payments_max: None },
        clock: Arc::clone(&clock),
        on_commit: Arc::new(|_, _| ()),
        on_dropped_early: Arc::new(|_| ()),
    };
    let store: Arc<dyn Store> = store::open(&Location::Memory, options).unwrap();
    let settings = Settings {
        scenario: scenario::Settings {
            default_scenario: Scenario::Approve,
            default_delay: Duration::ZERO,
            timeout_settle: Duration::ZERO,
            manual_ttl: Duration::ZERO,
            random_approval_rate: 1.0,
            seed: 0,
        },
        events: true,
    };
    let metrics = Arc::new(Metrics::new());
    let app = App::new(Arc::clone(&store), Arc::clone(&clock), Arc::clone(&metrics), settings);
    (Shared::new(store, clock, metrics), app)
}

pub fn new_payment(reservation: &str) -> NewPayment {
    NewPayment {
        reservation_id: reservation.into(),
        user_id: "user-1".into(),
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
