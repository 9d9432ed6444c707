//! The loop behind scheduler and outbox, on a store that fails.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use payment_sim::{
    app::NewPayment, clock::ManualClock, domain::scenario::Scenario, driver, scheduler::Scheduler,
    store::Work,
};
use tokio_util::sync::CancellationToken;

use crate::support::bare::{new_payment, outbox};

/// Leases that are given back wake the loop: without a pause it would never let anything else run.
#[test]
fn a_step_that_fails_leaves_its_thread_to_others() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (stop, others_ran) = (CancellationToken::new(), Arc::new(AtomicBool::new(false)));
    let (done, finished) = mpsc::channel::<()>();
    let watchdog = {
        let stop = stop.clone();
        thread::spawn(move || {
            let _ = finished.recv_timeout(Duration::from_secs(20));
            stop.cancel();
        })
    };
    runtime.block_on(async {
        let clock = ManualClock::at_ms(1_767_225_600_000);
        let (shared, app) = outbox(&clock);
        let expires = NewPayment { scenario: Some(Scenario::Manual), ..new_payment("r") };
        app.create(expires, None, app.now()).await.unwrap();
        shared.store.close().await;
        assert_eq!(shared.store.backlog(Work::Wake).pending, 1);
        let scheduler = Scheduler {
            store: Arc::clone(&shared.store),
            clock: Arc::clone(&shared.clock),
            metrics: Arc::clone(&shared.metrics),
        };
        let other = async {
            tokio::task::yield_now().await;
            others_ran.store(true, Ordering::Relaxed);
            stop.cancel();
        };
        let driving = driver::drive(&scheduler, shared.store, shared.clock, stop.clone());
        tokio::join!(driving, other);
    });
    let in_time = finished_before_the_watchdog(&done);
    watchdog.join().unwrap();
    assert!(others_ran.load(Ordering::Relaxed) && in_time, "the loop kept its thread");
}

/// The watchdog ends the loop where nothing else can; it is gone then.
fn finished_before_the_watchdog(done: &mpsc::Sender<()>) -> bool {
    done.send(()).is_ok()
}
