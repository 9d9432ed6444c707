//! Card data is looked at and dropped: no byte of it is kept, logged or sent.

use std::{
    io,
    path::Path,
    sync::{Arc, Mutex, OnceLock},
};

use base64::{Engine, engine::general_purpose::STANDARD_NO_PAD};
use tracing_subscriber::{filter::Targets, layer::SubscriberExt};

use crate::support::{
    BankTransferDetails, CreatePaymentIntentRequest, CreditCardDetails, PaymentDetails,
    PaymentScenario as Scenario, ProcessPaymentRequest, TestApp, WebhookSink, create,
};

const NUMBER: &str = "4539148803436467";
/// Fails the Luhn check: what a mistyped card looks like.
const MISTYPED: &str = "4539148803436468";
const HOLDER: &str = "Holder Needle";
const ACCOUNT: &str = "110-987-654321";

fn card(number: &str) -> PaymentDetails {
    PaymentDetails {
        credit_card: Some(CreditCardDetails {
            card_number: number.to_owned(),
            expiry_month: "12".to_owned(),
            expiry_year: "2098".to_owned(),
            cardholder_name: HOLDER.to_owned(),
            cvv: "737".to_owned(),
            ..Default::default()
        }),
        bank_transfer: Some(BankTransferDetails {
            account_number: ACCOUNT.to_owned(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// All log lines of this process, as far as the product writes them at its most talkative.
#[derive(Clone, Default)]
struct Logs(Arc<Mutex<Vec<u8>>>);

impl io::Write for Logs {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn logs() -> Logs {
    static LOGS: OnceLock<Logs> = OnceLock::new();
    let install = || {
        let logs = Logs::default();
        let writer = logs.clone();
        let layer = tracing_subscriber::fmt::layer().with_writer(move || writer.clone());
        let ours = Targets::new().with_target("payment_sim", tracing::Level::TRACE);
        let subscriber = tracing_subscriber::registry().with(ours).with(layer);
        tracing::subscriber::set_global_default(subscriber).unwrap();
        logs
    };
    LOGS.get_or_init(install).clone()
}

/// The ways in which a text could be written, each with its name.
fn spellings(text: &str) -> Vec<(&'static str, Vec<u8>)> {
    let mut all = vec![
        ("plain", text.as_bytes().to_vec()),
        ("hex", hex::encode(text).into_bytes()),
        ("HEX", hex::encode_upper(text).into_bytes()),
    ];
    // Base64 depends on where in its input a text begins; the edges mix with what is beside it.
    for (name, before) in [("base64", ""), ("base64+1", "x"), ("base64+2", "xx")] {
        let encoded = STANDARD_NO_PAD.encode(format!("{before}{text}"));
        let skip = [0, 2, 3][before.len()];
        all.push((name, encoded.as_bytes()[skip..encoded.len() - 2].to_vec()));
    }
    if let Ok(number) = text.parse::<u64>() {
        for separator in [" ", "-"] {
            let groups: Vec<&str> = (0..4).map(|i| &text[4 * i..4 * i + 4]).collect();
            all.push(("in groups", groups.join(separator).into_bytes()));
        }
        all.push(("big endian", number.to_be_bytes()[1..].to_vec()));
        all.push(("little endian", number.to_le_bytes()[..7].to_vec()));
        all.push(("packed", hex::decode(text).unwrap()));
        let mut varint = Vec::new();
        let mut rest = number;
        while rest > 0 {
            varint.push((rest & 0x7f) as u8 | if rest > 0x7f { 0x80 } else { 0 });
            rest >>= 7;
        }
        all.push(("varint", varint));
    }
    all
}

fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    let (first, rest) = needle.split_first().unwrap();
    let mut begins = bytes.iter().enumerate().filter(|(_, byte)| *byte == first);
    begins.any(|(at, _)| bytes[at + 1..].starts_with(rest))
}

/// All bytes below a folder, but for the zeros that a journal has ahead of itself.
fn files(folder: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            bytes.extend(files(&path));
            continue;
        }
        let file = std::fs::read(&path).unwrap();
        let written = file.chunks(4096).filter(|chunk| *chunk != &[0; 4096][..chunk.len()]);
        written.for_each(|chunk| bytes.extend(chunk));
    }
    bytes
}

#[test]
fn the_search_finds_every_spelling() {
    for (name, needle) in spellings(NUMBER) {
        assert!(needle.len() >= 6, "{name}");
    }
    let encoded = STANDARD_NO_PAD.encode(format!("card={NUMBER}&cvv=1"));
    assert!(spellings(NUMBER).iter().any(|(_, needle)| contains(encoded.as_bytes(), needle)));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_byte_of_a_card_is_kept_logged_or_sent() {
    let logs = logs();
    let (folder, sink) = (tempfile::tempdir().unwrap(), WebhookSink::start().await);
    let app = TestApp::stored_in(folder.path()).await;
    let request = |number, key: &str| CreatePaymentIntentRequest {
        payment_details: Some(card(number)),
        webhook_url: sink.url.clone(),
        idempotency_key: key.to_owned(),
        scenario: Scenario::Manual.into(),
        user_id: "user-to-be-found".to_owned(),
        ..create("reservation-1")
    };
    let id = app.create(request(NUMBER, "k")).await;
    app.create(request(NUMBER, "k")).await;
    let mut replies = format!("{:?}", app.get(&id).await);
    let refusal = app.client.clone().create_payment_intent(request(MISTYPED, "m")).await;
    replies += &format!("{:?}", refusal.unwrap_err());
    let process = |number: &str| ProcessPaymentRequest {
        payment_intent_id: id.clone(),
        payment_details: Some(card(number)),
        idempotency_key: "p".to_owned(),
    };
    let refusal = app.client.clone().process_payment(process(MISTYPED)).await;
    replies += &format!("{:?}", refusal.unwrap_err());
    let reply = app.client.clone().process_payment(process(NUMBER)).await.unwrap();
    replies += &format!("{reply:?}");
    let hook = sink.only().await;
    app.webhook_becomes(&id, "DELIVERED").await;
    let event = app.events(1).await;
    let mut app = app;
    app.stop().await;
    let logged = logs.0.lock().unwrap().clone();
    let stored = files(folder.path());
    assert!(contains(&stored, b"user-to-be-found"), "the search finds what is stored");
    assert!(!logged.is_empty(), "the search sees log lines");
    let sent = format!("{:?}{:?}{event:?}{replies}", hook.headers, hook.raw);
    for secret in [NUMBER, MISTYPED, HOLDER, ACCOUNT] {
        for (spelling, needle) in spellings(secret) {
            assert!(!contains(&stored, &needle), "{secret} is stored, {spelling}");
            assert!(!contains(&logged, &needle), "{secret} is logged, {spelling}");
            assert!(!contains(sent.as_bytes(), &needle), "{secret} is sent, {spelling}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_card_is_shown_masked() {
    let app = TestApp::quiet().await;
    let payment_details = Some(card(NUMBER));
    let id = app.create(CreatePaymentIntentRequest { payment_details, ..create("r") }).await;
    let shown = app.payment(&id).await.card.unwrap();
    assert_eq!(shown.masked_number, "453914******6467");
    assert_eq!((shown.expiry_month.as_str(), shown.expiry_year.as_str()), ("12", "2098"));
    assert!(shown.brand.eq_ignore_ascii_case("visa"), "{}", shown.brand);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_card_that_process_brings_is_shown_masked_too() {
    let app = TestApp::quiet().await;
    let id = app.pay(Scenario::Manual, "").await;
    let process = ProcessPaymentRequest {
        payment_intent_id: id.clone(),
        payment_details: Some(card(NUMBER)),
        ..Default::default()
    };
    app.client.clone().process_payment(process).await.unwrap();
    assert_eq!(app.payment(&id).await.card.unwrap().masked_number, "453914******6467");
}
