//! System calls of the store that fail, by strace's hand.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::{
    SOON, create, reservation, skip,
    support::{client, process::Launch},
};

/// EX_IOERR.
const EXIT_STORE_FAILED: i32 = 74;
const CREATES_MAX: usize = 200;
const CREATES_AFTER: usize = 3;

fn can_trace() -> bool {
    let strace = Command::new("strace")
        .args(["-f", "-e", "trace=none", "true"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    strace.is_ok_and(|status| status.success())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sync_that_fails_ends_the_acknowledgements() {
    let folder = tempfile::tempdir().expect("a folder");
    let fail = ["-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO:when=12+"];
    nothing_acknowledged_is_lost(folder.path(), &fail).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_fails_ends_the_acknowledgements() {
    let folder = tempfile::tempdir().expect("a folder");
    // Once, so that there is a journal whose path can be named.
    let launch = Launch::new(folder.path()).with("EVENT_SINK", "none");
    let mut service = launch.start();
    service.ready(SOON).await.expect("a service");
    service.terminate();
    service.exits(SOON).await.expect("it ends");
    drop(service);
    let journal = journal_of(&folder.path().join("data"));
    let journal = journal.to_str().expect("UTF-8");
    let fail = [
        "-P",
        journal,
        "-e",
        "trace=write,pwrite64",
        "-e",
        "inject=write,pwrite64:error=ENOSPC:when=12+",
    ];
    nothing_acknowledged_is_lost(folder.path(), &fail).await;
}

pub fn journal_of(data: &Path) -> PathBuf {
    let entries = std::fs::read_dir(data.join("fjall")).expect("the engine's folder");
    let mut journals: Vec<_> = entries
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == "jnl"))
        .collect();
    journals.sort();
    journals.pop().expect("a journal")
}

/// `None`: the service was gone before it could answer, and the status is the client's own: without headers, and with a
/// code that depends on where the connection broke.
fn reason_given_by_the_service(status: &Status) -> Option<String> {
    let info = status.get_details_error_info();
    let has_headers = !status.metadata().is_empty();
    assert_eq!(
        info.is_some(),
        has_headers,
        "the service gives a reason with each status: {status:?}"
    );
    info.map(|info| info.reason)
}

async fn nothing_acknowledged_is_lost(folder: &Path, fail: &[&str]) {
    if !can_trace() {
        return skip("strace is missing, or may not trace", true);
    }
    let launch = Launch::new(folder).with("EVENT_SINK", "none");
    let strace = [&["strace", "-f", "-qq", "-o", "/dev/null"], fail].concat();
    let mut service = launch.clone().under(&strace).start();
    service.ready(SOON).await.expect("a service under strace");
    let mut caller = client(launch.grpc_port);
    let mut acked = Vec::new();
    let failed = loop {
        assert!(acked.len() < CREATES_MAX, "nothing failed");
        let key = format!("trouble-{}", acked.len());
        match create(&mut caller, &key).await {
            Ok(id) => acked.push((key, id)),
            Err(status) => break status,
        }
    };
    println!("{} acknowledged, then {failed:?}", acked.len());
    assert!(!acked.is_empty());
    if let Some(reason) = reason_given_by_the_service(&failed) {
        assert_eq!(failed.code(), Code::Unavailable, "{failed:?}");
        assert_eq!(reason, "STORE_UNAVAILABLE", "{failed:?}");
    }
    for n in 0..CREATES_AFTER {
        create(&mut caller, &format!("after-{n}"))
            .await
            .expect_err("nothing is acknowledged after");
    }
    let status = service.exits(SOON).await.expect("it ends by itself");
    assert_eq!(status.code(), Some(EXIT_STORE_FAILED), "{status}");

    let mut service = launch.start();
    service.ready(SOON).await.expect("a start that recovers");
    let mut caller = client(launch.grpc_port);
    for (key, id) in &acked {
        let found = reservation(&mut caller, id).await;
        assert_eq!(found.as_deref().ok(), Some(key.as_str()), "{key} is lost: {found:?}");
    }
    // What was not acknowledged can be sent again, whether it was stored or not.
    create(&mut caller, &format!("trouble-{}", acked.len())).await.expect("a repeat");
}
