//! Between the wire and the domain: requests are checked whole, replies are made from a payment.

use std::collections::BTreeMap;

use http::{HeaderMap, HeaderName};
use prost::Message;
use prost_types::{Struct, Value, value::Kind as JsonKind};

use super::pb::{common::v1 as common, payment::v1 as pb};
use crate::{
    app::{self, Key, NewPayment},
    domain::{
        Text,
        card::{Card, CardInput},
        deliveries::{DeliveryId, Listed},
        delivery::{self, Channel},
        ids::{Idempotency, KeyHash, PaymentId, RequestHash, StoreSecret},
        money::{AMOUNT_MAX, AMOUNT_MIN, Currency, Money},
        payment::{Cancel, Metadata, Method, Payment, Terms, Trace},
        scenario::{Outcome, Scenario},
        status::Status,
        time::Timestamp,
        timeline,
        validation::{TEXT_CHARS, Violation, Violations},
    },
    recent::Recent,
};

const KEY_CHARS: usize = 255;
// As names rather than text, which would be parsed anew at every look-up.
static KEY_HEADER: HeaderName = HeaderName::from_static("idempotency-key");
/// Test sessions have keys of their own.
static SESSION_HEADER: HeaderName = HeaderName::from_static("x-simulation-session");
const URL_CHARS: usize = 2_048;
const TAGS_MAX: usize = 50;
const TAG_NAME_CHARS: usize = 64;
const TAG_VALUE_CHARS: usize = 512;
/// As JSON.
const ECHO_BYTES: usize = 4 << 10;
/// Deeper values could overflow a receiver's stack.
const ECHO_DEPTH: usize = 32;
/// Whole numbers below 2^53 are exact in a double, and written without a fraction.
const EXACT_BELOW: f64 = 9_007_199_254_740_992.0;
/// 9999-12-31T23:59:59Z: no google.protobuf.Timestamp is later, and ids have no room for much more.
const LAST_SECOND: i64 = 253_402_300_799;
pub const SIMULATED_DELAY_MAX_S: i32 = 86_400;

/// A request that may carry an idempotency key.
pub trait Keyed: Message {
    /// One key on two RPCs is two keys.
    const RPC: &'static str;

    fn key_field(&mut self) -> &mut String;
}

impl Keyed for pb::CreatePaymentIntentRequest {
    const RPC: &'static str = "create";

    fn key_field(&mut self) -> &mut String {
        &mut self.idempotency_key
    }
}

impl Keyed for pb::ProcessPaymentRequest {
    const RPC: &'static str = "process";

    fn key_field(&mut self) -> &mut String {
        &mut self.idempotency_key
    }
}

impl Keyed for pb::CancelPaymentRequest {
    const RPC: &'static str = "cancel";

    fn key_field(&mut self) -> &mut String {
        &mut self.idempotency_key
    }
}

/// Reads the key of a request from its field or its header, and takes it out of the message: what is
/// compared is the request without it.
pub fn key<M: Keyed>(
    headers: &HeaderMap,
    message: &mut M,
    secret: &StoreSecret,
    found: &mut Violations,
) -> Option<Key> {
    let text = std::mem::take(message.key_field());
    let mut given = headers.get_all(&KEY_HEADER).iter();
    let header = given.next().map(|value| value.to_str().unwrap_or("\u{0}").to_owned());
    if given.any(|other| Some(other.as_bytes()) != header.as_deref().map(str::as_bytes)) {
        found.add("idempotency_key", "has several idempotency-key headers that differ");
        return None;
    }
    // An empty header is as good as none, like an empty field.
    let text = match header.filter(|header| !header.is_empty()) {
        Some(header) if text.is_empty() => header,
        Some(header) if header != text => {
            found.add("idempotency_key", "differs from the idempotency-key header");
            return None;
        }
        Some(_) | None => text,
    };
    if text.is_empty() {
        return None;
    }
    if text.len() > KEY_CHARS || !text.bytes().all(|b| (0x20..0x7f).contains(&b)) {
        let allowed = format!("must be 1 to {KEY_CHARS} printable ASCII characters");
        found.add("idempotency_key", allowed);
        return None;
    }
    let session = headers.get(&SESSION_HEADER).map_or(&b""[..], |value| value.as_bytes());
    let idempotency = Idempotency {
        key: KeyHash(secret.hash(b"key", &[session, M::RPC.as_bytes(), text.as_bytes()])),
        request: RequestHash(secret.hash(b"request", &[&message.encode_to_vec()])),
    };
    Some(Key { text, idempotency })
}

/// A payment id of either spelling. `None` means that `found` has grown.
pub fn payment_id(text: &str, found: &mut Violations) -> Option<PaymentId> {
    let id = PaymentId::parse(text);
    if id.is_none() {
        let allowed = "must be pi_ or pay_ and the payment's 26 characters";
        found.add("payment_intent_id", allowed);
    }
    id
}

/// An optional user or reservation id, as look-ups and lists take it.
pub fn optional_name(field: &str, text: String, found: &mut Violations) -> Option<String> {
    if text.is_empty() {
        return None;
    }
    found.name(field, &text);
    Some(text)
}

/// Checks a create whole; `found` names every bad field.
pub fn new_payment(
    message: pb::CreatePaymentIntentRequest,
    now: Timestamp,
    secret: &StoreSecret,
    urls: &WebhookUrls,
    trace: Trace,
    mut found: Violations,
) -> Result<NewPayment, Vec<Violation>> {
    found.name("reservation_id", &message.reservation_id);
    found.name("user_id", &message.user_id);
    let amount = money("amount", message.amount.as_ref(), &mut found);
    let method = method("method", message.method, &mut found);
    let scenario = scenario(&message, &mut found);
    if let Some(wrong) = webhook_url(&message.webhook_url, urls) {
        found.add("webhook_url", wrong);
    }
    if !message.provider.is_empty() && message.provider != app::PROVIDER {
        found.add("provider", format!("names no provider; there is {:?}", app::PROVIDER));
    }
    let details = details(message.payment_details.as_ref(), now, secret, &mut found);
    let vat = vat(DETAILS_VAT, &details, amount, &mut found);
    let metadata = message.metadata.map(|metadata| self::metadata(metadata, &mut found));
    let echo = message.echo.and_then(|echo| self::echo(echo, &mut found));
    match (found.into_result(), amount, method) {
        (Ok(()), Some(amount), Some(method)) => Ok(NewPayment {
            reservation_id: message.reservation_id.into(),
            user_id: message.user_id.into(),
            amount,
            vat,
            method,
            scenario,
            webhook_url: Some(message.webhook_url).filter(|url| !url.is_empty()).map(Text::from),
            metadata,
            echo,
            card: details.card,
            trace,
        }),
        (Err(bad), ..) => Err(bad),
        (Ok(()), ..) => unreachable!("a part that is missing has left a violation"),
    }
}

const DETAILS_VAT: &str = "payment_details.credit_card.vat";

/// What ProcessPayment brings along. The VAT is compared with the payment's amount by the caller.
#[derive(Default)]
pub struct Details {
    pub card: Option<Card>,
    pub vat: Option<Money>,
}

/// Checks payment details and keeps of them what may be kept.
pub fn details(
    details: Option<&pb::PaymentDetails>,
    now: Timestamp,
    secret: &StoreSecret,
    found: &mut Violations,
) -> Details {
    let Some(details) = details else { return Details::default() };
    method("payment_details.method", details.method, found);
    if let Some(bank) = &details.bank_transfer {
        let path = "payment_details.bank_transfer";
        found.text(format!("{path}.bank_code"), &bank.bank_code, TEXT_CHARS);
        found.text(format!("{path}.account_number"), &bank.account_number, TEXT_CHARS);
        found.text(format!("{path}.account_holder"), &bank.account_holder, TEXT_CHARS);
    }
    if let Some(mobile) = &details.mobile_pay {
        let path = "payment_details.mobile_pay";
        found.text(format!("{path}.provider"), &mobile.provider, TEXT_CHARS);
        found.text(format!("{path}.mobile_number"), &mobile.mobile_number, TEXT_CHARS);
    }
    let Some(card) = &details.credit_card else { return Details::default() };
    let path = "payment_details.credit_card";
    found.text(format!("{path}.cardholder_name"), &card.cardholder_name, TEXT_CHARS);
    let input = CardInput {
        number: &card.card_number,
        expiry_month: &card.expiry_month,
        expiry_year: &card.expiry_year,
        cvv: &card.cvv,
        installment_months: card.installment_months,
    };
    Details {
        card: input.check(path, now, secret, found),
        vat: card.vat.as_ref().and_then(|vat| amount_of(DETAILS_VAT, vat, 0, found)),
    }
}

/// VAT is part of the amount: in its currency, and not more than it.
pub fn vat(
    path: &str,
    details: &Details,
    amount: Option<Money>,
    found: &mut Violations,
) -> Option<u64> {
    let (vat, amount) = (details.vat?, amount?);
    if vat.currency != amount.currency {
        found.add(
            format!("{path}.currency"),
            format!("must be {:?}, as the amount", amount.currency),
        );
    } else if vat.amount > amount.amount {
        found.add(
            format!("{path}.amount"),
            format!("must be at most the amount, {}", amount.amount),
        );
    }
    Some(vat.amount)
}

pub fn cancel(message: &pb::CancelPaymentRequest, found: &mut Violations) -> Cancel {
    found.text("reason", &message.reason, TEXT_CHARS);
    let part = |path, part: Option<&common::Money>, least, found: &mut Violations| {
        part.and_then(|part| amount_of(path, part, least, found))
    };
    Cancel {
        reason: message.reason.clone(),
        amount: part("refund_amount", message.refund_amount.as_ref(), AMOUNT_MIN, found),
        vat: part("refund_vat", message.refund_vat.as_ref(), 0, found),
    }
}

fn money(path: &str, money: Option<&common::Money>, found: &mut Violations) -> Option<Money> {
    match money {
        Some(money) => amount_of(path, money, AMOUNT_MIN, found),
        None => {
            found.add(path, "is required");
            None
        }
    }
}

fn amount_of(
    path: &str,
    money: &common::Money,
    least: u64,
    found: &mut Violations,
) -> Option<Money> {
    let amount =
        u64::try_from(money.amount).ok().filter(|amount| (least..=AMOUNT_MAX).contains(amount));
    if amount.is_none() {
        let allowed = format!("is {}; allowed is {least} to {AMOUNT_MAX}", money.amount);
        found.add(format!("{path}.amount"), allowed);
    }
    let currency = Currency::parse(&money.currency);
    if currency.is_none() {
        found.add(format!("{path}.currency"), "must be an ISO 4217 code, such as KRW");
    }
    Some(Money { amount: amount?, currency: currency? })
}

fn method(path: &str, number: i32, found: &mut Violations) -> Option<Method> {
    use pb::PaymentMethod as Wire;
    let Ok(wire) = Wire::try_from(number) else {
        found.add(path, format!("is {number}, which names no PaymentMethod"));
        return None;
    };
    Some(match wire {
        Wire::Unspecified => Method::Unspecified,
        Wire::CreditCard => Method::CreditCard,
        Wire::DebitCard => Method::DebitCard,
        Wire::BankTransfer => Method::BankTransfer,
        Wire::MobilePay => Method::MobilePay,
        Wire::DigitalWallet => Method::DigitalWallet,
    })
}

/// The scenario that the request names, by `scenario`, else by `metadata.scenario`.
fn scenario(message: &pb::CreatePaymentIntentRequest, found: &mut Violations) -> Option<Scenario> {
    let named = scenario_of("scenario", message.scenario, found);
    let in_metadata = message.metadata.as_ref().map_or(0, |metadata| metadata.scenario);
    let in_metadata = scenario_of("metadata.scenario", in_metadata, found);
    if !message.scenario_name.is_empty() {
        let why = if message.scenario == 0 {
            "names no scenario: no simulation file is loaded"
        } else {
            "must not be given together with scenario"
        };
        found.add("scenario_name", why);
    }
    named.or(in_metadata)
}

fn scenario_of(path: &str, number: i32, found: &mut Violations) -> Option<Scenario> {
    use pb::PaymentScenario as Wire;
    let Ok(wire) = Wire::try_from(number) else {
        found.add(path, format!("is {number}, which names no PaymentScenario"));
        return None;
    };
    match wire {
        Wire::Unspecified => None,
        Wire::Approve => Some(Scenario::Approve),
        Wire::Fail => Some(Scenario::Fail),
        Wire::Delay => Some(Scenario::Delay),
        Wire::Random => Some(Scenario::Random),
        Wire::Timeout => Some(Scenario::Timeout),
        Wire::Manual => Some(Scenario::Manual),
    }
}

/// What is wrong with webhook URLs: the same few come with thousands of payments a second.
pub type WebhookUrls = Recent<Option<&'static str>>;

/// What is wrong with it.
fn webhook_url(text: &str, known: &WebhookUrls) -> Option<&'static str> {
    if text.is_empty() {
        return None;
    }
    if text.chars().count() > URL_CHARS {
        return Some("has more than 2,048 characters");
    }
    known.get(text, wrong_with_url)
}

fn wrong_with_url(text: &str) -> Option<&'static str> {
    // The parser is as lenient as a browser: it drops line breaks and spaces and takes any slashes.
    let strange = |c: char| c.is_control() || c.is_whitespace() || c == '\\';
    let authority = text.split_once("://").map_or("", |(_, rest)| rest);
    match url::Url::parse(text) {
        _ if text.contains(strange) => {
            Some("must not have white space, control characters or backslashes")
        }
        Ok(_) if authority.is_empty() || authority.starts_with('/') => {
            Some("must be an absolute http or https URL")
        }
        Ok(url) if !matches!(url.scheme(), "http" | "https") => Some("must be http or https"),
        Ok(url) if url.host_str().is_none_or(str::is_empty) => Some("names no host"),
        Ok(url) if !url.username().is_empty() || url.password().is_some() => {
            Some("must not carry user info")
        }
        Ok(url) if url.fragment().is_some() => Some("must not carry a fragment"),
        Ok(_) => None,
        Err(_) => Some("must be an absolute http or https URL"),
    }
}

fn metadata(metadata: pb::PaymentMetadata, found: &mut Violations) -> Metadata {
    for (path, value) in [
        ("metadata.source", &metadata.source),
        ("metadata.user_agent", &metadata.user_agent),
        ("metadata.ip_address", &metadata.ip_address),
        ("metadata.session_id", &metadata.session_id),
    ] {
        found.text(path, value, TEXT_CHARS);
    }
    if metadata.tags.len() > TAGS_MAX {
        found.add("metadata.tags", format!("has {} tags; at most {TAGS_MAX}", metadata.tags.len()));
    }
    for (name, value) in &metadata.tags {
        found.text("metadata.tags", name, TAG_NAME_CHARS);
        found.text("metadata.tags", value, TAG_VALUE_CHARS);
    }
    Metadata {
        source: metadata.source.into(),
        user_agent: metadata.user_agent.into(),
        ip_address: metadata.ip_address.into(),
        session_id: metadata.session_id.into(),
        tags: metadata.tags.into_iter().map(|(name, value)| (name.into(), value.into())).collect(),
    }
}

/// The echo as canonical JSON: keys in alphabetical order, numbers finite.
fn echo(echo: Struct, found: &mut Violations) -> Option<String> {
    let json = match json_of(Value { kind: Some(JsonKind::StructValue(echo)) }, ECHO_DEPTH) {
        Ok(json) => json.to_string(),
        Err(why) => {
            found.add("echo", why);
            return None;
        }
    };
    if json.len() > ECHO_BYTES {
        found.add("echo", format!("has {} bytes as JSON; at most {ECHO_BYTES}", json.len()));
        return None;
    }
    Some(json)
}

fn json_of(value: Value, depth: usize) -> Result<serde_json::Value, &'static str> {
    let Some(depth) = depth.checked_sub(1) else {
        return Err("is nested too deeply: at most 32 levels");
    };
    Ok(match value.kind {
        None | Some(JsonKind::NullValue(_)) => serde_json::Value::Null,
        Some(JsonKind::BoolValue(value)) => value.into(),
        Some(JsonKind::StringValue(value)) => value.into(),
        Some(JsonKind::NumberValue(number)) if !number.is_finite() => {
            return Err("has a number that is not finite");
        }
        Some(JsonKind::NumberValue(number))
            if number.fract() == 0.0 && number.abs() < EXACT_BELOW =>
        {
            (number as i64).into()
        }
        Some(JsonKind::NumberValue(number)) => number.into(),
        Some(JsonKind::ListValue(list)) => {
            let values = list.values.into_iter().map(|value| json_of(value, depth));
            values.collect::<Result<Vec<_>, _>>()?.into()
        }
        Some(JsonKind::StructValue(object)) => {
            let fields = object.fields.into_iter();
            let fields = fields.map(|(name, value)| Ok::<_, &str>((name, json_of(value, depth)?)));
            fields.collect::<Result<serde_json::Map<_, _>, _>>()?.into()
        }
    })
}

fn value_of(json: serde_json::Value) -> Value {
    use serde_json::Value as Json;
    let kind = match json {
        Json::Null => JsonKind::NullValue(0),
        Json::Bool(value) => JsonKind::BoolValue(value),
        Json::Number(number) => JsonKind::NumberValue(number.as_f64().unwrap_or_default()),
        Json::String(text) => JsonKind::StringValue(text),
        Json::Array(values) => JsonKind::ListValue(prost_types::ListValue {
            values: values.into_iter().map(value_of).collect(),
        }),
        Json::Object(object) => JsonKind::StructValue(struct_of(object)),
    };
    Value { kind: Some(kind) }
}

fn struct_of(object: serde_json::Map<String, serde_json::Value>) -> Struct {
    Struct { fields: object.into_iter().map(|(name, json)| (name, value_of(json))).collect() }
}

/// A status that a request names; `None`: unspecified.
pub fn status_filter(path: &str, number: i32, found: &mut Violations) -> Option<Status> {
    use pb::PaymentStatus as Wire;
    let Ok(wire) = Wire::try_from(number) else {
        found.add(path, format!("is {number}, which names no PaymentStatus"));
        return None;
    };
    match wire {
        Wire::Unspecified => None,
        Wire::Pending => Some(Status::Pending),
        Wire::Processing => Some(Status::Processing),
        Wire::Completed => Some(Status::Completed),
        Wire::Failed => Some(Status::Failed),
        Wire::Cancelled => Some(Status::Cancelled),
        Wire::Refunded => Some(Status::Refunded),
        Wire::Expired => Some(Status::Expired),
    }
}

/// A moment that a request names, in milliseconds.
pub fn moment(
    path: &str,
    wire: Option<prost_types::Timestamp>,
    found: &mut Violations,
) -> Option<Timestamp> {
    let wire = wire?;
    let ms = wire
        .seconds
        .checked_mul(1_000)
        .and_then(|ms| ms.checked_add(i64::from(wire.nanos) / 1_000_000));
    let whole =
        (0..=LAST_SECOND).contains(&wire.seconds) && (0..1_000_000_000).contains(&wire.nanos);
    let ms = ms.filter(|_| whole);
    if ms.is_none() {
        found.add(path, "must be a moment from 1970 to 9999");
    }
    ms.map(Timestamp::from_ms)
}

pub fn wire_status(status: Status) -> pb::PaymentStatus {
    use pb::PaymentStatus as Wire;
    match status {
        Status::Pending => Wire::Pending,
        Status::Processing => Wire::Processing,
        Status::Completed => Wire::Completed,
        Status::Failed => Wire::Failed,
        Status::Cancelled => Wire::Cancelled,
        Status::Refunded => Wire::Refunded,
        Status::Expired => Wire::Expired,
    }
}

pub fn wire_time(at: Timestamp) -> prost_types::Timestamp {
    let nanos = i32::try_from(at.ms().rem_euclid(1_000) * 1_000_000).expect("below a second");
    prost_types::Timestamp { seconds: at.seconds(), nanos }
}

fn wire_money(amount: u64, currency: Currency) -> common::Money {
    // Amounts are at most 10^12, sums of refunds at most the payment's.
    let amount = i64::try_from(amount).expect("amounts fit into 63 bits");
    common::Money { amount, currency: currency.code().to_owned() }
}

/// Made from what never changes, so that it is the same bytes for ever.
pub fn created(
    terms: &Terms,
    secret: &StoreSecret,
    public_url: Option<&str>,
) -> pb::CreatePaymentIntentResponse {
    let id = terms.id.intent();
    pb::CreatePaymentIntentResponse {
        status: pb::PaymentStatus::Pending.into(),
        client_secret: terms.id.client_secret(secret),
        payment_url: public_url
            .map(|base| format!("{}/pay/{id}", base.trim_end_matches('/')))
            .unwrap_or_default(),
        expires_at: Some(wire_time(terms.plan.expires_at)),
        payment_intent_id: id,
        error: None,
    }
}

pub fn processed(payment: &Payment) -> pb::ProcessPaymentResponse {
    let decision = payment.progress.state.decision();
    pb::ProcessPaymentResponse {
        payment_id: payment.terms.id.payment(),
        status: wire_status(payment.status()).into(),
        processed_at: decision.map(|(_, at)| wire_time(at)),
        transaction_id: decision.map(|_| payment.terms.id.transaction()).unwrap_or_default(),
        result: decision.map(result),
        error: None,
    }
}

fn result((outcome, at): (Outcome, Timestamp)) -> pb::PaymentResult {
    let (success, reason, text, code) = match outcome {
        Outcome::Completed => (true, "", "Approved", 0),
        Outcome::Failed(reason) => {
            (false, reason.as_str(), reason.gateway_response(), reason.response_code())
        }
    };
    pb::PaymentResult {
        success,
        failure_reason: reason.to_owned(),
        gateway_response: text.to_owned(),
        response_code: code,
        processed_at: Some(wire_time(at)),
    }
}

/// The payment as callers see it.
pub fn payment(payment: &Payment) -> pb::Payment {
    let (terms, progress) = (&payment.terms, &payment.progress);
    let currency = terms.amount.currency;
    let decision = progress.state.decision();
    let approved = matches!(decision, Some((Outcome::Completed, _)));
    let refunded = payment.refunded_amount();
    pb::Payment {
        payment_intent_id: terms.id.intent(),
        payment_id: terms.id.payment(),
        reservation_id: owned(&terms.reservation_id),
        user_id: owned(&terms.user_id),
        status: wire_status(payment.status()).into(),
        amount: Some(wire_money(terms.amount.amount, currency)),
        method: wire_method(terms.method).into(),
        created_at: Some(wire_time(terms.created_at)),
        updated_at: Some(wire_time(progress.updated_at)),
        processed_at: decision.map(|(_, at)| wire_time(at)),
        transaction_id: decision.map(|_| terms.id.transaction()).unwrap_or_default(),
        result: decision.map(result),
        metadata: terms.metadata.as_ref().map(wire_metadata),
        scenario: wire_scenario(terms.plan.scenario).into(),
        scenario_name: String::new(),
        provider: owned(&terms.provider),
        approval_no: if approved { terms.id.approval_no() } else { String::new() },
        refunded_amount: (refunded > 0).then(|| wire_money(refunded, currency)),
        refunds: refunds(payment, currency),
        expires_at: Some(wire_time(terms.plan.expires_at)),
        card: payment.card().map(wire_card),
        echo: terms.echo.as_deref().and_then(|json| serde_json::from_str(json).ok()).map(struct_of),
        version: i64::from(progress.version),
        timeline: progress.timeline.entries().iter().map(timeline_entry).collect(),
        vat: payment.vat().map(|vat| wire_money(vat, currency)),
        refunded_vat: payment.refunded_vat().map(|vat| wire_money(vat, currency)),
    }
}

fn refunds(payment: &Payment, currency: Currency) -> Vec<pb::Refund> {
    let refund = |(n, refund): (usize, &crate::domain::refund::Refund)| pb::Refund {
        refund_id: payment.terms.id.refund(n),
        amount: Some(wire_money(refund.amount, currency)),
        vat: refund.vat.map(|vat| wire_money(vat, currency)),
        reason: refund.reason.clone(),
        created_at: Some(wire_time(refund.at)),
    };
    (1..).zip(&payment.progress.refunds).map(refund).collect()
}

fn wire_method(method: Method) -> pb::PaymentMethod {
    match method {
        Method::Unspecified => pb::PaymentMethod::Unspecified,
        Method::CreditCard => pb::PaymentMethod::CreditCard,
        Method::DebitCard => pb::PaymentMethod::DebitCard,
        Method::BankTransfer => pb::PaymentMethod::BankTransfer,
        Method::MobilePay => pb::PaymentMethod::MobilePay,
        Method::DigitalWallet => pb::PaymentMethod::DigitalWallet,
    }
}

fn wire_scenario(scenario: Scenario) -> pb::PaymentScenario {
    match scenario {
        Scenario::Approve => pb::PaymentScenario::Approve,
        Scenario::Fail => pb::PaymentScenario::Fail,
        Scenario::Delay => pb::PaymentScenario::Delay,
        Scenario::Random => pb::PaymentScenario::Random,
        Scenario::Timeout => pb::PaymentScenario::Timeout,
        Scenario::Manual => pb::PaymentScenario::Manual,
    }
}

/// As messages hold texts.
fn owned(text: &Text) -> String {
    text.as_str().to_owned()
}

fn wire_metadata(metadata: &Metadata) -> pb::PaymentMetadata {
    pb::PaymentMetadata {
        source: owned(&metadata.source),
        user_agent: owned(&metadata.user_agent),
        ip_address: owned(&metadata.ip_address),
        session_id: owned(&metadata.session_id),
        scenario: pb::PaymentScenario::Unspecified.into(),
        tags: metadata.tags.iter().map(|(name, value)| (owned(name), owned(value))).collect(),
    }
}

fn wire_card(card: &Card) -> pb::Card {
    pb::Card {
        brand: card.brand.as_str().to_owned(),
        masked_number: card.masked_number(),
        expiry_month: card.expiry.map(|e| format!("{:02}", e.month)).unwrap_or_default(),
        expiry_year: card.expiry.map(|e| e.year.to_string()).unwrap_or_default(),
        installment_months: i32::from(card.installment_months),
    }
}

fn timeline_entry(entry: &timeline::Entry) -> pb::TimelineEntry {
    pb::TimelineEntry {
        at: Some(wire_time(entry.at)),
        kind: entry.kind.as_str().to_owned(),
        status: wire_status(entry.status).into(),
        cause: entry.cause.as_str().to_owned(),
        detail: entry
            .detail
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_string()))
            .collect::<BTreeMap<_, _>>(),
    }
}

/// The reply to a CancelPayment: `refund` is the number of the refund that it was.
pub fn cancelled(
    payment: &Payment,
    at: Timestamp,
    refund: Option<usize>,
) -> pb::CancelPaymentResponse {
    let terms = &payment.terms;
    let amount = refund.and_then(|n| payment.progress.refunds.get(n - 1)).map(|r| r.amount);
    pb::CancelPaymentResponse {
        status: wire_status(payment.status()).into(),
        cancelled_at: Some(wire_time(at)),
        refunded_amount: amount.map(|amount| wire_money(amount, terms.amount.currency)),
        refund_id: refund.map(|n| terms.id.refund(n)).unwrap_or_default(),
        error: None,
    }
}

/// A payment's deliveries, oldest notification first.
pub fn deliveries(payment: &Payment) -> Vec<pb::Delivery> {
    payment.deliveries().map(|listed| delivery(payment, &listed)).collect()
}

pub fn delivery(payment: &Payment, listed: &Listed<'_>) -> pb::Delivery {
    let Listed { notification, channel, delivery, standing } = *listed;
    let terms = &payment.terms;
    let url = match channel {
        Channel::Event | Channel::DeadLetter => String::new(),
        Channel::Webhook => terms.webhook_url.as_deref().unwrap_or_default().to_owned(),
    };
    pb::Delivery {
        delivery_id: DeliveryId { payment: terms.id, no: listed.no() }.to_string(),
        channel: channel.as_str().to_owned(),
        event_type: notification.topic.event_type().to_owned(),
        state: standing.as_str().to_owned(),
        url,
        due_at: delivery.due().map(wire_time),
        attempts: delivery.attempts.iter().map(wire_attempt).collect(),
        attempts_made: i32::try_from(delivery.attempts_made).unwrap_or(i32::MAX),
    }
}

fn wire_attempt(attempt: &delivery::Attempt) -> pb::Attempt {
    pb::Attempt {
        at: Some(wire_time(attempt.at)),
        http_status: attempt.http_status.map_or(0, i32::from),
        latency_ms: i32::try_from(attempt.latency_ms).unwrap_or(i32::MAX),
        error: attempt.error.clone().unwrap_or_default(),
    }
}
