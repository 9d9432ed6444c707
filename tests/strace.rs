//! A skipped sync survives every `kill -9`, because the page cache does: so the order of system calls is
//! looked at. Between a create's arrival and its reply, what it stored is written and synced; and what is
//! derived from it is synced in its table before the mark passes it.

mod support;

use std::{collections::HashMap, io::Write, path::Path, process::Command, time::Duration};

use payment_sim::{
    api::pb::{common::v1::Money, payment::v1::CreatePaymentIntentRequest},
    clock::Stopwatch,
    domain::ids::PaymentId,
};
use support::{client, process::Launch, setting};

const CREATES: usize = 20;
/// Everything is slower under strace.
const READY_WITHIN: Duration = Duration::from_secs(60);
const ENDS_WITHIN: Duration = Duration::from_secs(30);
const CALLS: &str = "trace=read,readv,recvfrom,recvmsg,write,writev,pwrite64,pwritev,sendto,sendmsg,\
                     fsync,fdatasync";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_create_is_synced_before_it_is_answered() {
    if !can_trace() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let trace = folder.path().join("trace");
    let trace_text = trace.to_str().expect("UTF-8");
    // -y: the path behind each descriptor. The strings must be long enough to hold our marks.
    let strace = ["strace", "-f", "-y", "-s", "65536", "-e", CALLS, "-o", trace_text];
    let launch = Launch::new(folder.path()).under(&strace);
    let mut service = launch.start();
    let events = service.stdout();
    let reader = std::thread::spawn(|| std::io::copy(&mut { events }, &mut std::io::sink()));
    service.ready(READY_WITHIN).await.expect("a service under strace");
    let mut client = client(launch.grpc_port);
    let mut probes = Vec::new();
    for n in 0..CREATES {
        let asked = format!("strace-probe-{n:04}");
        let request = CreatePaymentIntentRequest {
            reservation_id: asked.clone(),
            user_id: "strace".to_owned(),
            amount: Some(Money { amount: 1, currency: "KRW".to_owned() }),
            ..Default::default()
        };
        let reply = client.create_payment_intent(request).await.expect("a create");
        probes.push(Probe { asked, answered: reply.into_inner().payment_intent_id });
    }
    service.terminate();
    let status = service.exits(ENDS_WITHIN).await.expect("it ends by itself");
    assert!(status.success(), "{status}");
    let _ = reader.join();
    let text = std::fs::read_to_string(&trace).expect("a trace");
    let data = folder.path().join("data");
    for probe in &probes {
        if let Err(why) = synced_before_answer(&text, &data, probe) {
            let kept = folder.keep();
            panic!("{}: {why}; the trace is kept in {}", probe.asked, kept.display());
        }
    }
}

/// Keys and lists are in no commit: where a start derives them again from is what keeps them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_derived_is_synced_before_the_mark_moves_past_it() {
    if !can_trace() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let trace = folder.path().join("trace");
    let trace_text = trace.to_str().expect("UTF-8");
    // -x: in hex where it is not all text, since ids are bytes.
    let strace = ["strace", "-f", "-y", "-x", "-s", "65536", "-e", CALLS, "-o", trace_text];
    let launch = Launch::new(folder.path()).with("EVENT_SINK", "none").under(&strace);
    let mut service = launch.start();
    service.ready(READY_WITHIN).await.expect("a service under strace");
    let mut client = client(launch.grpc_port);
    let mut ids = Vec::new();
    let watch = Stopwatch::start();
    loop {
        let request = CreatePaymentIntentRequest {
            reservation_id: format!("strace-{}", ids.len()),
            user_id: "strace".to_owned(),
            amount: Some(Money { amount: 1, currency: "KRW".to_owned() }),
            idempotency_key: format!("key-{}", ids.len()),
            ..Default::default()
        };
        let reply = client.create_payment_intent(request).await.expect("a create").into_inner();
        ids.push(PaymentId::parse(&reply.payment_intent_id).expect("an id"));
        let text = std::fs::read_to_string(&trace).expect("a trace");
        let passed = marks(&calls(&text)).iter().any(|(_, mark)| *mark > ids[0]);
        if passed {
            break;
        }
        assert!(watch.elapsed() < READY_WITHIN, "the mark never moves");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    service.kill();
    let text = std::fs::read_to_string(&trace).expect("a trace");
    let calls = calls(&text);
    for (mark_began, mark) in marks(&calls) {
        for id in ids.iter().filter(|id| **id < mark) {
            let what = synced_in_tables(&calls, *id, mark_began);
            assert_eq!(what, (true, true), "key and list of {id:?} before the mark {mark:?}");
        }
    }
}

/// The marks in the order in which they were written to the journal, and when that began.
fn marks(calls: &[Call]) -> Vec<(usize, PaymentId)> {
    let name = hex(b"derived");
    let in_journal = calls.iter().filter(|call| call.is(&WRITES) && call.path().ends_with(".jnl"));
    let mark = |call: &Call| {
        let (_, rest) = call.text.rsplit_once(&name)?;
        let digits: String = rest.split("\\x").skip(1).take(16).map(|byte| &byte[..2]).collect();
        let mut id = [0; 16];
        hex::decode_to_slice(digits, &mut id).ok()?;
        Some((call.began, PaymentId::from_bytes(id)))
    };
    in_journal.filter_map(mark).collect()
}

/// Whether a payment's key, and whether its place in lists, was written to a table and synced there before
/// that line of the trace. A key holds the id, a place the id with its bits turned over.
fn synced_in_tables(calls: &[Call], id: PaymentId, before: usize) -> (bool, bool) {
    let is_synced = |bytes: &[u8]| {
        let text = hex(bytes);
        let tables =
            calls.iter().filter(|call| call.is(&WRITES) && call.path().contains("/tables/"));
        tables.filter(|call| call.text.contains(&text)).any(|write| {
            let sync_of_it = |call: &&Call| call.is(&SYNCS) && call.path() == write.path();
            calls
                .iter()
                .filter(sync_of_it)
                .any(|sync| sync.began > write.ended && sync.ended < before && sync.result >= 0)
        })
    };
    (is_synced(id.bytes()), is_synced(&id.bytes().map(|byte| !byte)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect()
}

/// Where not, the test is skipped; CI must be able to.
fn can_trace() -> bool {
    let tried = Command::new("strace").args(["-f", "-o", "/dev/null", "true"]).output();
    let can = tried.is_ok_and(|done| done.status.success());
    if !can {
        assert!(setting("CI").is_none(), "CI must be able to run strace");
        // Past the capture of a passing test's output: what is skipped must be seen.
        let _ = writeln!(std::io::stderr(), "skipped: strace is missing, or may not trace");
    }
    can
}

/// What is looked for in a trace: text of a request, and text of its reply.
struct Probe {
    asked: String,
    answered: String,
}

/// One system call, between the lines where it began and where it had ended.
#[derive(Clone, Debug)]
struct Call {
    name: String,
    /// The first argument: descriptor and path.
    target: String,
    text: String,
    began: usize,
    ended: usize,
    result: i64,
}

impl Call {
    fn is(&self, names: &[&str]) -> bool {
        names.contains(&self.name.as_str())
    }

    fn path(&self) -> &str {
        let path = self.target.split_once('<').map_or("", |(_, path)| path);
        path.trim_end_matches('>')
    }

    fn is_to_socket(&self) -> bool {
        self.path().starts_with("socket:") || self.path().starts_with("TCP")
    }
}

const READS: [&str; 4] = ["read", "readv", "recvfrom", "recvmsg"];
const WRITES: [&str; 6] = ["write", "writev", "pwrite64", "pwritev", "sendto", "sendmsg"];
const SYNCS: [&str; 2] = ["fsync", "fdatasync"];

/// Request read, its record written under `data`, that file synced with success, reply sent: each begun
/// after the one before had ended.
fn synced_before_answer(trace: &str, data: &Path, probe: &Probe) -> Result<(), String> {
    let calls = calls(trace);
    let data = format!("{}/", data.display());
    let arrival = calls
        .iter()
        .find(|call| call.is(&READS) && call.is_to_socket() && call.text.contains(&probe.asked))
        .ok_or("its request is not in the trace")?;
    let reply = calls
        .iter()
        .filter(|call| call.is(&WRITES) && call.target == arrival.target)
        .find(|call| call.began > arrival.ended && call.text.contains(&probe.answered))
        .ok_or("its reply is not in the trace")?;
    let between = |from: usize| {
        calls
            .iter()
            .filter(move |call| call.began > from && call.ended < reply.began && call.result >= 0)
    };
    let records: Vec<_> = between(arrival.ended)
        .filter(|call| call.is(&WRITES) && call.path().starts_with(&data))
        .filter(|call| call.text.contains(&probe.asked))
        .collect();
    if records.is_empty() {
        return Err("nothing of it was written to the store before the reply".to_owned());
    }
    let synced = records.iter().any(|record| {
        between(record.ended).any(|call| call.is(&SYNCS) && call.path() == record.path())
    });
    if synced { Ok(()) } else { Err(format!("no sync of it before the reply: {records:?}")) }
}

/// The calls that had ended, in the order in which they did.
fn calls(trace: &str) -> Vec<Call> {
    let mut begun: HashMap<&str, (usize, String)> = HashMap::new();
    let mut calls = Vec::new();
    for (at, line) in trace.lines().enumerate() {
        let Some((pid, rest)) = line.split_once(' ') else { continue };
        let rest = rest.trim_start();
        if let Some(start) = rest.strip_suffix(" <unfinished ...>") {
            begun.insert(pid, (at, start.to_owned()));
        } else if let Some((_, end)) =
            rest.split_once(" resumed>").filter(|_| rest.starts_with("<... "))
        {
            let Some((began, start)) = begun.remove(pid) else { continue };
            calls.extend(call(&format!("{start}{end}"), began, at));
        } else {
            calls.extend(call(rest, at, at));
        }
    }
    calls
}

fn call(text: &str, began: usize, ended: usize) -> Option<Call> {
    let (name, rest) = text.split_once('(')?;
    let (arguments, result) = rest.rsplit_once(" = ")?;
    let target = arguments.split([',', ')']).next()?;
    Some(Call {
        name: name.to_owned(),
        target: target.to_owned(),
        text: arguments.to_owned(),
        began,
        ended,
        result: result.split(' ').next()?.parse().ok()?,
    })
}

mod the_analysis {
    use super::*;

    const ARRIVAL: &str =
        r#"7 recvfrom(20<socket:[99]>, "\0\0\7ask-1\22", 8192, 0, NULL, NULL) = 40"#;
    const RECORD: &str = r#"9 write(13</d/data/fjall/0.jnl>, "\1ask-1\2", 300) = 300"#;
    const SYNC: &str = "9 fdatasync(13</d/data/fjall/0.jnl>) = 0";
    const REPLY: &str = r#"7 writev(20<socket:[99]>, [{iov_base="pi_1", iov_len=4}], 1) = 4"#;

    fn judge(lines: &[&str]) -> Result<(), String> {
        let probe = Probe { asked: "ask-1".to_owned(), answered: "pi_1".to_owned() };
        synced_before_answer(&lines.join("\n"), Path::new("/d/data"), &probe)
    }

    #[test]
    fn accepts_the_right_order() {
        assert_eq!(judge(&[ARRIVAL, RECORD, SYNC, REPLY]), Ok(()));
        let began = "9 fdatasync(13</d/data/fjall/0.jnl> <unfinished ...>";
        let other = "8 read(4<anon_inode:[eventfd]>, \"\", 8) = 8";
        let done = "9 <... fdatasync resumed>) = 0";
        assert_eq!(judge(&[ARRIVAL, RECORD, began, other, done, REPLY]), Ok(()));
        let asked = "7 recvfrom(20<socket:[99]>,  <unfinished ...>";
        let came = r#"7 <... recvfrom resumed>"\0\0\7ask-1\22", 8192, 0, NULL, NULL) = 40"#;
        assert_eq!(judge(&[asked, other, came, RECORD, SYNC, REPLY]), Ok(()));
    }

    #[test]
    fn refuses_a_reply_without_a_sync_of_its_own_record_before_it() {
        let began = "9 fdatasync(13</d/data/fjall/0.jnl> <unfinished ...>";
        let done = "9 <... fdatasync resumed>) = 0";
        let failed = "9 fdatasync(13</d/data/fjall/0.jnl>) = -1 EIO (Input/output error)";
        let elsewhere = "9 fdatasync(14</d/data/HIGH_WATER>) = 0";
        let outside = "9 fdatasync(13</tmp/fjall/0.jnl>) = 0";
        for wrong in [
            &[ARRIVAL, RECORD, REPLY] as &[&str],
            &[ARRIVAL, RECORD, REPLY, SYNC],
            &[ARRIVAL, SYNC, RECORD, REPLY],
            &[SYNC, ARRIVAL, RECORD, REPLY],
            &[ARRIVAL, began, RECORD, done, REPLY],
            &[ARRIVAL, RECORD, began, REPLY, done],
            &[ARRIVAL, RECORD, failed, REPLY],
            &[ARRIVAL, RECORD, elsewhere, REPLY],
            &[ARRIVAL, RECORD, outside, REPLY],
            &[ARRIVAL, SYNC, REPLY],
        ] {
            assert!(judge(wrong).is_err(), "{wrong:#?}");
        }
    }

    #[test]
    fn says_what_it_did_not_find() {
        assert_eq!(judge(&[RECORD, SYNC, REPLY]).unwrap_err(), "its request is not in the trace");
        assert_eq!(judge(&[ARRIVAL, RECORD, SYNC]).unwrap_err(), "its reply is not in the trace");
    }
}
