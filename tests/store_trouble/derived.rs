//! Keys and lists are in no commit: killed between a commit and their way into their tables, or after it, the
//! service finds every one of them again.

use std::{collections::BTreeMap, fs, path::Path};

use payment_sim::api::pb::payment::v1::{CreatePaymentIntentRequest, ListPaymentsRequest};
use tonic::Code;

use super::{
    SOON, request,
    support::{Client, client, process::Launch, until},
};

const PAYMENTS: usize = 60;
const USERS: usize = 3;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_and_lists_are_complete_after_a_kill_at_any_stage() {
    let folder = tempfile::tempdir().expect("a folder");
    let launch = Launch::new(folder.path()).with("EVENT_SINK", "none");
    let data = folder.path().join("data");
    let mut known = BTreeMap::new();
    for stage in [Stage::AtOnce, Stage::BroughtIn, Stage::AtOnce] {
        let mut service = launch.start();
        service.ready(SOON).await.expect("a service");
        let mut client = client(launch.grpc_port);
        let (first, tables_before) = (known.len(), tables(&data));
        for n in first..first + PAYMENTS {
            let reply = client.create_payment_intent(keyed(n)).await.expect("a create");
            known.insert(n, reply.into_inner().payment_intent_id);
        }
        if stage == Stage::BroughtIn {
            let brought_in = until(SOON, || async { tables(&data) > tables_before }).await;
            assert!(brought_in, "they are never brought in");
        }
        service.kill();
        let mut service = launch.start();
        service.ready(SOON).await.expect("a service again");
        check(&mut client, &known).await;
        service.kill();
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Stage {
    AtOnce,
    BroughtIn,
}

fn user(n: usize) -> String {
    format!("user-{}", n % USERS)
}

fn keyed(n: usize) -> CreatePaymentIntentRequest {
    CreatePaymentIntentRequest { user_id: user(n), ..request(&format!("derived-{n}")) }
}

/// How many files of tables there are. Commits are in the journal, and nothing is flushed so early: there is
/// one more once something was brought in.
fn tables(data: &Path) -> usize {
    let files = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
    let keyspaces = files(&data.join("derived/keyspaces"));
    keyspaces.map(|keyspace| files(&keyspace.path().join("tables")).count()).sum()
}

async fn check(client: &mut Client, known: &BTreeMap<usize, String>) {
    for (n, id) in known {
        let again = client.create_payment_intent(keyed(*n)).await.expect("a replay");
        assert_eq!(again.into_inner().payment_intent_id, *id, "the key of payment {n}");
        let mut other = keyed(*n);
        other.amount.as_mut().expect("an amount").amount += 1;
        let refused = client.create_payment_intent(other).await.expect_err("another request");
        assert_eq!(refused.code(), Code::AlreadyExists, "the key of payment {n}");
    }
    for u in 0..USERS {
        let mut wanted: Vec<_> =
            known.iter().filter(|(n, _)| *n % USERS == u).map(|(_, id)| id).collect();
        wanted.sort();
        let query = ListPaymentsRequest {
            user_id: user(u),
            pagination: Some(payment_sim::api::pb::common::v1::Pagination {
                page_size: 100,
                ..Default::default()
            }),
            ..Default::default()
        };
        let page = client.list_payments(query).await.expect("a list").into_inner();
        let mut listed: Vec<_> = page.payments.iter().map(|p| &p.payment_intent_id).collect();
        listed.sort();
        assert_eq!(listed, wanted, "the list of {}", user(u));
    }
}
