//! The state machine as a table, and the rules that hold over whole lives.

use std::time::Duration;

use super::*;
use crate::domain::{
    deliveries::Standing,
    delivery::{Attempt, Verdict},
    event,
    money::Currency,
    scenario::{DrawKey, Scenario, Settings},
};

const NOW: Timestamp = Timestamp::from_ms(1_767_225_600_000);

fn krw(amount: u64) -> Money {
    Money { amount, currency: Currency::parse("KRW").unwrap() }
}

pub(crate) fn payment(scenario: Scenario) -> Payment {
    let settings = Settings {
        default_scenario: Scenario::Approve,
        default_delay: Duration::from_secs(2),
        timeout_settle: Duration::from_secs(30),
        manual_ttl: Duration::from_secs(20),
        random_approval_rate: 0.8,
        seed: 0,
    };
    let plan = Plan::draw(scenario, &settings, &DrawKey::Idempotency("k"), NOW);
    Payment::create(Arc::new(Terms {
        id: PaymentId::from_parts(NOW, 7),
        reservation_id: "res-1".into(),
        user_id: "user-1".into(),
        amount: krw(1_000),
        vat: None,
        method: Method::CreditCard,
        plan,
        provider: "sim".into(),
        webhook_url: Some("http://127.0.0.1:9/hook".into()),
        events: true,
        metadata: None,
        echo: Some(r#"{"a":1}"#.into()),
        card: None,
        created_at: NOW,
        trace: Trace::default(),
        idempotency: None,
        renderer: event::RENDERER,
    }))
}

#[test]
fn terms_know_what_is_settled_from_the_start() {
    for scenario in Scenario::ALL {
        for (events, hook) in
            [(false, None), (true, None), (false, Some("http://127.0.0.1:9/hook"))]
        {
            let terms = payment(scenario).terms;
            let terms = Terms { events, webhook_url: hook.map(Into::into), ..(*terms).clone() };
            let payment = Payment::create(Arc::new(terms.clone()));
            assert_eq!(
                terms.are_settled_at_once(),
                payment.progress.is_settled(),
                "{scenario:?} {events} {hook:?}"
            );
        }
    }
}

fn process() -> Command {
    Command::Process { card: None, vat: None }
}

fn cancel() -> Command {
    Command::Cancel(Cancel::default())
}

fn refund(amount: u64) -> Command {
    Command::Cancel(Cancel { amount: Some(krw(amount)), ..Cancel::default() })
}

/// The payment after commands that must be accepted.
fn after(payment: Payment, commands: &[Command], now: Timestamp) -> Payment {
    commands.iter().fold(payment, |payment, command| {
        let step = payment.transition(command.clone(), now);
        step.answer.expect("accepted");
        step.changed.unwrap_or(payment)
    })
}

fn in_status(status: Status) -> Payment {
    match status {
        Status::Pending => payment(Scenario::Manual),
        Status::Processing => after(payment(Scenario::Timeout), &[process()], NOW),
        Status::Completed => payment(Scenario::Approve),
        Status::Failed => payment(Scenario::Fail),
        Status::Cancelled => after(payment(Scenario::Manual), &[cancel()], NOW),
        Status::Refunded => after(payment(Scenario::Approve), &[cancel()], NOW),
        Status::Expired => after(payment(Scenario::Manual), &[Command::Wake], NOW.plus_ms(20_000)),
    }
}

const ALL: [Status; 7] = [
    Status::Pending,
    Status::Processing,
    Status::Completed,
    Status::Failed,
    Status::Cancelled,
    Status::Refunded,
    Status::Expired,
];

fn outcome_of(status: Status, command: Command) -> Result<(Status, &'static str), &'static str> {
    let payment = in_status(status);
    assert_eq!(payment.status(), status);
    let step = payment.transition(command, NOW);
    let now = step.changed.as_ref().unwrap_or(&payment).status();
    match step.answer {
        Ok(Answer::Woken) => Ok((now, "woken")),
        Ok(Answer::Decided) => Ok((now, "decided")),
        Ok(Answer::Held) => Ok((now, "held")),
        Ok(Answer::Cancelled { .. }) => Ok((now, "cancelled")),
        Ok(Answer::Refunded { .. }) => Ok((now, "refunded")),
        Ok(Answer::Simulated { .. }) => Ok((now, "simulated")),
        Ok(Answer::Redelivered { .. }) => Ok((now, "redelivered")),
        Err(Refusal::InvalidState { .. }) => Err("invalid state"),
        Err(Refusal::RefundExceedsRemaining { .. }) => Err("exceeds"),
        Err(Refusal::NoWebhookUrl | Refusal::Invalid(_)) => Err("invalid"),
    }
}

/// The contract's table of statuses and commands, whole.
#[test]
fn every_status_answers_every_command_as_the_table_says() {
    use Status::*;
    let process_rows = [
        Ok((Completed, "decided")),
        Ok((Processing, "held")),
        Ok((Completed, "decided")),
        Ok((Failed, "decided")),
        Err("invalid state"),
        Ok((Refunded, "decided")),
        Err("invalid state"),
    ];
    let cancel_rows = [
        Ok((Cancelled, "cancelled")),
        Err("invalid state"),
        Ok((Refunded, "refunded")),
        Err("invalid state"),
        Err("invalid state"),
        Err("invalid state"),
        Err("invalid state"),
    ];
    let refund_rows = [
        Err("invalid state"),
        Err("invalid state"),
        Ok((Completed, "refunded")),
        Err("invalid state"),
        Err("invalid state"),
        Err("invalid state"),
        Err("invalid state"),
    ];
    for (i, status) in ALL.into_iter().enumerate() {
        assert_eq!(outcome_of(status, process()), process_rows[i], "{status:?} process");
        assert_eq!(outcome_of(status, cancel()), cancel_rows[i], "{status:?} cancel");
        assert_eq!(outcome_of(status, refund(400)), refund_rows[i], "{status:?} refund");
        assert_eq!(outcome_of(status, Command::Wake), Ok((status, "woken")), "{status:?} wake");
        let simulate = Command::SimulateWebhook { target: None, at: NOW };
        assert_eq!(outcome_of(status, simulate), Ok((status, "simulated")), "{status:?}");
    }
}

#[test]
fn approve_is_decided_at_once_and_told_two_seconds_later() {
    let payment = payment(Scenario::Approve);
    assert_eq!((payment.status(), payment.progress.version), (Status::Completed, 2));
    for channel in [Channel::Event, Channel::Webhook] {
        assert_eq!(payment.delivery_due(channel), Some(NOW.plus_ms(2_000)));
        assert!(payment.due_notification(channel, NOW.plus_ms(1_999)).is_none());
        assert!(payment.due_notification(channel, NOW.plus_ms(2_000)).is_some());
    }
}

#[test]
fn delay_is_decided_and_told_at_its_moment_and_never_early() {
    let payment = payment(Scenario::Delay);
    assert_eq!(payment.status(), Status::Pending);
    assert!(payment.transition(Command::Wake, NOW.plus_ms(1_999)).changed.is_none());
    let late = payment.transition(Command::Wake, NOW.plus_ms(9_000)).changed.unwrap();
    assert_eq!(late.status(), Status::Completed);
    assert_eq!(late.progress.updated_at, NOW.plus_ms(2_000), "at its own time");
    assert_eq!(late.delivery_due(Channel::Webhook), Some(NOW.plus_ms(2_000)));
    assert!(late.transition(Command::Wake, NOW.plus_ms(9_000)).changed.is_none(), "only once");
}

#[test]
fn process_decides_a_delayed_payment_now() {
    let done = after(payment(Scenario::Delay), &[process()], NOW.plus_ms(100));
    assert_eq!(done.status(), Status::Completed);
    assert_eq!(done.delivery_due(Channel::Event), Some(NOW.plus_ms(100)));
}

#[test]
fn a_timeout_payment_settles_whether_or_not_it_was_processed() {
    for commands in [vec![], vec![process()]] {
        let held = after(payment(Scenario::Timeout), &commands, NOW);
        let settled = held.transition(Command::Wake, NOW.plus_ms(30_000)).changed.unwrap();
        assert_eq!(settled.status(), Status::Completed);
        let retry = settled.transition(process(), NOW.plus_ms(31_000));
        assert_eq!(retry.answer, Ok(Answer::Decided));
    }
}

#[test]
fn a_command_at_the_expiry_finds_it_expired_though_no_timer_ran() {
    let payment = payment(Scenario::Manual);
    let step = payment.transition(process(), NOW.plus_ms(20_000));
    assert!(matches!(step.answer, Err(Refusal::InvalidState { status: Status::Expired, .. })));
    assert_eq!(step.changed.unwrap().status(), Status::Expired, "and that is kept");
    let in_time = payment.transition(process(), NOW.plus_ms(19_999));
    assert_eq!(in_time.changed.unwrap().status(), Status::Completed);
}

#[test]
fn a_refund_before_the_notification_is_told_after_the_completion() {
    let refunded = after(payment(Scenario::Approve), &[cancel()], NOW.plus_ms(10));
    let due = NOW.plus_ms(2_000);
    let first = refunded.due_notification(Channel::Webhook, due).unwrap();
    assert_eq!(first.snapshot.status, Status::Completed);
    assert!(refunded.due_notification(Channel::Webhook, NOW.plus_ms(1_999)).is_none());
    let after = refunded
        .after_attempt((first.n, Channel::Webhook), accepted(), due, &policy(), 0.0)
        .unwrap();
    let second = after.due_notification(Channel::Webhook, due).unwrap();
    assert_eq!(second.snapshot.status, Status::Refunded);
    assert_eq!(
        after.due_notification(Channel::Event, due).unwrap().snapshot.status,
        Status::Completed,
        "channels don't wait for each other"
    );
}

fn accepted() -> Attempted {
    let attempt = Attempt { at: NOW, http_status: Some(200), latency_ms: 1, error: None };
    Attempted { attempt, verdict: Verdict::Accepted }
}

fn policy() -> RetryPolicy {
    RetryPolicy {
        max_attempts: Some(10),
        backoff_base: Duration::from_secs(1),
        backoff_max: Duration::from_secs(3600),
        dead_letters: false,
    }
}

#[test]
fn refunds_stop_at_the_amount_and_the_last_one_is_refunded() {
    let paid = payment(Scenario::Approve);
    let part = after(paid, &[refund(400), refund(500)], NOW);
    assert_eq!((part.status(), part.refunded_amount()), (Status::Completed, 900));
    let too_much = part.transition(refund(101), NOW);
    assert!(matches!(too_much.answer, Err(Refusal::RefundExceedsRemaining { left: 100, .. })));
    assert!(too_much.changed.is_none());
    let whole = after(part, &[cancel()], NOW);
    assert_eq!((whole.status(), whole.refunded_amount()), (Status::Refunded, 1_000));
    assert_eq!(whole.progress.version, 5);
    let topics: Vec<_> = whole.progress.notifications.iter().map(|n| n.topic).collect();
    assert_eq!(
        topics,
        [Topic::StatusUpdated, Topic::RefundUpdated, Topic::RefundUpdated, Topic::StatusUpdated]
    );
}

#[test]
fn a_payment_has_at_most_a_hundred_refunds() {
    let full = after(payment(Scenario::Approve), &vec![refund(1); REFUNDS_MAX], NOW);
    assert!(matches!(full.transition(refund(1), NOW).answer, Err(Refusal::InvalidState { .. })));
}

#[test]
fn a_refund_in_another_currency_names_its_field() {
    let usd = Money { amount: 1, currency: Currency::parse("USD").unwrap() };
    let command = Command::Cancel(Cancel { amount: Some(usd), ..Cancel::default() });
    let refusal = payment(Scenario::Approve).transition(command, NOW).answer.unwrap_err();
    assert!(
        matches!(&refusal, Refusal::Invalid(bad) if bad[0].field == "refund_amount.currency"),
        "{refusal}"
    );
}

#[test]
fn simulated_webhooks_change_nothing_and_are_bounded() {
    let before = payment(Scenario::Manual);
    let order = Command::SimulateWebhook { target: Some(Status::Failed), at: NOW.plus_ms(5_000) };
    let full = after(before.clone(), &vec![order.clone(); SIMULATED_OWED_MAX], NOW);
    assert_eq!(full.progress.version, before.progress.version);
    assert_eq!(full.progress.state, before.progress.state);
    assert_eq!(full.delivery_due(Channel::Event), None, "no event");
    assert!(matches!(full.transition(order, NOW).answer, Err(Refusal::InvalidState { .. })));
    let told = full.due_notification(Channel::Webhook, NOW.plus_ms(5_000)).unwrap();
    let body: serde_json::Value = serde_json::from_slice(&event::body(&full.terms, told)).unwrap();
    assert_eq!(body["status"], "PAYMENT_STATUS_FAILED");
    assert_eq!(body["timestamp"], NOW.plus_ms(5_000).seconds());
    assert_eq!(body["failure_reason"], serde_json::Value::Null);
}

fn attempted(payment: &Payment, no: DeliveryNo, verdict: Verdict, now: Timestamp) -> Payment {
    let error = (verdict != Verdict::Accepted).then(|| "HTTP 500".to_owned());
    let attempt = Attempt { at: now, http_status: None, latency_ms: 1, error };
    let policy = RetryPolicy { dead_letters: true, ..policy() };
    payment.after_attempt(no, Attempted { attempt, verdict }, now, &policy, 0.0).expect("owed")
}

#[test]
fn what_is_over_can_be_ordered_again_and_nothing_else_changes() {
    let webhook = (1, Channel::Webhook);
    let told = attempted(&payment(Scenario::Approve), (1, Channel::Event), Verdict::Accepted, NOW);
    for verdict in [Verdict::Accepted, Verdict::Refused] {
        let mut over = attempted(&told, webhook, verdict.clone(), NOW);
        for round in 1..=2 {
            assert_eq!(over.progress.has_dead(), verdict == Verdict::Refused, "round {round}");
            let later = NOW.plus_ms(round * 100_000);
            let again = after(over.clone(), &[Command::Redeliver(webhook)], later);
            assert_eq!(
                (again.delivery_due(Channel::Webhook), again.progress.is_settled()),
                (Some(later), false)
            );
            assert!(!again.progress.has_dead());
            assert_eq!(again.progress.version, over.progress.version);
            assert_eq!(again.progress.updated_at, over.progress.updated_at);
            let body = |p: &Payment| event::body(&p.terms, p.notification(1).expect("it is kept"));
            assert_eq!(body(&again), body(&over));
            let entry = again.progress.timeline.entries().last().expect("an entry");
            assert_eq!((entry.kind, entry.cause), (Kind::RedeliveryOrdered, Cause::Redeliver));
            let refused = again.transition(Command::Redeliver(webhook), later);
            assert!(matches!(refused.answer, Err(Refusal::InvalidState { .. })), "owed already");
            assert!(refused.changed.is_none());
            over = attempted(&again, webhook, verdict.clone(), later);
        }
    }
    for unknown in [(2, Channel::Webhook), (1, Channel::DeadLetter)] {
        let refused = told.transition(Command::Redeliver(unknown), NOW).answer;
        assert!(matches!(refused, Err(Refusal::Invalid(bad)) if bad[0].field == "delivery_id"));
    }
}

#[test]
fn an_order_for_the_dead_leaves_the_rest_and_takes_their_letters_back() {
    let (event, webhook, letter) =
        ((1, Channel::Event), (1, Channel::Webhook), (1, Channel::DeadLetter));
    let told = attempted(&payment(Scenario::Approve), event, Verdict::Accepted, NOW);
    let dead = attempted(&told, webhook, Verdict::Refused, NOW);
    let dead = attempted(&dead, letter, Verdict::Refused, NOW);
    let all = Command::RedeliverDead(vec![event, webhook, letter, (9, Channel::Event)]);
    let step = dead.transition(all.clone(), NOW);
    assert_eq!(step.answer, Ok(Answer::Redelivered { ordered: 1 }), "the letter goes with it");
    let ordered = step.changed.expect("it changed");
    assert_eq!(ordered.delivery_due(Channel::Event), None, "what arrived stays as it is");
    let step = ordered.transition(all, NOW);
    assert_eq!((step.answer, step.changed), (Ok(Answer::Redelivered { ordered: 0 }), None));
    let again = after(dead, &[Command::Redeliver(letter)], NOW);
    assert_eq!(again.delivery_due(Channel::DeadLetter), Some(NOW), "a letter may go by itself");
    assert!(again.progress.has_dead(), "its webhook is dead all the same");
}

#[test]
fn a_body_has_every_key_in_the_contracts_order() {
    let payment = payment(Scenario::Approve);
    let told = payment.notification(1).unwrap();
    let text = String::from_utf8(event::body(&payment.terms, told)).unwrap();
    let id = payment.terms.id;
    let expected = format!(
        concat!(
            r#"{{"event_id":"evt_{id}_1","event_type":"payment.status_updated","version":2,"#,
            r#""payment_id":"pay_{id}","payment_intent_id":"pi_{id}","reservation_id":"res-1","#,
            r#""user_id":"user-1","status":"PAYMENT_STATUS_COMPLETED","amount":1000,"#,
            r#""currency":"KRW","timestamp":1767225600,"transaction_id":"txn_{id}","#,
            r#""approval_no":"{approval}","failure_reason":null,"provider":"sim","#,
            r#""refund_id":null,"refund_amount":null,"refunded_amount":null,"#,
            r#""echo":{{"a":1}},"metadata":null}}"#
        ),
        id = id,
        approval = id.approval_no()
    );
    assert_eq!(text, expected);
}

/// A life of random commands at random times against the rules that hold for every one.
mod lives {
    use proptest::prelude::*;

    use super::*;

    fn command() -> impl Strategy<Value = Command> {
        prop_oneof![
            Just(Command::Wake),
            Just(process()),
            Just(cancel()),
            (1_u64..1_200).prop_map(refund),
            (0_u64..3_000)
                .prop_map(|ms| Command::SimulateWebhook { target: None, at: NOW.plus_ms(ms) }),
            delivery_no().prop_map(Command::Redeliver),
            proptest::collection::vec(delivery_no(), 0..6).prop_map(Command::RedeliverDead),
        ]
    }

    fn delivery_no() -> impl Strategy<Value = DeliveryNo> {
        (1_u32..5, proptest::sample::select(Channel::ALL.to_vec()))
    }

    fn verdict() -> impl Strategy<Value = Verdict> {
        prop_oneof![
            Just(Verdict::Accepted),
            Just(Verdict::Refused),
            Just(Verdict::Retry { not_before: None }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1024))]
        #[test]
        fn keep_the_rules(
            scenario in proptest::sample::select(Scenario::ALL.to_vec()),
            steps in proptest::collection::vec((command(), 0_u64..8_000), 1..40),
        ) {
            let mut payment = payment(scenario);
            let mut now = NOW;
            let mut terminal = 0;
            for (command, wait) in steps {
                now = now.plus_ms(wait);
                let step = payment.transition(command, now);
                let Some(next) = step.changed else { continue };
                let (was, is) = (payment.status(), next.status());
                prop_assert!(next.progress.version >= payment.progress.version);
                prop_assert!(next.progress.version - payment.progress.version <= 2);
                if payment.progress.state.wakes_at().is_none() && was != is {
                    prop_assert_eq!((was, is), (Status::Completed, Status::Refunded));
                }
                terminal += u32::from(
                    payment.progress.state.decision().is_none()
                        && next.progress.state.decision().is_some(),
                );
                prop_assert!(next.refunded_amount() <= 1_000);
                for pair in next.progress.notifications.windows(2) {
                    prop_assert!(pair[0].n < pair[1].n);
                }
                prop_assert!(next.progress.state.wakes_at().is_none_or(|at| at > now));
                payment = next;
            }
            prop_assert!(terminal <= 1, "decided {} times", terminal);
        }

        #[test]
        fn order_again_only_what_is_over(
            scenario in proptest::sample::select(Scenario::ALL.to_vec()),
            steps in proptest::collection::vec((command(), delivery_no(), verdict()), 1..60),
        ) {
            let mut payment = payment(scenario);
            let mut now = NOW;
            let standing = |payment: &Payment, no| {
                payment.deliveries().find(|one| one.no() == no).map(|one| one.standing)
            };
            for (command, tried, verdict) in steps {
                now = now.plus_ms(1_000);
                if let Some(Standing::Owed) = standing(&payment, tried) {
                    payment = attempted(&payment, tried, verdict, now);
                }
                let dead = payment.deliveries().any(|one| one.standing == Standing::Dead);
                prop_assert_eq!(payment.progress.has_dead(), dead);
                let step = payment.transition(command.clone(), now);
                let next = step.changed.unwrap_or_else(|| payment.clone());
                if let Command::Redeliver(no) = command {
                    let was_over = matches!(
                        standing(&payment, no),
                        Some(Standing::Delivered | Standing::Dead)
                    );
                    prop_assert_eq!(step.answer.is_ok(), was_over);
                    if was_over {
                        prop_assert_eq!(standing(&next, no), Some(Standing::Owed));
                        prop_assert!(!next.progress.is_settled());
                    }
                }
                if let Command::RedeliverDead(wanted) = command {
                    let left = |no: &&DeliveryNo| standing(&next, **no) == Some(Standing::Dead);
                    prop_assert_eq!(wanted.iter().find(left), None);
                }
                payment = next;
            }
        }
    }
}
