//! What a request should come to, told from the contract's words and from nothing of the service's code.

use std::collections::BTreeSet;

use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, ReflectMessage, Value};
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// Stands for a payment that exists; the runner puts a real one's id in its place. Of the same length.
pub const EXISTING: &str = "pi_00000000000000000000000000";
pub const OWNER: &str = "user-1";
/// Of the payments that exist.
pub const AMOUNT: i64 = 1_000;
pub const VAT: i64 = 90;
pub const CURRENCY: &str = "KRW";

pub const AMOUNT_MAX: i64 = 1_000_000_000_000;
pub const NAME_CHARS: usize = 128;
pub const TEXT_CHARS: usize = 255;
pub const URL_CHARS: usize = 2_048;
pub const TAG_NAME_CHARS: usize = 64;
pub const TAG_VALUE_CHARS: usize = 512;
pub const TAGS_MAX: usize = 50;
pub const ECHO_BYTES: usize = 4_096;
pub const ECHO_LEVELS: usize = 32;
pub const REQUEST_BYTES: usize = 65_536;
pub const DELAY_MAX: i64 = 86_400;
pub const INSTALLMENTS_MAX: i64 = 60;
pub const PAGE_SIZE_MAX: i64 = 100;
pub const PAGED_MAX: i64 = 10_000;
/// 9999-12-31T23:59:59Z, the last second that a google.protobuf.Timestamp can tell.
pub const LAST_SECOND: i64 = 253_402_300_799;
pub const VIOLATIONS_MAX: usize = 20;
const TRAILER_BYTES_MAX: usize = 8_192;
const MESSAGE_BYTES_MAX: usize = 1_024;

/// Reason and code, as the contract's table has them.
const REASONS: [(&str, Code); 18] = [
    ("VALIDATION_FAILED", Code::InvalidArgument),
    ("PAYMENT_NOT_FOUND", Code::NotFound),
    ("IDEMPOTENCY_CONFLICT", Code::AlreadyExists),
    ("INVALID_STATE", Code::FailedPrecondition),
    ("NO_WEBHOOK_URL", Code::FailedPrecondition),
    ("REFUND_EXCEEDS_REMAINING", Code::FailedPrecondition),
    ("CURSOR_EXPIRED", Code::FailedPrecondition),
    ("NOT_YOURS", Code::PermissionDenied),
    ("OVERLOADED", Code::ResourceExhausted),
    ("STORE_FULL", Code::ResourceExhausted),
    ("PROVIDER_THROTTLED", Code::ResourceExhausted),
    ("SLOW_READER", Code::ResourceExhausted),
    ("STORE_UNAVAILABLE", Code::Unavailable),
    ("DRAINING", Code::Unavailable),
    ("DEADLINE", Code::DeadlineExceeded),
    ("MALFORMED", Code::InvalidArgument),
    ("MESSAGE_TOO_LARGE", Code::ResourceExhausted),
    ("TOKEN_REQUIRED", Code::Unauthenticated),
];

/// Every field that a rule below speaks of: a field without one fails the test that counts them.
pub const RULED: [(&str, &[&str]); 9] = [
    (
        "CreatePaymentIntent",
        &[
            "reservation_id",
            "amount.amount",
            "amount.currency",
            "user_id",
            "method",
            "scenario",
            "webhook_url",
            "idempotency_key",
            "metadata.source",
            "metadata.user_agent",
            "metadata.ip_address",
            "metadata.session_id",
            "metadata.scenario",
            "metadata.tags",
            "payment_details.method",
            "payment_details.credit_card.card_number",
            "payment_details.credit_card.expiry_month",
            "payment_details.credit_card.expiry_year",
            "payment_details.credit_card.cardholder_name",
            "payment_details.credit_card.cvv",
            "payment_details.credit_card.installment_months",
            "payment_details.credit_card.vat.amount",
            "payment_details.credit_card.vat.currency",
            "payment_details.bank_transfer.bank_code",
            "payment_details.bank_transfer.account_number",
            "payment_details.bank_transfer.account_holder",
            "payment_details.mobile_pay.provider",
            "payment_details.mobile_pay.mobile_number",
            "scenario_name",
            "provider",
            "echo",
        ],
    ),
    ("GetPaymentIntent", &["payment_intent_id", "user_id"]),
    ("GetPaymentStatus", &["payment_intent_id", "user_id"]),
    (
        "ProcessPayment",
        &[
            "payment_intent_id",
            "idempotency_key",
            "payment_details.method",
            "payment_details.credit_card.card_number",
            "payment_details.credit_card.expiry_month",
            "payment_details.credit_card.expiry_year",
            "payment_details.credit_card.cardholder_name",
            "payment_details.credit_card.cvv",
            "payment_details.credit_card.installment_months",
            "payment_details.credit_card.vat.amount",
            "payment_details.credit_card.vat.currency",
            "payment_details.bank_transfer.bank_code",
            "payment_details.bank_transfer.account_number",
            "payment_details.bank_transfer.account_holder",
            "payment_details.mobile_pay.provider",
            "payment_details.mobile_pay.mobile_number",
        ],
    ),
    (
        "CancelPayment",
        &[
            "payment_intent_id",
            "reason",
            "refund_amount.amount",
            "refund_amount.currency",
            "idempotency_key",
            "refund_vat.amount",
            "refund_vat.currency",
        ],
    ),
    (
        "ListPayments",
        &[
            "user_id",
            "status",
            "reservation_id",
            "pagination.page",
            "pagination.page_size",
            "pagination.cursor",
            "created_from.seconds",
            "created_from.nanos",
            "created_to.seconds",
            "created_to.nanos",
        ],
    ),
    ("SimulateWebhook", &["payment_intent_id", "target_status", "delay_seconds", "force_trigger"]),
    (
        "ListDeliveries",
        &[
            "filter.state",
            "filter.channel",
            "filter.payment_intent_id",
            "filter.origin",
            "page_size",
            "cursor",
        ],
    ),
    (
        "Redeliver",
        &[
            "delivery_id",
            "filter.state",
            "filter.channel",
            "filter.payment_intent_id",
            "filter.origin",
            "cursor",
        ],
    ),
];

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    Accepted,
    /// VALIDATION_FAILED naming exactly these fields.
    Fields(BTreeSet<String>),
    Reason(&'static str),
    /// Without google.rpc details: no such method, an encoding that is not spoken.
    Unimplemented,
}

impl Expected {
    pub fn field(name: &str) -> Self {
        Self::Fields([name.to_owned()].into())
    }
}

pub fn pool() -> DescriptorPool {
    let bytes = include_bytes!(concat!(env!("OUT_DIR"), "/payment_sim_descriptor.bin"));
    DescriptorPool::decode(&bytes[..]).expect("descriptors")
}

/// What the bytes of a request to a method should come to.
pub fn judge(method: &str, request: &MessageDescriptor, bytes: &[u8]) -> Expected {
    if bytes.len() > REQUEST_BYTES {
        return Expected::Reason("MESSAGE_TOO_LARGE");
    }
    match DynamicMessage::decode(request.clone(), bytes) {
        Ok(message) => judge_message(method, &message),
        Err(_) => Expected::Reason("MALFORMED"),
    }
}

fn judge_message(method: &str, message: &DynamicMessage) -> Expected {
    let mut found = Found::default();
    let asked = Asked(message);
    match method {
        "CreatePaymentIntent" => create(&asked, &mut found),
        "GetPaymentIntent" | "GetPaymentStatus" => {
            id(&asked, &mut found);
            optional_name(&asked, "user_id", &mut found);
        }
        "ProcessPayment" => {
            id(&asked, &mut found);
            key(&asked, &mut found);
            details(&asked, &mut found);
        }
        "CancelPayment" => {
            id(&asked, &mut found);
            key(&asked, &mut found);
            text(&asked, "reason", TEXT_CHARS, &mut found);
            money(&asked, "refund_amount", 1, &mut found);
            money(&asked, "refund_vat", 0, &mut found);
        }
        "ListPayments" => list(&asked, &mut found),
        "SimulateWebhook" => {
            id(&asked, &mut found);
            choice(&asked, "target_status", &STATUSES, &mut found);
            range(&asked, "delay_seconds", 0, DELAY_MAX, &mut found);
        }
        "ListDeliveries" => {
            filter(&asked, &["OWED", "HELD", "DELIVERED", "DEAD"], &mut found);
            range(&asked, "page_size", 0, PAGE_SIZE_MAX, &mut found);
            no_cursor(&asked, &mut found);
        }
        "Redeliver" if asked.has("filter") => {
            filter(&asked, &["DEAD"], &mut found);
            no_cursor(&asked, &mut found);
        }
        "Redeliver" => {
            if !is_delivery(&asked.text("delivery_id")) {
                found.bad("delivery_id");
            }
            // Without either of the two there is nothing that a cursor could belong to.
            if asked.has("delivery_id") {
                no_cursor(&asked, &mut found);
            }
        }
        other => panic!("the oracle knows no {other}"),
    }
    found.or(|| afterwards(method, &asked))
}

/// What is looked at once the message by itself is good.
fn afterwards(method: &str, asked: &Asked<'_>) -> Expected {
    if asked.holds("payment_intent_id") && asked.text("payment_intent_id") != EXISTING {
        return Expected::Reason("PAYMENT_NOT_FOUND");
    }
    let mut found = Found::default();
    match method {
        // None of the cases names a delivery that exists.
        "Redeliver" if asked.has("delivery_id") => return Expected::Reason("PAYMENT_NOT_FOUND"),
        "GetPaymentIntent" | "GetPaymentStatus"
            if !["", OWNER].contains(&asked.text("user_id").as_str()) =>
        {
            return Expected::Reason("NOT_YOURS");
        }
        "ProcessPayment" => vat_of(asked, AMOUNT, CURRENCY, &mut found),
        "CancelPayment" => {
            for part in ["refund_amount", "refund_vat"] {
                let currency = format!("{part}.currency");
                if asked.has(part) && asked.text(&currency) != CURRENCY {
                    found.bad(&currency);
                }
            }
            return found.or(|| refund(asked));
        }
        _ => {}
    }
    found.or(|| Expected::Accepted)
}

fn refund(asked: &Asked<'_>) -> Expected {
    let amount =
        if asked.has("refund_amount") { asked.int("refund_amount.amount") } else { AMOUNT };
    let fits_amount = (1..=AMOUNT).contains(&amount);
    let fits_vat = !asked.has("refund_vat") || {
        let vat = asked.int("refund_vat.amount");
        vat <= VAT && vat <= amount && VAT - vat <= AMOUNT - amount
    };
    // Without a refund_vat it is an eleventh, which fits where the payment's own VAT is one.
    if fits_amount && fits_vat {
        Expected::Accepted
    } else {
        Expected::Reason("REFUND_EXCEEDS_REMAINING")
    }
}

const METHODS: [i64; 6] = [0, 1, 2, 3, 4, 5];
const SCENARIOS: [i64; 7] = [0, 1, 2, 3, 4, 5, 100];
const STATUSES: [i64; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
const CHANNELS: [&str; 3] = ["event", "webhook", "dead_letter"];

fn create(asked: &Asked<'_>, found: &mut Found) {
    name(asked, "reservation_id", found);
    name(asked, "user_id", found);
    if asked.has("amount") {
        money(asked, "amount", 1, found);
    } else {
        found.bad("amount");
    }
    choice(asked, "method", &METHODS, found);
    choice(asked, "scenario", &SCENARIOS, found);
    if !is_url(&asked.text("webhook_url")) {
        found.bad("webhook_url");
    }
    key(asked, found);
    for field in ["source", "user_agent", "ip_address", "session_id"] {
        text(asked, &format!("metadata.{field}"), TEXT_CHARS, found);
    }
    choice(asked, "metadata.scenario", &SCENARIOS, found);
    tags(asked, found);
    details(asked, found);
    let amount_is_good = asked.has("amount")
        && (1..=AMOUNT_MAX).contains(&asked.int("amount.amount"))
        && is_currency(&asked.text("amount.currency"));
    if amount_is_good {
        vat_of(asked, asked.int("amount.amount"), &asked.text("amount.currency"), found);
    }
    if !asked.text("scenario_name").is_empty() {
        found.bad("scenario_name");
    }
    if !["", "sim"].contains(&asked.text("provider").as_str()) {
        found.bad("provider");
    }
    echo(asked, found);
}

fn details(asked: &Asked<'_>, found: &mut Found) {
    choice(asked, "payment_details.method", &METHODS, found);
    for field in [
        "bank_transfer.bank_code",
        "bank_transfer.account_number",
        "bank_transfer.account_holder",
        "mobile_pay.provider",
        "mobile_pay.mobile_number",
        "credit_card.cardholder_name",
    ] {
        text(asked, &format!("payment_details.{field}"), TEXT_CHARS, found);
    }
    if !asked.has("payment_details.credit_card") {
        return;
    }
    let of = |field: &str| format!("payment_details.credit_card.{field}");
    if !is_card_number(&asked.text(&of("card_number"))) {
        found.bad(&of("card_number"));
    }
    expiry(&asked.text(&of("expiry_month")), &asked.text(&of("expiry_year")), found);
    let cvv = asked.text(&of("cvv"));
    if !(cvv.is_empty() || is_digits(&cvv) && (3..=4).contains(&cvv.len())) {
        found.bad(&of("cvv"));
    }
    range(asked, &of("installment_months"), 0, INSTALLMENTS_MAX, found);
    money(asked, &of("vat"), 0, found);
}

/// VAT is part of an amount: in its currency, and not more than it.
fn vat_of(asked: &Asked<'_>, amount: i64, currency: &str, found: &mut Found) {
    let path = "payment_details.credit_card.vat";
    if !asked.has(path) {
        return;
    }
    let (vat, of_vat) =
        (asked.int(&format!("{path}.amount")), asked.text(&format!("{path}.currency")));
    if !(0..=AMOUNT_MAX).contains(&vat) || !is_currency(&of_vat) {
        return;
    }
    if of_vat != currency {
        found.bad(&format!("{path}.currency"));
    } else if vat > amount {
        found.bad(&format!("{path}.amount"));
    }
}

/// "1" to "12"; "YY" or "YYYY"; both or neither; not in the past. The cases keep clear of this month.
fn expiry(month: &str, year: &str, found: &mut Found) {
    if month.is_empty() && year.is_empty() {
        return;
    }
    let number = |text: &str| is_digits(text).then(|| text.parse::<u32>().ok()).flatten();
    let good_month =
        number(month).filter(|n| (1..=12).contains(n) && (1..=2).contains(&month.len()));
    let good_year = match year.len() {
        2 => number(year).map(|year| 2_000 + year),
        4 => number(year).filter(|year| (2_000..=2_099).contains(year)),
        _ => None,
    };
    if good_month.is_none() {
        found.bad("payment_details.credit_card.expiry_month");
    }
    let expired = good_year.is_some_and(|year| year < 2_026);
    if good_year.is_none() || good_month.is_some() && expired {
        found.bad("payment_details.credit_card.expiry_year");
    }
}

fn list(asked: &Asked<'_>, found: &mut Found) {
    optional_name(asked, "user_id", found);
    optional_name(asked, "reservation_id", found);
    choice(asked, "status", &STATUSES, found);
    for field in ["created_from", "created_to"] {
        let of = |part: &str| asked.int(&format!("{field}.{part}"));
        let good =
            (0..=LAST_SECOND).contains(&of("seconds")) && (0..1_000_000_000).contains(&of("nanos"));
        if asked.has(field) && !good {
            found.bad(field);
        }
    }
    let (page, size) = (asked.int("pagination.page"), asked.int("pagination.page_size"));
    let good_size = (0..=PAGE_SIZE_MAX).contains(&size);
    if !good_size {
        found.bad("pagination.page_size");
    }
    let cursor = asked.text("pagination.cursor");
    if !cursor.is_empty() {
        // None of the cases has a cursor of ours.
        found.bad("pagination.cursor");
    } else {
        let size = if good_size && size > 0 { size } else { 20 };
        if page < 0 || page.max(1) * size > PAGED_MAX {
            found.bad("pagination.page");
        }
    }
}

fn filter(asked: &Asked<'_>, states: &[&str], found: &mut Found) {
    let empty_or = |path: &str, is_good: &dyn Fn(&str) -> bool, found: &mut Found| {
        let text = asked.text(path);
        if !(text.is_empty() || is_good(&text)) {
            found.bad(path);
        }
    };
    empty_or("filter.state", &|text| states.contains(&text), found);
    empty_or("filter.channel", &|text| CHANNELS.contains(&text), found);
    empty_or("filter.payment_intent_id", &is_id, found);
    empty_or("filter.origin", &is_origin, found);
}

/// None of the cases has a cursor of ours.
fn no_cursor(asked: &Asked<'_>, found: &mut Found) {
    if !asked.text("cursor").is_empty() {
        found.bad("cursor");
    }
}

/// A URL with nothing behind its host and port but a slash.
fn is_origin(text: &str) -> bool {
    let bare = text.strip_suffix('/').unwrap_or(text);
    let rest = bare.split_once("://").map_or("", |(_, rest)| rest);
    !rest.is_empty() && !rest.contains(['/', '?']) && is_url(text)
}

fn is_delivery(text: &str) -> bool {
    let parts = text.strip_prefix("dlv_").map(|rest| rest.splitn(3, '_').collect::<Vec<_>>());
    let Some([payment, n, channel]) = parts.as_deref() else { return false };
    let number = n.parse::<u32>().is_ok_and(|number| number.to_string() == *n);
    is_id(&format!("pi_{payment}")) && number && CHANNELS.contains(channel)
}

fn tags(asked: &Asked<'_>, found: &mut Found) {
    let Some(Value::Map(tags)) = asked.get("metadata.tags") else { return };
    let too_long = tags.iter().any(|(name, value)| {
        let name = name.as_str().map_or(0, |name| name.chars().count());
        let value = value.as_str().map_or(0, |value| value.chars().count());
        name > TAG_NAME_CHARS || value > TAG_VALUE_CHARS
    });
    if too_long || tags.len() > TAGS_MAX {
        found.bad("metadata.tags");
    }
}

/// At most 4 KiB as JSON, numbers finite, nested at most 32 levels.
fn echo(asked: &Asked<'_>, found: &mut Found) {
    let Some(Value::Message(echo)) = asked.get("echo") else { return };
    if !asked.has("echo") {
        return;
    }
    let good = object(&echo, ECHO_LEVELS).is_some_and(|json| json.to_string().len() <= ECHO_BYTES);
    if !good {
        found.bad("echo");
    }
}

fn object(message: &DynamicMessage, levels: usize) -> Option<serde_json::Value> {
    let levels = levels.checked_sub(1)?;
    let fields = message.get_field_by_name("fields")?.into_owned();
    let Value::Map(fields) = fields else { return None };
    let mut json = serde_json::Map::new();
    for (name, value) in fields {
        json.insert(name.as_str()?.to_owned(), value_of(value.as_message()?, levels)?);
    }
    Some(json.into())
}

/// `None`: not allowed.
fn value_of(message: &DynamicMessage, levels: usize) -> Option<serde_json::Value> {
    let kind =
        message.fields().next().map(|(field, value)| (field.name().to_owned(), value.clone()));
    let Some((name, value)) = kind else {
        return (levels > 0).then_some(serde_json::Value::Null);
    };
    match (name.as_str(), value) {
        _ if levels == 0 => None,
        ("null_value", _) => Some(serde_json::Value::Null),
        ("bool_value", Value::Bool(value)) => Some(value.into()),
        ("string_value", Value::String(value)) => Some(value.into()),
        ("number_value", Value::F64(value)) if value.is_finite() => {
            let exact = value.fract() == 0.0 && value.abs() < 9_007_199_254_740_992.0;
            Some(if exact { (value as i64).into() } else { value.into() })
        }
        ("struct_value", Value::Message(value)) => object(&value, levels),
        ("list_value", Value::Message(value)) => {
            let levels = levels.checked_sub(1)?;
            let values = value.get_field_by_name("values")?.into_owned();
            let Value::List(values) = values else { return None };
            let values = values.iter().map(|value| value_of(value.as_message()?, levels));
            Some(values.collect::<Option<Vec<_>>>()?.into())
        }
        _ => None,
    }
}

// ---- Rules that several fields share ----

fn name(asked: &Asked<'_>, path: &str, found: &mut Found) {
    let value = asked.text(path);
    let chars = value.chars().count();
    if !(1..=NAME_CHARS).contains(&chars) || value.contains(char::is_control) {
        found.bad(path);
    }
}

fn optional_name(asked: &Asked<'_>, path: &str, found: &mut Found) {
    if !asked.text(path).is_empty() {
        name(asked, path, found);
    }
}

fn text(asked: &Asked<'_>, path: &str, max: usize, found: &mut Found) {
    if asked.text(path).chars().count() > max {
        found.bad(path);
    }
}

fn key(asked: &Asked<'_>, found: &mut Found) {
    let key = asked.text("idempotency_key");
    if key.len() > 255 || !key.bytes().all(|b| (b' '..=b'~').contains(&b)) {
        found.bad("idempotency_key");
    }
}

fn id(asked: &Asked<'_>, found: &mut Found) {
    if !is_id(&asked.text("payment_intent_id")) {
        found.bad("payment_intent_id");
    }
}

fn is_id(text: &str) -> bool {
    let body = text.strip_prefix("pi_").or_else(|| text.strip_prefix("pay_")).unwrap_or("");
    let crockford = |b: u8| b"0123456789ABCDEFGHJKMNPQRSTVWXYZ".contains(&b);
    body.len() == 26 && body.bytes().all(crockford) && body.as_bytes()[0] <= b'7'
}

fn money(asked: &Asked<'_>, path: &str, least: i64, found: &mut Found) {
    if !asked.has(path) {
        return;
    }
    range(asked, &format!("{path}.amount"), least, AMOUNT_MAX, found);
    let currency = format!("{path}.currency");
    if !is_currency(&asked.text(&currency)) {
        found.bad(&currency);
    }
}

/// The cases name no others.
fn is_currency(text: &str) -> bool {
    ["KRW", "USD", "JPY", "BHD"].contains(&text)
}

fn choice(asked: &Asked<'_>, path: &str, known: &[i64], found: &mut Found) {
    if !known.contains(&asked.int(path)) {
        found.bad(path);
    }
}

fn range(asked: &Asked<'_>, path: &str, least: i64, most: i64, found: &mut Found) {
    if !(least..=most).contains(&asked.int(path)) {
        found.bad(path);
    }
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

fn is_card_number(text: &str) -> bool {
    let digits: Vec<u32> = text.chars().filter_map(|c| c.to_digit(10)).collect();
    let doubled = |n: u32| n * 2 / 10 + n * 2 % 10;
    let sum: u32 = digits
        .iter()
        .rev()
        .enumerate()
        .map(|(at, n)| if at % 2 == 0 { *n } else { doubled(*n) })
        .sum();
    is_digits(text) && (12..=19).contains(&text.len()) && sum.is_multiple_of(10)
}

/// Good enough for the cases: absolute http(s), a host, a port that is one, nobody's name, no fragment,
/// and of RFC 3986's alphabet what lies in ASCII.
fn is_url(text: &str) -> bool {
    if text.is_empty() {
        return true;
    }
    let rest = ["http://", "https://"].iter().find_map(|scheme| text.strip_prefix(scheme));
    let Some(rest) = rest else { return false };
    let authority = rest.split(['/', '?']).next().unwrap_or("");
    let (host, port) = authority.rsplit_once(':').unwrap_or((authority, "80"));
    text.chars().count() <= URL_CHARS
        && !text.contains(|c: char| c.is_control() || c.is_whitespace() || c == '#' || c == '\\')
        && !host.is_empty()
        && !host.contains(['@', '%', '<', '>', '[', ']'])
        && port.parse::<u16>().is_ok()
}

#[derive(Default)]
struct Found(BTreeSet<String>);

impl Found {
    fn bad(&mut self, path: &str) {
        self.0.insert(path.to_owned());
    }

    fn or(self, otherwise: impl FnOnce() -> Expected) -> Expected {
        if self.0.is_empty() { otherwise() } else { Expected::Fields(self.0) }
    }
}

/// A request, read by paths; what is absent reads as its default.
struct Asked<'a>(&'a DynamicMessage);

impl Asked<'_> {
    fn get(&self, path: &str) -> Option<Value> {
        let mut message = self.0.clone();
        let mut names = path.split('.').peekable();
        while let Some(name) = names.next() {
            let value = message.get_field_by_name(name)?.into_owned();
            if names.peek().is_none() {
                return Some(value);
            }
            if !message.has_field_by_name(name) {
                return None;
            }
            let Value::Message(inner) = value else { panic!("{path}: {name} is no message") };
            message = inner;
        }
        None
    }

    /// Whether the message at a path was sent.
    fn has(&self, path: &str) -> bool {
        match path.rsplit_once('.') {
            None => self.0.has_field_by_name(path),
            Some((parent, name)) => {
                self.has(parent)
                    && self
                        .get(parent)
                        .and_then(|parent| parent.as_message().map(|m| m.has_field_by_name(name)))
                        .unwrap_or(false)
            }
        }
    }

    fn holds(&self, name: &str) -> bool {
        self.0.descriptor().get_field_by_name(name).is_some()
    }

    fn text(&self, path: &str) -> String {
        self.get(path).and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
    }

    fn int(&self, path: &str) -> i64 {
        match self.get(path) {
            Some(Value::I32(n) | Value::EnumNumber(n)) => n.into(),
            Some(Value::I64(n)) => n,
            _ => 0,
        }
    }
}

// ---- What came, against what should have come ----

/// The rules for every refusal, whatever it says. `Err` tells what is wrong.
pub fn check(status: &Status, status_bytes: usize, expected: &Expected) -> Result<(), String> {
    if status_bytes > TRAILER_BYTES_MAX {
        return Err(format!("the trailers have {status_bytes} bytes"));
    }
    if status.code() == Code::Ok {
        return (*expected == Expected::Accepted).then_some(()).ok_or("was accepted".to_owned());
    }
    let info = status.get_details_error_info();
    let Some(info) = info else {
        let is_it = *expected == Expected::Unimplemented && status.code() == Code::Unimplemented;
        return if is_it { Ok(()) } else { Err(format!("no ErrorInfo: {status:?}")) };
    };
    let told = format!("{:?} {}: {}", status.code(), info.reason, status.message());
    if info.domain != "payment-sim" || !REASONS.contains(&(info.reason.as_str(), status.code())) {
        return Err(format!("not in the table: {told}"));
    }
    if status.message().is_empty() || status.message().len() > MESSAGE_BYTES_MAX {
        return Err(format!("a message of {} bytes", status.message().len()));
    }
    match expected {
        Expected::Reason(reason) if *reason == info.reason => Ok(()),
        Expected::Fields(fields) if info.reason == "VALIDATION_FAILED" => {
            named(status, fields).map_err(|why| format!("{why}: {told}"))
        }
        _ => Err(told),
    }
}

/// All bad fields and no others; past twenty entries their number.
fn named(status: &Status, fields: &BTreeSet<String>) -> Result<(), String> {
    let violations = status.get_details_bad_request().ok_or("no BadRequest")?.field_violations;
    if let Some(bare) = violations.iter().find(|violation| violation.description.is_empty()) {
        return Err(format!("{} is not told what is wrong", bare.field));
    }
    let mut listed: Vec<&str> = violations.iter().map(|v| v.field.as_str()).collect();
    if listed.len() <= VIOLATIONS_MAX {
        let listed: BTreeSet<String> = listed.into_iter().map(str::to_owned).collect();
        return (listed == *fields).then_some(()).ok_or(format!("named {listed:?}"));
    }
    if listed.pop() != Some("") || listed.len() != VIOLATIONS_MAX {
        return Err(format!("{} entries", violations.len()));
    }
    let more = violations.last().map_or("", |last| last.description.as_str());
    let more = more.strip_prefix("and ").and_then(|rest| rest.strip_suffix(" more violations"));
    let more: usize = more.and_then(|n| n.parse().ok()).ok_or("no number of the rest")?;
    let known = listed.iter().all(|field| fields.contains(*field));
    let enough = VIOLATIONS_MAX + more >= fields.len();
    (known && enough).then_some(()).ok_or(format!("named {listed:?} and {more} more"))
}
