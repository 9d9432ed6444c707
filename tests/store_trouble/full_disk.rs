//! A disk that fills up: a tmpfs of its own, filled from outside.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use payment_sim::api::pb::payment::v1::ListPaymentsRequest;
use rustix::fs::{FallocateFlags, fallocate, ftruncate, statvfs};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::{
    SOON, create, reservation, skip,
    support::{
        Client, client,
        process::{Launch, get},
        until,
    },
};

const DISK: &str = "400m";
const MIB: u64 = 1 << 20;

fn can_mount() -> bool {
    let mount = Command::new("unshare")
        .args(["-m", "sh", "-c", "mount -t tmpfs tmpfs /tmp"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    mount.is_ok_and(|status| status.success())
}

/// The disk, seen from outside the service's mount namespace.
struct Disk(PathBuf);

impl Disk {
    /// Fills or empties until so much is free.
    fn leave(&self, free: u64) {
        let filler = File::options().create(true).append(true).open(self.0.join("filler"));
        let filler = filler.expect("a filler");
        let length = filler.metadata().expect("its length").len();
        let now = self.free();
        if now > free {
            fallocate(&filler, FallocateFlags::empty(), length, now - free).expect("room");
        } else {
            ftruncate(&filler, length - (free - now)).expect("a shorter filler");
        }
    }

    fn free(&self) -> u64 {
        let stat = statvfs(&self.0).expect("its numbers");
        stat.f_bavail * stat.f_frsize
    }
}

fn is_refused_as_full(reply: &Result<String, Status>) -> bool {
    reply.as_ref().is_err_and(|status| {
        let retry = status.get_details_retry_info().and_then(|info| info.retry_delay);
        status.code() == Code::ResourceExhausted
            && status.get_details_error_info().is_some_and(|info| info.reason == "STORE_FULL")
            && retry == Some(Duration::from_secs(5))
    })
}

async fn head(port: u16, path: &str) -> String {
    let reply = get(port, path).await.expect("the ops port answers");
    println!("{path}: {reply}");
    reply
}

async fn becomes(client: &Client, refused: bool, round: &str) {
    let mut n = 0;
    let is_so = until(SOON, || {
        n += 1;
        let (mut client, key) = (client.clone(), format!("{round}-{n}"));
        async move {
            let reply = create(&mut client, &key).await;
            if refused { is_refused_as_full(&reply) } else { reply.is_ok() }
        }
    });
    assert!(is_so.await, "{round}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn below_the_reserve_writes_are_refused_and_reads_go_on() {
    if !can_mount() {
        let root = rustix::process::geteuid().is_root();
        return skip("unshare and mount of a tmpfs are not allowed here", root);
    }
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    std::fs::create_dir(&data).expect("a mount point");
    let mount = format!(
        "mount -t tmpfs -o size={DISK} tmpfs '{}' && exec \"$0\"",
        data.to_str().expect("UTF-8")
    );
    let launch = Launch::new(folder.path())
        .with("EVENT_SINK", "none")
        .under(&["unshare", "-m", "sh", "-c", &mount]);
    let mut service = launch.start();
    service.ready(SOON).await.expect("a service on its own disk");
    let inside = format!("/proc/{}/root{}", service.id(), data.display());
    let disk = Disk(Path::new(&inside).to_owned());
    println!("{} MiB free", disk.free() / MIB);
    let mut client = client(launch.grpc_port);
    let known = create(&mut client, "known").await.expect("a create");

    disk.leave(250 * MIB);
    becomes(&client, true, "below").await;
    let again = create(&mut client, "below-again").await;
    assert!(is_refused_as_full(&again), "{again:?}");
    assert_eq!(reservation(&mut client, &known).await.expect("reads go on"), "known");
    let list = client.list_payments(ListPaymentsRequest::default()).await.expect("lists go on");
    assert!(!list.into_inner().payments.is_empty());
    assert_eq!(create(&mut client, "known").await.expect("a known key is answered"), known);
    let health = head(launch.ops_port, "/health").await;
    assert!(health.starts_with("HTTP/1.1 503") && health.contains("degraded"), "{health}");
    assert!(head(launch.ops_port, "/readyz").await.starts_with("HTTP/1.1 200"));

    // Above the reserve, but not above the relief: two rounds of the janitor later it is still so.
    disk.leave(290 * MIB);
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    let between = create(&mut client, "between").await;
    assert!(is_refused_as_full(&between), "{between:?}");

    disk.leave(330 * MIB);
    becomes(&client, false, "above").await;
    assert!(head(launch.ops_port, "/health").await.starts_with("HTTP/1.1 200"));
    assert_eq!(service.exited(), None);
}
