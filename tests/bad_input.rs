//! Bad requests, generated from the protocol's own descriptors: every field of every request, wrong in
//! every way that its type allows, and bytes that are no message at all.
//!
//! Each must be refused with a documented code, name its field where the message decodes, and leave
//! the service as it was. What the generator makes that is allowed after all must be accepted.

#![allow(clippy::disallowed_methods, reason = "a test of its own process, with tasks of its own")]

mod support;

use std::{collections::BTreeMap, time::Duration};

use bytes::{Buf, BufMut, Bytes};
use payment_sim::api::pb::payment::v1 as pb;
use prost::Message;
use prost_reflect::{
    Cardinality, DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MapKey, ReflectMessage,
    Value,
};
use support::process::{Launch, Service, get};
use tonic::{
    Code, Request, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt;

const READY_WITHIN: Duration = Duration::from_secs(30);
const SERVICE: &str = "payment.v1.PaymentService";
/// Every code that the contract's table has for a request that is wrong.
const DOCUMENTED: [(&str, Code); 9] = [
    ("VALIDATION_FAILED", Code::InvalidArgument),
    ("MALFORMED", Code::InvalidArgument),
    ("PAYMENT_NOT_FOUND", Code::NotFound),
    ("IDEMPOTENCY_CONFLICT", Code::AlreadyExists),
    ("INVALID_STATE", Code::FailedPrecondition),
    ("NO_WEBHOOK_URL", Code::FailedPrecondition),
    ("REFUND_EXCEEDS_REMAINING", Code::FailedPrecondition),
    ("NOT_YOURS", Code::PermissionDenied),
    ("MESSAGE_TOO_LARGE", Code::ResourceExhausted),
];
/// Trailers of a refusal, as every client's header limit allows.
const TRAILERS_MAX: usize = 8 << 10;
const VIOLATIONS_MAX: usize = 21;

/// Passes bytes through: what is no message cannot be made with types.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let length = buffer.remaining();
        Ok(Some(buffer.copy_to_bytes(length)))
    }
}

struct Bed {
    service: Service,
    launch: Launch,
    channel: Channel,
    _folder: tempfile::TempDir,
    payment: String,
}

impl Bed {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let launch = Launch::new(folder.path()).with("EVENT_SINK", "none");
        let mut service = launch.start();
        service.ready(READY_WITHIN).await.unwrap();
        let url = format!("http://127.0.0.1:{}", launch.grpc_port);
        let channel = Endpoint::from_shared(url).unwrap().connect_lazy();
        let mut bed = Self { service, launch, channel, _folder: folder, payment: String::new() };
        bed.payment = bed.create().await;
        bed
    }

    /// A create as it should be.
    async fn create(&self) -> String {
        let mut client = support::client(self.launch.grpc_port);
        let money =
            payment_sim::api::pb::common::v1::Money { amount: 1_000, currency: "KRW".into() };
        let request = pb::CreatePaymentIntentRequest {
            reservation_id: "res-1".into(),
            user_id: "user-1".into(),
            amount: Some(money),
            ..Default::default()
        };
        client.create_payment_intent(request).await.unwrap().into_inner().payment_intent_id
    }

    async fn call(&self, method: &str, bytes: impl Into<Bytes>) -> Result<Bytes, Status> {
        let mut grpc = Grpc::new(self.channel.clone());
        grpc.ready().await.unwrap();
        let path = format!("/{SERVICE}/{method}").parse().unwrap();
        grpc.unary(Request::new(bytes.into()), path, Raw).await.map(tonic::Response::into_inner)
    }

    /// The service lives, has not panicked, and takes a good request.
    async fn is_well(&mut self) {
        self.create().await;
        assert!(self.service.exited().is_none());
        let metrics = get(self.launch.ops_port, "/metrics").await.unwrap();
        assert!(metrics.contains("\npanics_total 0\n"), "a handler panicked");
        for code in ["Unknown", "Internal"] {
            let bad = metrics.lines().find(|line| {
                line.starts_with("grpc_server_handled_total")
                    && line.contains(&format!("grpc_code=\"{code}\""))
                    && !line.ends_with(" 0")
            });
            assert_eq!(bad, None);
        }
        let log = std::fs::read_to_string(self.launch.log()).unwrap();
        assert!(!log.contains("panicked"), "{log}");
    }
}

fn protocol() -> DescriptorPool {
    let files = include_bytes!(concat!(env!("OUT_DIR"), "/payment_sim_descriptor.bin"));
    DescriptorPool::decode(&files[..]).unwrap()
}

/// One request: how it is wrong, and which field it is that is wrong.
struct Case {
    method: String,
    about: String,
    field: String,
    bytes: Vec<u8>,
}

/// A request of every method that is accepted as it is.
fn good(pool: &DescriptorPool, payment: &str) -> BTreeMap<String, DynamicMessage> {
    let details = r#""payment_details": {"method": "PAYMENT_METHOD_CREDIT_CARD",
        "credit_card": {"card_number": "4242424242424242", "expiry_month": "12", "expiry_year": "2099",
            "cardholder_name": "A", "cvv": "123", "installment_months": 3,
            "vat": {"amount": "91", "currency": "KRW"}},
        "bank_transfer": {"bank_code": "1", "account_number": "2", "account_holder": "3"},
        "mobile_pay": {"provider": "p", "mobile_number": "010"}}"#;
    let create = format!(
        r#"{{"reservation_id": "r", "user_id": "u", "amount": {{"amount": "1000", "currency": "KRW"}},
        "method": "PAYMENT_METHOD_CREDIT_CARD", "scenario": "approve",
        "webhook_url": "http://127.0.0.1:9/hook", "provider": "sim", "echo": {{"a": 1}},
        "metadata": {{"source": "s", "user_agent": "a", "ip_address": "i", "session_id": "s",
            "scenario": "fail", "tags": {{"k": "v"}}}}, {details}}}"#
    );
    let by_id = format!(r#""payment_intent_id": "{payment}""#);
    let look_up = format!(r#"{{{by_id}, "user_id": "user-1"}}"#);
    let requests = [
        ("CreatePaymentIntent", create),
        ("GetPaymentIntent", look_up.clone()),
        ("GetPaymentStatus", look_up),
        ("ProcessPayment", format!("{{{by_id}, {details}}}")),
        (
            "CancelPayment",
            format!(
                r#"{{{by_id}, "reason": "r", "refund_amount": {{"amount": "1", "currency": "KRW"}}}}"#
            ),
        ),
        (
            "ListPayments",
            r#"{"user_id": "u", "status": "PAYMENT_STATUS_COMPLETED", "reservation_id": "r",
                "pagination": {"page": 1, "page_size": 10},
                "created_from": "2026-01-01T00:00:00Z", "created_to": "2027-01-01T00:00:00Z"}"#
                .to_owned(),
        ),
        (
            "SimulateWebhook",
            format!(r#"{{{by_id}, "target_status": "PAYMENT_STATUS_FAILED", "delay_seconds": 1}}"#),
        ),
    ];
    requests
        .into_iter()
        .map(|(method, json)| {
            let service = pool.get_service_by_name(SERVICE).unwrap();
            let input = service.methods().find(|m| m.name() == method).unwrap().input();
            let mut text = serde_json::Deserializer::from_str(&json);
            let message = DynamicMessage::deserialize(input, &mut text);
            (method.to_owned(), message.unwrap_or_else(|e| panic!("{method}: {e}")))
        })
        .collect()
}

/// Strings that a field may choke on.
fn strings() -> Vec<(&'static str, String)> {
    vec![
        ("empty", String::new()),
        ("129 characters", "x".repeat(129)),
        ("256 characters", "x".repeat(256)),
        ("2,049 characters", format!("http://h/{}", "x".repeat(2_049))),
        ("4 KiB", "é".repeat(2 << 10)),
        ("NUL", "a\0b".to_owned()),
        ("CR LF", "a\r\nX-Injected: 1".to_owned()),
        ("ANSI escape", "\u{1b}[31mred".to_owned()),
        ("right-to-left mark", "a\u{202e}b".to_owned()),
        ("decomposed", "e\u{301}".to_owned()),
        ("emoji", "💳".repeat(40)),
        ("path", "../../etc/passwd".to_owned()),
        ("SQL", "'; DROP TABLE payments; --".to_owned()),
        ("HTML", "<script>alert(1)</script>".to_owned()),
        ("format string", "%s%n{}".to_owned()),
        ("JSON", r#"{"a":1}"#.to_owned()),
        ("a file's URL", "file:///etc/passwd".to_owned()),
        ("a URL with user info", "http://u:p@h/".to_owned()),
        ("a URL with a fragment", "http://h/#f".to_owned()),
        ("a URL without a host", "http://".to_owned()),
    ]
}

fn mutations(field: &FieldDescriptor) -> Vec<(String, Value)> {
    let texts =
        || strings().into_iter().map(|(about, text)| (about.to_owned(), Value::String(text)));
    match field.kind() {
        Kind::String if field.cardinality() != Cardinality::Repeated => texts().collect(),
        Kind::Int64 => [i64::MIN, -1, 0, 1_000_000_000_001, i64::MAX]
            .map(|n| (n.to_string(), Value::I64(n)))
            .to_vec(),
        Kind::Int32 => [i32::MIN, -1, 61, 101, 10_001, 86_401, i32::MAX]
            .map(|n| (n.to_string(), Value::I32(n)))
            .to_vec(),
        Kind::Enum(_) => [-1, 99, i32::MAX].map(|n| (n.to_string(), Value::EnumNumber(n))).to_vec(),
        Kind::Double => [f64::NAN, f64::INFINITY, f64::NEG_INFINITY]
            .map(|n| (n.to_string(), Value::F64(n)))
            .to_vec(),
        _ => Vec::new(),
    }
}

/// Every field of a message, each in turn wrong in every way, the rest as it was.
fn wrong_fields(
    message: &DynamicMessage,
    path: &str,
    out: &mut Vec<(String, String, DynamicMessage)>,
) {
    for field in message.descriptor().fields() {
        let at = if path.is_empty() {
            field.name().to_owned()
        } else {
            format!("{path}.{}", field.name())
        };
        for (about, value) in mutations(&field) {
            let mut wrong = message.clone();
            wrong.set_field(&field, value);
            out.push((at.clone(), about, wrong));
        }
        if field.is_map() {
            wrong_maps(message, &field, &at, out);
        } else if let Value::Message(inner) = &*message.get_field(&field)
            && message.has_field(&field)
        {
            let mut without = message.clone();
            without.clear_field(&field);
            out.push((at.clone(), "absent".to_owned(), without));
            let mut nested = Vec::new();
            wrong_fields(inner, &at, &mut nested);
            for (at, about, inner) in nested {
                let mut wrong = message.clone();
                wrong.set_field(&field, Value::Message(inner));
                out.push((at, about, wrong));
            }
        }
    }
}

fn wrong_maps(
    message: &DynamicMessage,
    field: &FieldDescriptor,
    at: &str,
    out: &mut Vec<(String, String, DynamicMessage)>,
) {
    // The other maps of the protocol hold messages.
    if field.name() != "tags" {
        return;
    }
    let map = |pairs: Vec<(String, String)>| {
        let pairs = pairs.into_iter().map(|(k, v)| (MapKey::String(k), Value::String(v)));
        Value::Map(pairs.collect())
    };
    let many = (0..51).map(|n| (n.to_string(), String::new())).collect();
    let cases = [
        ("51 entries", many),
        ("a name of 65 characters", vec![("x".repeat(65), String::new())]),
        ("a value of 513 characters", vec![("x".to_owned(), "x".repeat(513))]),
    ];
    for (about, pairs) in cases {
        let mut wrong = message.clone();
        wrong.set_field(field, map(pairs));
        out.push((at.to_owned(), about.to_owned(), wrong));
    }
}

fn field_cases(pool: &DescriptorPool, payment: &str) -> Vec<Case> {
    let mut cases = Vec::new();
    for (method, message) in good(pool, payment) {
        let mut wrong = Vec::new();
        wrong_fields(&message, "", &mut wrong);
        cases.extend(wrong.into_iter().map(|(field, about, message)| Case {
            method: method.clone(),
            about,
            field,
            bytes: message.encode_to_vec(),
        }));
    }
    cases
}

/// What must be refused whatever else: the limits that the contract names.
fn must_be_refused(case: &Case) -> bool {
    let number = case.about.parse::<i64>();
    match (case.method.as_str(), case.field.as_str(), case.about.as_str()) {
        ("CreatePaymentIntent", "reservation_id" | "user_id", about) => matches!(
            about,
            "empty"
                | "129 characters"
                | "256 characters"
                | "4 KiB"
                | "NUL"
                | "CR LF"
                | "ANSI escape"
                | "2,049 characters"
        ),
        ("CreatePaymentIntent", "amount.amount", _) => true,
        (_, "refund_amount.amount", about) => !matches!(about, "1"),
        ("CreatePaymentIntent", "amount", "absent") => true,
        (_, field, _) if field.ends_with(".currency") => true,
        ("CreatePaymentIntent", "webhook_url", about) => !matches!(about, "empty"),
        ("CreatePaymentIntent", "provider" | "scenario_name", about) => about != "empty",
        (_, "method" | "scenario" | "metadata.scenario" | "target_status" | "status", _) => true,
        (_, "payment_intent_id", _) => true,
        (_, field, _) if field.ends_with("card_number") => true,
        (_, field, _) if field.ends_with("expiry_month") || field.ends_with("expiry_year") => true,
        (_, "delay_seconds", _) => number.is_ok_and(|n| !(0..=86_400).contains(&n)),
        (_, "pagination.page_size", _) => number.is_ok_and(|n| !(0..=100).contains(&n)),
        (_, "pagination.cursor", about) => about != "empty",
        (_, "metadata.tags", _) => true,
        (_, "reason", about) => matches!(about, "256 characters" | "4 KiB" | "2,049 characters"),
        _ => false,
    }
}

/// Where a violation may point for a wrong field: at it, at what it is in, or at what it contains.
fn names(violation: &str, field: &str) -> bool {
    let within = |inner: &str, outer: &str| {
        inner == outer || inner.strip_prefix(outer).is_some_and(|rest| rest.starts_with('.'))
    };
    within(violation, field) || within(field, violation)
        // Both halves of an expiry are one date; the VAT is compared with the amount.
        || (violation.contains("expiry") && field.contains("expiry"))
        || (violation.contains("vat") && (field.starts_with("amount") || field.contains("vat")))
        || (violation == "scenario_name" && field.starts_with("scenario"))
}

fn check_refusal(case: &Case, status: &Status) {
    let about = format!("{} {} {}: {status:?}", case.method, case.field, case.about);
    let info = status.get_details_error_info().unwrap_or_else(|| panic!("no ErrorInfo: {about}"));
    assert!(DOCUMENTED.contains(&(info.reason.as_str(), status.code())), "undocumented: {about}");
    let headers = status.clone().into_http::<()>().headers().clone();
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    assert!(bytes < TRAILERS_MAX, "{bytes} bytes of trailers: {about}");
    if info.reason != "VALIDATION_FAILED" {
        return;
    }
    let bad = status.get_details_bad_request().unwrap_or_else(|| panic!("no BadRequest: {about}"));
    let violations = bad.field_violations;
    assert!(violations.len() <= VIOLATIONS_MAX, "{about}");
    assert!(violations.iter().any(|v| names(&v.field, &case.field)), "not named: {about}");
    assert!(violations.iter().all(|v| !v.description.is_empty()), "{about}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_field_wrong_in_every_way_is_refused_by_name() {
    let mut bed = Bed::start().await;
    let pool = protocol();
    for (method, message) in good(&pool, &bed.payment) {
        let payment = bed.create().await;
        let bytes = good(&pool, &payment)[&method].encode_to_vec();
        match bed.call(&method, bytes).await {
            Ok(_) => {}
            // No webhook_url on the payment that these tests share.
            Err(status) if method == "SimulateWebhook" => {
                assert_eq!(status.code(), Code::FailedPrecondition, "{message:?}");
            }
            Err(status) => panic!("{method}: {status:?}"),
        }
    }
    let cases = field_cases(&pool, &bed.payment);
    let (mut refused, mut accepted) = (0, 0);
    for case in &cases {
        match bed.call(&case.method, case.bytes.clone()).await {
            Ok(_) => {
                accepted += 1;
                let about = format!("{} {} {}", case.method, case.field, case.about);
                assert!(!must_be_refused(case), "accepted: {about}");
            }
            Err(status) => {
                refused += 1;
                check_refusal(case, &status);
            }
        }
    }
    bed.is_well().await;
    println!("{} cases: {refused} refused, {accepted} allowed after all", cases.len());
    assert!(cases.len() >= 600, "the generator has lost cases: {}", cases.len());
}

/// Bytes that are no message of the type.
fn undecodable(good: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut cases: Vec<(String, Vec<u8>)> = Vec::new();
    // Cut in the middle of a field: at least one byte of it is there, and not all.
    for length in 1..good.len() {
        cases.push((format!("cut at {length}"), good[..length].to_vec()));
    }
    for tag in 1_u8..=15 {
        // Wire type 3 and 4 are groups, 6 and 7 are nothing.
        for wire in [3, 4, 6, 7] {
            cases.push((format!("field {tag} with wire type {wire}"), vec![(tag << 3) | wire]));
        }
        cases.push((format!("field {tag} of invalid UTF-8"), vec![(tag << 3) | 2, 2, 0xff, 0xfe]));
        cases.push((format!("field {tag} longer than the message"), vec![(tag << 3) | 2, 0x7f]));
        cases.push((
            format!("field {tag} with a varint of 11 bytes"),
            [vec![tag << 3], vec![0xff; 10], vec![1]].concat(),
        ));
    }
    let mut nested = vec![0x08, 0x01];
    for _ in 0..200 {
        let mut outer = vec![0x0a];
        prost::encode_length_delimiter(nested.len(), &mut outer).unwrap();
        outer.extend(nested);
        nested = outer;
    }
    cases.push(("200 levels deep".to_owned(), nested));
    cases.push(("0xff only".to_owned(), vec![0xff; 64]));
    cases
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_are_no_message_are_refused_and_unknown_fields_taken() {
    let mut bed = Bed::start().await;
    let pool = protocol();
    let mut count = 0;
    for (method, message) in good(&pool, &bed.payment) {
        for (about, bytes) in undecodable(&message.encode_to_vec()) {
            count += 1;
            let case = Case { method: method.clone(), about, field: String::new(), bytes };
            if let Err(status) = bed.call(&method, case.bytes.clone()).await {
                let info = status.get_details_error_info();
                let info = info.unwrap_or_else(|| panic!("{method} {}: {status:?}", case.about));
                let documented = DOCUMENTED.contains(&(info.reason.as_str(), status.code()));
                assert!(documented, "{method} {}: {status:?}", case.about);
            }
        }
        let large = bed.call(&method, vec![0; (64 << 10) + 1]).await.unwrap_err();
        assert_eq!(large.get_details_error_info().unwrap().reason, "MESSAGE_TOO_LARGE");
    }
    let mut unknown = good(&pool, &bed.payment)["CreatePaymentIntent"].encode_to_vec();
    unknown.extend([0xf8, 0x7f, 0x01]);
    bed.call("CreatePaymentIntent", unknown).await.expect("unknown fields are passed over");
    let torn = bed.call("CreatePaymentIntent", vec![0x0a, 0x05, b'a']).await.unwrap_err();
    assert_eq!(torn.code(), Code::InvalidArgument);
    assert_eq!(torn.get_details_error_info().unwrap().reason, "MALFORMED");
    bed.is_well().await;
    println!("{count} cases");
    assert!(count >= 1_000, "the generator has lost cases: {count}");
}

#[tokio::test]
async fn all_bad_fields_are_named_at_once() {
    let bed = Bed::start().await;
    let status = bed.call("CreatePaymentIntent", Vec::new()).await.unwrap_err();
    let violations = status.get_details_bad_request().unwrap().field_violations;
    let fields: Vec<_> = violations.iter().map(|v| v.field.as_str()).collect();
    assert_eq!(fields, ["reservation_id", "user_id", "amount"]);
}
