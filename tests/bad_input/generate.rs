//! Bad requests by the thousand, made from the descriptors: every field of every request message with
//! every value that could hurt, and every way to send a message wrong. The same seed makes the same.

use bytes::Bytes;
use prost::Message;
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, Value};

use crate::{
    oracle::{
        self, ECHO_BYTES, EXISTING, Expected, LAST_SECOND, NAME_CHARS, REQUEST_BYTES, RULED,
        TAG_NAME_CHARS, TAG_VALUE_CHARS, TAGS_MAX, TEXT_CHARS, URL_CHARS,
    },
    support::chance::Chance,
    wire::{delimited, framed, key, varint, within},
};

pub const PAN: &str = "4242424242424242";
const KEY_CHARS: usize = 255;
/// Messages with several bad fields.
const MIXED: u64 = 400;
/// What stands where invalid UTF-8 is put.
const PLACE: &str = "QQQQQQQQ";

pub struct Case {
    pub method: String,
    pub path: String,
    pub what: String,
    pub headers: Vec<(&'static str, Bytes)>,
    pub body: Bytes,
    pub expected: Expected,
}

/// A field that holds a value of its own, and the fields around it.
struct Leaf {
    path: String,
    parents: Vec<u32>,
    field: FieldDescriptor,
}

/// A message within a request, the request itself included.
struct Nest {
    path: String,
    parents: Vec<u32>,
    message: MessageDescriptor,
}

/// One method, a good request to it, and what its request is made of.
struct Subject {
    method: &'static str,
    path: String,
    request: MessageDescriptor,
    good: DynamicMessage,
    leaves: Vec<Leaf>,
    nests: Vec<Nest>,
}

pub fn cases(seed: u64, webhook_url: &str) -> Vec<Case> {
    let mut cases = Vec::new();
    for subject in subjects(webhook_url) {
        single_values(&subject, &mut cases);
        mixed(&subject, &mut Chance::seeded(seed).branch(cases.len() as u64), &mut cases);
        invalid_text(&subject, &mut cases);
        wrong_wire(&subject, &mut cases);
        truncated(&subject, &mut cases);
        framing(&subject, &mut cases);
        headers(&subject, &mut cases);
        if subject.method == "CancelPayment" {
            both_currencies(&subject, &mut cases);
        }
        if subject.method == "CreatePaymentIntent" {
            urls(&subject, &mut cases);
            tags_and_echo(&subject, &mut cases);
            absent_and_all(&subject, &mut cases);
        }
    }
    cases
}

fn subjects(webhook_url: &str) -> Vec<Subject> {
    let pool = oracle::pool();
    let methods: Vec<_> =
        pool.services().flat_map(|service| service.methods().collect::<Vec<_>>()).collect();
    let ruled: Vec<&str> = RULED.iter().map(|(method, _)| *method).collect();
    assert!(
        methods.iter().all(|method| ruled.contains(&method.name())),
        "a method without rules: {methods:?}"
    );
    let subjects = RULED.iter().map(|(method, paths)| {
        let described = methods.iter().find(|m| m.name() == *method).expect(method);
        let path = format!("/{}/{method}", described.parent_service().full_name());
        let request = described.input();
        let mut reader = serde_json::Deserializer::from_str(good(method));
        let mut message = DynamicMessage::deserialize(request.clone(), &mut reader).expect(method);
        if *method == "CreatePaymentIntent" {
            set(&mut message, "webhook_url", Value::String(webhook_url.to_owned()));
        }
        let (mut leaves, mut nests) = (Vec::new(), Vec::new());
        walk(&request, "", &[], &mut leaves, &mut nests);
        let mut found: Vec<&str> = leaves.iter().map(|leaf| leaf.path.as_str()).collect();
        let mut known = paths.to_vec();
        found.sort_unstable();
        known.sort_unstable();
        assert_eq!(found, known, "{method}: the fields, and those that a rule speaks of");
        Subject { method, path, request, good: message, leaves, nests }
    });
    subjects.collect()
}

/// A good request with everything in it.
fn good(method: &str) -> &'static str {
    match method {
        "CreatePaymentIntent" => {
            r#"{"reservation_id": "res-1", "amount": {"amount": 1000, "currency": "KRW"}, "user_id": "user-1",
            "method": 1, "scenario": "approve", "provider": "sim", "echo": {"a": 1, "b": [true, null, "c"]},
            "metadata": {"source": "s", "user_agent": "u", "ip_address": "i", "session_id": "e",
                "scenario": "fail", "tags": {"k": "v"}},
            "payment_details": {"method": 1,
                "credit_card": {"card_number": "4242424242424242", "expiry_month": "12",
                    "expiry_year": "2099", "cardholder_name": "n", "cvv": "123", "installment_months": 3,
                    "vat": {"amount": 90, "currency": "KRW"}},
                "bank_transfer": {"bank_code": "b", "account_number": "1", "account_holder": "h"},
                "mobile_pay": {"provider": "p", "mobile_number": "0"}}}"#
        }
        "GetPaymentIntent" | "GetPaymentStatus" => {
            r#"{"payment_intent_id": "pi_00000000000000000000000000", "user_id": "user-1"}"#
        }
        "ProcessPayment" => {
            r#"{"payment_intent_id": "pi_00000000000000000000000000",
            "payment_details": {"method": 1,
                "credit_card": {"card_number": "4242424242424242", "expiry_month": "12",
                    "expiry_year": "2099", "cardholder_name": "n", "cvv": "123", "installment_months": 3,
                    "vat": {"amount": 90, "currency": "KRW"}},
                "bank_transfer": {"bank_code": "b", "account_number": "1", "account_holder": "h"},
                "mobile_pay": {"provider": "p", "mobile_number": "0"}}}"#
        }
        "CancelPayment" => {
            r#"{"payment_intent_id": "pi_00000000000000000000000000", "reason": "r",
            "refund_amount": {"amount": 400, "currency": "KRW"},
            "refund_vat": {"amount": 30, "currency": "KRW"}}"#
        }
        "ListPayments" => {
            r#"{"user_id": "user-1", "status": 3, "reservation_id": "res-1",
            "pagination": {"page": 1, "page_size": 20},
            "created_from": "2025-01-01T00:00:00Z", "created_to": "9999-12-31T23:59:59Z"}"#
        }
        "SimulateWebhook" => {
            r#"{"payment_intent_id": "pi_00000000000000000000000000", "target_status": 4,
            "delay_seconds": 5, "force_trigger": true}"#
        }
        "ListDeliveries" => {
            r#"{"filter": {"state": "OWED", "channel": "webhook", "origin": "http://127.0.0.1:9",
                "payment_intent_id": "pi_00000000000000000000000000"}, "page_size": 20}"#
        }
        "Redeliver" => {
            r#"{"filter": {"state": "DEAD", "channel": "webhook", "origin": "http://127.0.0.1:9",
                "payment_intent_id": "pi_00000000000000000000000000"}}"#
        }
        other => panic!("no good request for {other}"),
    }
}

/// Down to scalars; of maps and JSON only the field itself, which have cases of their own.
fn walk(
    message: &MessageDescriptor,
    prefix: &str,
    parents: &[u32],
    leaves: &mut Vec<Leaf>,
    nests: &mut Vec<Nest>,
) {
    nests.push(Nest {
        path: prefix.to_owned(),
        parents: parents.to_vec(),
        message: message.clone(),
    });
    for field in message.fields() {
        let path = if prefix.is_empty() {
            field.name().to_owned()
        } else {
            format!("{prefix}.{}", field.name())
        };
        match field.kind() {
            Kind::Message(inner)
                if !field.is_map() && inner.full_name() != "google.protobuf.Struct" =>
            {
                let parents = [parents, &[field.number()]].concat();
                walk(&inner, &path, &parents, leaves, nests);
            }
            _ => leaves.push(Leaf { path, parents: parents.to_vec(), field }),
        }
    }
}

fn set(message: &mut DynamicMessage, path: &str, value: Value) {
    match path.split_once('.') {
        None => message.set_field_by_name(path, value),
        Some((head, rest)) => {
            let inner = message.get_field_by_name_mut(head).and_then(Value::as_message_mut);
            set(inner.expect("a good request has every message"), rest, value);
        }
    }
}

impl Subject {
    fn with(&self, path: &str, value: Value) -> DynamicMessage {
        let mut message = self.good.clone();
        set(&mut message, path, value);
        message
    }

    /// A whole message in a frame of its own, judged by the oracle.
    fn judged(&self, what: impl Into<String>, bytes: &[u8]) -> Case {
        let expected = oracle::judge(self.method, &self.request, bytes);
        self.case(what, bytes, expected)
    }

    fn case(&self, what: impl Into<String>, bytes: &[u8], expected: Expected) -> Case {
        self.raw(what, framed(0, bytes.len(), bytes), expected)
    }

    fn raw(&self, what: impl Into<String>, body: Bytes, expected: Expected) -> Case {
        let (method, path) = (self.method.to_owned(), self.path.clone());
        Case { method, path, what: what.into(), headers: Vec::new(), body, expected }
    }

    /// The good message, and after it bytes that are merged into the message within.
    fn and(&self, parents: &[u32], bytes: &[u8]) -> Vec<u8> {
        [self.good.encode_to_vec(), within(parents, bytes)].concat()
    }
}

// ---- Values ----

const MALFORMED: Expected = Expected::Reason("MALFORMED");

fn texts(limit: usize) -> Vec<String> {
    let mut texts: Vec<String> = [
        "",
        " ",
        "x",
        "a\0b",
        "a\r\nb",
        "\n",
        "\t",
        "\u{1b}[2J\u{1b}[31mred",
        "a\u{200f}b",
        "\u{7f}",
        "a\u{85}b",
        "a\u{2028}b",
        "e\u{301}",
        "\u{fffd}",
        "🙂",
        "결제",
        "../../../etc/passwd",
        "'; DROP TABLE payments; --",
        "<script>alert(1)</script>",
        "%s%n%x%%{}{0}${7*7}",
        r#"{"a":[1,2,{"b":null}]}"#,
        "null",
        "-1",
        "%00%0d%0a",
        "\u{feff}x",
    ]
    .map(str::to_owned)
    .into();
    for n in [limit - 1, limit, limit + 1, 4 << 10, (64 << 10) + 1] {
        texts.push("x".repeat(n));
        texts.push("🙂".repeat(n));
    }
    texts
}

const NUMBERS: [i64; 36] = [
    i64::MIN,
    i32::MIN as i64,
    -1,
    0,
    1,
    29,
    30,
    31,
    59,
    60,
    61,
    90,
    91,
    99,
    100,
    101,
    399,
    401,
    500,
    501,
    910,
    911,
    999,
    1_000,
    1_001,
    86_399,
    86_400,
    86_401,
    999_999_999,
    1_000_000_000,
    i32::MAX as i64,
    999_999_999_999,
    1_000_000_000_000,
    1_000_000_000_001,
    LAST_SECOND,
    i64::MAX,
];

const ENUM_NUMBERS: [i32; 14] = [i32::MIN, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 99, 100, i32::MAX];

fn limit(path: &str) -> usize {
    match path.rsplit('.').next() {
        Some("reservation_id" | "user_id") => NAME_CHARS,
        Some("webhook_url") => URL_CHARS,
        Some("idempotency_key") => KEY_CHARS,
        _ => TEXT_CHARS,
    }
}

/// What is near to being right where the field has a form.
fn near(path: &str) -> &'static [&'static str] {
    match path.rsplit('.').next() {
        Some("currency") => &["krw", "KR", "KRWX", "ZZZ", "K W", "ＫＲＷ", "USD", "JPY", "410"],
        Some("payment_intent_id") => &[
            "pi_",
            "pay_",
            "pi_0000000000000000000000000",
            "pi_000000000000000000000000000",
            "pi_0000000000000000000000000O",
            "pi_0000000000000000000000000a",
            "pi_80000000000000000000000000",
            "pi_7ZZZZZZZZZZZZZZZZZZZZZZZZZ",
            "pay_7ZZZZZZZZZZZZZZZZZZZZZZZZZ",
            "PI_00000000000000000000000000",
            "evt_00000000000000000000000000",
            " pi_00000000000000000000000000",
            "pi_01M7YXEA357V7JDH0C147D6FCI",
        ],
        Some("card_number") => &[
            "4242424242424241",
            "4242 4242 4242 4242",
            "4242-4242-4242-4242",
            "42424242424",
            "424242424242424242420",
            "４２４２４２４２４２４２４２４２",
            "+4242424242424242",
            "4242424242424242\n",
            "000000000000",
            "378282246310005",
        ],
        Some("expiry_month") => &["0", "00", "1", "01", "12", "13", "001", "-1", "+1", "1.", "１"],
        Some("expiry_year") => {
            &["1", "25", "99", "099", "1999", "2025", "2099", "2100", "20999", "-999", "+099"]
        }
        Some("cvv") => &["12", "123", "1234", "12345", "12a", "１２３", "-12", "+123"],
        Some("provider") => &["sim", "SIM", "sim ", "none"],
        Some("cursor") => &["AAAA", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", "====", "a+b/"],
        _ => near_of_deliveries(path),
    }
}

fn near_of_deliveries(path: &str) -> &'static [&'static str] {
    match path.rsplit('.').next() {
        Some("state") => &["OWED", "HELD", "DELIVERED", "DEAD", "dead", " DEAD", "OWED,HELD"],
        Some("channel") => &["event", "webhook", "dead_letter", "EVENT", "dead-letter", "webhooks"],
        Some("origin") => &[
            "http://h",
            "https://h/",
            "https://h:8443",
            "http://h:80/",
            "http://h:99999",
            "http://h/p",
            "http://h//",
            "http://h?q",
            "http://h#f",
            "http://user@h",
            "http://@h",
            "http:///h",
            "http:h",
            "http://",
            "ftp://h",
            "h:80",
            "http://h\n",
            "http:\\\\h",
        ],
        Some("delivery_id") => &[
            "dlv_00000000000000000000000000_1_webhook",
            "dlv_7ZZZZZZZZZZZZZZZZZZZZZZZZZ_4294967295_dead_letter",
            "dlv_00000000000000000000000000_4294967296_webhook",
            "dlv_00000000000000000000000000_01_webhook",
            "dlv_00000000000000000000000000_+1_webhook",
            "dlv_00000000000000000000000000_1_letter",
            "dlv_00000000000000000000000000_1",
            "dlv_0000000000000000000000000a_1_event",
            "evt_00000000000000000000000000_1",
            "DLV_00000000000000000000000000_1_event",
        ],
        _ => &[],
    }
}

fn values(leaf: &Leaf) -> Vec<Value> {
    match leaf.field.kind() {
        _ if leaf.field.is_map() => Vec::new(),
        Kind::String => {
            let texts = texts(limit(&leaf.path)).into_iter();
            texts
                .chain(near(&leaf.path).iter().map(|text| (*text).to_owned()))
                .map(Value::String)
                .collect()
        }
        Kind::Int32 => {
            NUMBERS.iter().filter_map(|n| i32::try_from(*n).ok()).map(Value::I32).collect()
        }
        Kind::Int64 => NUMBERS.iter().copied().map(Value::I64).collect(),
        Kind::Enum(_) => ENUM_NUMBERS.map(Value::EnumNumber).into(),
        Kind::Bool => vec![Value::Bool(false), Value::Bool(true)],
        Kind::Message(_) => Vec::new(),
        other => panic!("{}: no values of {other:?}", leaf.path),
    }
}

fn short(value: &Value) -> String {
    let text = format!("{value:?}");
    text.chars().take(60).collect()
}

fn single_values(subject: &Subject, cases: &mut Vec<Case>) {
    for leaf in &subject.leaves {
        for value in values(leaf) {
            let what = format!("{} = {}", leaf.path, short(&value));
            let message = subject.with(&leaf.path, value);
            cases.push(subject.judged(what, &message.encode_to_vec()));
        }
    }
}

/// Several fields at once: each that is bad must be named, and none that is good.
fn mixed(subject: &Subject, chance: &mut Chance, cases: &mut Vec<Case>) {
    // A key that is good twice would be a replay or a conflict, which is no matter of the fields.
    let leaves: Vec<(&Leaf, Vec<Value>)> = subject
        .leaves
        .iter()
        .map(|leaf| (leaf, values(leaf)))
        .filter(|(leaf, values)| !values.is_empty() && leaf.path != "idempotency_key")
        .collect();
    for n in 0..MIXED {
        let mut message = subject.good.clone();
        let mut what = format!("mixed {n}:");
        for _ in 0..chance.between(2, 9) {
            let (leaf, values) = chance.pick(&leaves);
            let value = chance.pick(values);
            // One large value would only be refused as a whole.
            if value.as_str().is_some_and(|text| text.len() > 4 << 10) {
                continue;
            }
            what = format!("{what} {} = {};", leaf.path, short(value));
            set(&mut message, &leaf.path, value.clone());
        }
        cases.push(subject.judged(what, &message.encode_to_vec()));
    }
}

/// What is wrong only beside the payment is named at once, too.
fn both_currencies(subject: &Subject, cases: &mut Vec<Case>) {
    let mut message = subject.with("refund_amount.currency", Value::String("USD".into()));
    set(&mut message, "refund_vat.currency", Value::String("JPY".into()));
    cases.push(subject.judged("both currencies of another payment", &message.encode_to_vec()));
    for name in ["refund_amount", "refund_vat"] {
        let mut message = subject.good.clone();
        message.clear_field_by_name(name);
        cases.push(subject.judged(format!("without {name}"), &message.encode_to_vec()));
    }
}

fn absent_and_all(subject: &Subject, cases: &mut Vec<Case>) {
    cases.push(subject.judged("an empty message", b""));
    for name in ["amount", "metadata", "payment_details", "echo"] {
        let mut message = subject.good.clone();
        message.clear_field_by_name(name);
        cases.push(subject.judged(format!("without {name}"), &message.encode_to_vec()));
    }
    let mut message = subject.good.clone();
    for leaf in &subject.leaves {
        let value = match leaf.field.kind() {
            Kind::String => Value::String("\u{1b}\"%<>🙂".repeat(300)),
            Kind::Int32 => Value::I32(-1),
            Kind::Int64 => Value::I64(-1),
            Kind::Enum(_) => Value::EnumNumber(-1),
            _ => continue,
        };
        set(&mut message, &leaf.path, value);
    }
    let tags = (0..=TAGS_MAX).map(|n| (format!("{n}-{}", "x".repeat(70)), "v".to_owned()));
    set(&mut message, "metadata.tags", map(tags));
    cases.push(subject.judged("everything wrong", &message.encode_to_vec()));
    // The same, but within the limit: more than twenty violations.
    let mut message = subject.good.clone();
    for leaf in &subject.leaves {
        let value = match leaf.field.kind() {
            Kind::String => Value::String("\u{1b}\"%<>🙂".repeat(110)),
            Kind::Int32 => Value::I32(-1),
            Kind::Int64 => Value::I64(-1),
            Kind::Enum(_) => Value::EnumNumber(-1),
            _ => continue,
        };
        set(&mut message, &leaf.path, value);
    }
    let case = subject.judged("everything wrong, and small", &message.encode_to_vec());
    assert!(
        matches!(&case.expected, Expected::Fields(fields) if fields.len() > oracle::VIOLATIONS_MAX),
        "{:?}",
        case.expected
    );
    cases.push(case);
}

fn urls(subject: &Subject, cases: &mut Vec<Case>) {
    for url in [
        "http://h",
        "https://h/",
        "http://h:1/p?q=1",
        "http://127.0.0.1:9/a%20b",
        "http://h/\u{200f}",
        "http://user@h/",
        "http://user:pass@h/",
        "http://:pass@h/",
        "http://h/#f",
        "http://h/#",
        "http://",
        "http:///p",
        "https://?q",
        "ftp://h/",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "gopher://h/",
        "//h/p",
        "/p",
        "h",
        "h:80",
        "http://h:99999/",
        "http://h:-1/",
        "http://h:x/",
        "http://[::1",
        "http://h h/",
        "http://h\t/",
        "http://h/a b",
        "http://h/a\nb",
        "http://h/\r\nX-Header: 1",
        " http://h/",
        "http://h/ ",
        "http://h\0/",
        "http://<h>/",
        "http://%00/",
        "http:h/p",
        "http:/h/p",
        "http:\\\\h\\p",
        "http://i\\@h/",
        "ws://h/",
        "data:text/plain,x",
    ] {
        let message = subject.with("webhook_url", Value::String(url.to_owned()));
        cases.push(subject.judged(format!("webhook_url = {url:?}"), &message.encode_to_vec()));
    }
    for chars in [URL_CHARS - 1, URL_CHARS, URL_CHARS + 1] {
        let url = format!("http://h/{}", "x".repeat(chars - "http://h/".len()));
        let message = subject.with("webhook_url", Value::String(url));
        cases
            .push(subject.judged(format!("a URL of {chars} characters"), &message.encode_to_vec()));
    }
}

fn map(entries: impl IntoIterator<Item = (String, String)>) -> Value {
    let entries = entries.into_iter();
    Value::Map(entries.map(|(name, value)| (MapKey::String(name), Value::String(value))).collect())
}

const FIELDS: u32 = 1;
const NUMBER_VALUE: u32 = 2;
const STRING_VALUE: u32 = 3;
const STRUCT_VALUE: u32 = 5;
const LIST_VALUE: u32 = 6;

/// `{"<name>": <value>}` as a Struct.
fn json_field(name: &[u8], value: &[u8]) -> Vec<u8> {
    delimited(FIELDS, &[delimited(1, name), delimited(2, value)].concat())
}

fn json_number(number: f64) -> Vec<u8> {
    [&key(NUMBER_VALUE, 1)[..], &number.to_le_bytes()].concat()
}

fn tags_and_echo(subject: &Subject, cases: &mut Vec<Case>) {
    for text in texts(TAG_NAME_CHARS) {
        let message = subject.with("metadata.tags", map([(text.clone(), "v".to_owned())]));
        cases.push(subject.judged("a tag's name", &message.encode_to_vec()));
    }
    for text in texts(TAG_VALUE_CHARS) {
        let message = subject.with("metadata.tags", map([("k".to_owned(), text.clone())]));
        cases.push(subject.judged("a tag's value", &message.encode_to_vec()));
    }
    for count in [0, 1, TAGS_MAX, TAGS_MAX + 1, 500] {
        let tags = (0..count).map(|n| (format!("tag-{n}"), "v".to_owned()));
        let message = subject.with("metadata.tags", map(tags));
        cases.push(subject.judged(format!("{count} tags"), &message.encode_to_vec()));
    }
    let mut bare = subject.good.clone();
    bare.clear_field_by_name("echo");
    let echo = subject.request.get_field_by_name("echo").expect("the field").number();
    let mut push = |what: String, echo_bytes: &[u8]| {
        let bytes = [bare.encode_to_vec(), delimited(echo, echo_bytes)].concat();
        cases.push(subject.judged(what, &bytes));
    };
    for text in texts(64) {
        push("a text in echo".into(), &json_field(b"k", &delimited(STRING_VALUE, text.as_bytes())));
        push("a name in echo".into(), &json_field(text.as_bytes(), &json_number(1.0)));
    }
    for number in [
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::MIN,
        f64::MAX,
        f64::MIN_POSITIVE,
        -0.0,
        0.5,
        9e15,
        1e300,
    ] {
        push(format!("{number} in echo"), &json_field(b"k", &json_number(number)));
    }
    // `{"k":"…"}`: eight bytes around the text.
    for bytes in [ECHO_BYTES - 1, ECHO_BYTES, ECHO_BYTES + 1] {
        let text = "x".repeat(bytes - 8);
        push(
            format!("{bytes} bytes of echo"),
            &json_field(b"k", &delimited(STRING_VALUE, text.as_bytes())),
        );
    }
    push("a value that is none".into(), &json_field(b"k", b""));
    push("an empty echo".into(), b"");
    for levels in [1, 2, 16, 31, 32, 60, 100, 1_000] {
        let object = (1..levels)
            .fold(Vec::new(), |inner, _| json_field(b"k", &delimited(STRUCT_VALUE, &inner)));
        push(format!("objects {levels} deep"), &object);
    }
    for levels in [1, 2, 16, 30, 31, 32, 33, 40, 60, 100, 1_000] {
        let list =
            (1..=levels).fold(Vec::new(), |inner, _| delimited(LIST_VALUE, &delimited(1, &inner)));
        push(format!("lists {levels} deep"), &json_field(b"k", &list));
    }
}

// ---- The wire ----

const NO_UTF8: [&[u8; 8]; 6] = [
    b"\xff\xfe\xff\xfe\xff\xfe\xff\xfe",
    b"\xed\xa0\x80\xed\xb0\x80ok", // surrogates, one by one
    b"over\xc0\x80ok",             // an overlong NUL
    b"cut off\xf0",                // the first of four bytes
    b"\x80\x80\x80\x80high",       // continuations of nothing
    b"\xf4\x90\x80\x80past",       // above U+10FFFF
];

fn invalid_text(subject: &Subject, cases: &mut Vec<Case>) {
    let mut with_place: Vec<(String, Vec<u8>)> = Vec::new();
    for leaf in subject.leaves.iter().filter(|leaf| leaf.field.kind() == Kind::String) {
        let message = subject.with(&leaf.path, Value::String(PLACE.to_owned()));
        with_place.push((leaf.path.clone(), message.encode_to_vec()));
    }
    if subject.method == "CreatePaymentIntent" {
        for (name, value) in [(PLACE, "v"), ("k", PLACE)] {
            let tags = map([(name.to_owned(), value.to_owned())]);
            with_place.push((
                "metadata.tags".into(),
                subject.with("metadata.tags", tags).encode_to_vec(),
            ));
        }
        let echo = subject.request.get_field_by_name("echo").expect("the field").number();
        for (name, value) in [(PLACE, "v"), ("k", PLACE)] {
            let field = json_field(name.as_bytes(), &delimited(STRING_VALUE, value.as_bytes()));
            with_place.push(("echo".into(), subject.and(&[], &delimited(echo, &field))));
        }
    }
    for (path, bytes) in with_place {
        for text in NO_UTF8 {
            let what = format!("{path} with {text:x?}");
            cases.push(subject.case(what, &replaced(&bytes, PLACE.as_bytes(), text), MALFORMED));
        }
    }
}

/// With every occurrence of `from` replaced by as many bytes of `to`.
pub fn replaced(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let mut at = 0;
    while at + from.len() <= bytes.len() {
        if bytes[at..].starts_with(from) {
            bytes[at..at + to.len()].copy_from_slice(to);
            at += from.len();
        } else {
            at += 1;
        }
    }
    bytes
}

/// Something of a wire type, and whether it is whole.
const ANYTHING: [(u32, &[u8], bool); 10] = [
    (0, b"\x01", true),
    (1, b"\x01\x02\x03\x04\x05\x06\x07\x08", true),
    (2, b"\x02ab", true),
    (5, b"\x01\x02\x03\x04", true),
    (0, b"\xff", false),
    (2, b"\xff\xff\xff\xff\x0f", false),
    (3, b"", false),
    (4, b"", false),
    (6, b"\x00", false),
    (7, b"\x00", false),
];

fn wrong_wire(subject: &Subject, cases: &mut Vec<Case>) {
    // Known fields: of another wire type than theirs nothing is taken.
    let of_messages = subject.nests.iter().flat_map(|nest| {
        let fields = nest.message.fields().filter(|field| matches!(field.kind(), Kind::Message(_)));
        fields.map(|field| (format!("{}.{}", nest.path, field.name()), &nest.parents, field))
    });
    let of_leaves = subject.leaves.iter().map(|l| (l.path.clone(), &l.parents, l.field.clone()));
    for (path, parents, field) in of_leaves.chain(of_messages) {
        let own = match field.kind() {
            Kind::String | Kind::Message(_) => 2,
            _ => 0,
        };
        for (wire_type, bytes, whole) in ANYTHING {
            if wire_type == own && whole {
                continue;
            }
            let bytes = [&key(field.number(), wire_type)[..], bytes].concat();
            let what = format!("{path} as wire type {wire_type}, {bytes:x?}");
            cases.push(subject.case(what, &subject.and(parents, &bytes), MALFORMED));
        }
        if own == 0 {
            numbers_of_many_bytes(subject, &path, parents, &field, cases);
        }
    }
    for nest in &subject.nests {
        unknown_fields(subject, nest, cases);
    }
    // What comes again takes the place of what came before.
    let twice = subject.good.encode_to_vec().repeat(2);
    cases.push(subject.judged("the message twice in one frame", &twice));
    for size in [REQUEST_BYTES - 1, REQUEST_BYTES, REQUEST_BYTES + 1] {
        // A key of two bytes, a length of three.
        let padding = vec![b'x'; size - subject.good.encoded_len() - 5];
        let bytes = subject.and(&[], &delimited(1_999, &padding));
        assert_eq!(bytes.len(), size);
        let expected = if size > REQUEST_BYTES {
            Expected::Reason("MESSAGE_TOO_LARGE")
        } else {
            Expected::Accepted
        };
        cases.push(subject.case(format!("{size} bytes"), &bytes, expected));
    }
}

fn numbers_of_many_bytes(
    subject: &Subject,
    path: &str,
    parents: &[u32],
    field: &FieldDescriptor,
    cases: &mut Vec<Case>,
) {
    let mut push = |what: &str, number: &[u8], expected: Option<Expected>| {
        let bytes = subject.and(parents, &[&key(field.number(), 0)[..], number].concat());
        let what = format!("{path}: {what}");
        cases.push(match expected {
            Some(expected) => subject.case(what, &bytes, expected),
            None => subject.judged(what, &bytes),
        });
    };
    push("ten bytes", &varint(u64::MAX), None);
    push("one in ten bytes", b"\x81\x80\x80\x80\x80\x80\x80\x80\x80\x00", None);
    push("more than 32 bits", &varint((1 << 40) + 1), None);
    push("eleven bytes", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", Some(MALFORMED));
    push("more than 64 bits", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02", Some(MALFORMED));
}

/// A later version of the contract has more fields: they are passed over, if they are whole.
fn unknown_fields(subject: &Subject, nest: &Nest, cases: &mut Vec<Case>) {
    const UNKNOWN: u32 = 1_999;
    const LAST: u32 = (1 << 29) - 1;
    let mut push = |what: &str, bytes: &[u8], expected: Expected| {
        let what = format!("{:?}: {what}", nest.path);
        cases.push(subject.case(what, &subject.and(&nest.parents, bytes), expected));
    };
    let group = |number: u32, inner: &[u8]| [&key(number, 3)[..], inner, &key(number, 4)].concat();
    for (wire_type, bytes, whole) in ANYTHING {
        for number in [UNKNOWN, LAST] {
            let field = [&key(number, wire_type)[..], bytes].concat();
            let what = format!("unknown field {number} of wire type {wire_type}");
            push(&what, &field, if whole { Expected::Accepted } else { MALFORMED });
        }
    }
    let groups = |levels: usize| (0..levels).fold(Vec::new(), |inner, _| group(UNKNOWN, &inner));
    push("an unknown group", &group(UNKNOWN, &delimited(7, b"abc")), Expected::Accepted);
    push("groups in groups", &groups(40), Expected::Accepted);
    push("a thousand groups in groups", &groups(1_000), MALFORMED);
    push("a group that another ends", &[key(UNKNOWN, 3), key(UNKNOWN + 1, 4)].concat(), MALFORMED);
    push("field number 0", b"\x00\x01", MALFORMED);
    push("a key of more than 32 bits", b"\xf8\xff\xff\xff\xff\x01\x01", MALFORMED);
    push("a key cut off", b"\x80", MALFORMED);
}

fn truncated(subject: &Subject, cases: &mut Vec<Case>) {
    let whole = subject.good.encode_to_vec();
    for length in 0..whole.len() {
        cases.push(subject.judged(format!("cut to {length} bytes"), &whole[..length]));
    }
}

fn framing(subject: &Subject, cases: &mut Vec<Case>) {
    let message = subject.good.encode_to_vec();
    let length = message.len();
    let too_large = Expected::Reason("MESSAGE_TOO_LARGE");
    let whole = framed(0, length, &message);
    let mut push = |what: &str, body: Bytes, expected: &Expected| {
        cases.push(subject.raw(what, body, expected.clone()));
    };
    push("flag 1 without an encoding", framed(1, length, &message), &MALFORMED);
    push("flag 2", framed(2, length, &message), &MALFORMED);
    push("flag 255", framed(255, length, &message), &MALFORMED);
    push("4 GiB announced", framed(0, u32::MAX as usize, &message), &too_large);
    push("2 GiB announced", framed(0, 1 << 31, b""), &too_large);
    push("a byte over the limit announced", framed(0, REQUEST_BYTES + 1, &message), &too_large);
    push("a byte less than announced", framed(0, length + 1, &message), &MALFORMED);
    push("only announced", framed(0, length, b""), &MALFORMED);
    push("no message", Bytes::new(), &MALFORMED);
    for head in 1..5 {
        push("a head cut off", whole.slice(..head), &MALFORMED);
    }
    push("a byte after the message", [&whole[..], b"\0"].concat().into(), &MALFORMED);
    push("half a message after it", [&whole[..], &whole[..length / 2]].concat().into(), &MALFORMED);
    // One message is what the call has: the first.
    push("two messages", [&whole[..], &whole[..]].concat().into(), &Expected::Accepted);
    push(
        "an empty one after it",
        [&whole[..], &framed(0, 0, b"")[..]].concat().into(),
        &Expected::Accepted,
    );
}

fn headers(subject: &Subject, cases: &mut Vec<Case>) {
    let mut push =
        |what: String, headers: Vec<(&'static str, Bytes)>, key: &str, expected: Expected| {
            let mut message = subject.good.clone();
            if !key.is_empty() {
                set(&mut message, "idempotency_key", Value::String(key.to_owned()));
            }
            let bytes = message.encode_to_vec();
            cases.push(Case { headers, ..subject.case(what, &bytes, expected) });
        };
    let bad_timeouts: [&'static [u8]; 12] = [
        b"",
        b"S",
        b"5",
        b"5x",
        b"-5S",
        b"5.5S",
        b"5 S",
        b"123456789S",
        b"\xff",
        b"S5",
        b"0x5S",
        b"5SS",
    ];
    for bad in bad_timeouts {
        let header = vec![("grpc-timeout", Bytes::from_static(bad))];
        push(format!("grpc-timeout {bad:?}"), header, "", Expected::field("grpc-timeout"));
    }
    let header = vec![("grpc-timeout", Bytes::from_static(b"99999999H"))];
    push("the longest grpc-timeout".into(), header, "", Expected::Accepted);
    for encoding in ["gzip", "zstd", "no-such"] {
        let header = vec![("grpc-encoding", Bytes::from(encoding))];
        push(format!("encoding {encoding}"), header, "", Expected::Unimplemented);
    }
    let bad_traces: [&'static [u8]; 4] =
        [b"", b"00-x-y-z", b"\xff\xff", b"00-00000000000000000000000000000000-0000000000000000-01"];
    for bad in bad_traces {
        let header = vec![("traceparent", Bytes::from_static(bad))];
        push(format!("traceparent {bad:?}"), header, "", Expected::Accepted);
    }
    if subject.request.get_field_by_name("idempotency_key").is_none() {
        // Not looked at where there is no such thing.
        let header = vec![("idempotency-key", Bytes::from_static(b"\xff"))];
        push("a key where none is".into(), header, "", Expected::Accepted);
        return;
    }
    let of_key = |value: &[u8]| vec![("idempotency-key", Bytes::copy_from_slice(value))];
    for bad in [&[b'k'; 256][..], &[b'k'; 4_096], b"\xff", b"\xc3\xa9", b"a\tb"] {
        let what = format!("header key of {} bytes, {:?}…", bad.len(), &bad[..1]);
        push(what, of_key(bad), "", Expected::field("idempotency_key"));
    }
    push("header key of 255".into(), of_key(&[b'h'; 255]), "", Expected::Accepted);
    push("an empty header key".into(), of_key(b""), "", Expected::Accepted);
    push("header key and field alike".into(), of_key(b"alike"), "alike", Expected::Accepted);
    for (header, field) in [("one", "two"), ("same", "Same"), ("k", "k ")] {
        let what = format!("header key {header}, field {field}");
        push(what, of_key(header.as_bytes()), field, Expected::field("idempotency_key"));
    }
    let two = [of_key(b"first"), of_key(b"second")].concat();
    push("two header keys".into(), two, "", Expected::field("idempotency_key"));
    let two = [of_key(b"again"), of_key(b"again")].concat();
    push("one header key twice".into(), two, "", Expected::Accepted);
}

/// A request by which the service shows that it still works.
pub fn good_create(webhook_url: &str) -> Bytes {
    let subject = subjects(webhook_url).swap_remove(0);
    let bytes = subject.good.encode_to_vec();
    framed(0, bytes.len(), &bytes)
}

pub const PLACEHOLDER: &[u8] = EXISTING.as_bytes();
