//! One list of what EventBridge and SQS do, kept by the fake that our tests run against and, where
//! `PAYMENT_SIM_VENV` names a venv with it, by moto: what both keep, no test has made up.
//!
//! Where moto is known not to do as AWS does, the check says so and what moto does instead; the fake
//! does as AWS does. What only the fake can do, its faults, is in `aws_list/faults.rs`.

#[path = "support/fake_aws/mod.rs"]
mod fake_aws;
#[path = "support/moto.rs"]
mod moto;

mod aws_list {
    pub mod events;
    pub mod faults;
    pub mod sqs;
}

use std::{fmt::Debug, future::Future, pin::Pin, time::Duration};

use aws_sdk_eventbridge::{
    config::{Credentials, SharedCredentialsProvider},
    error::{ProvideErrorMetadata, SdkError},
};
use fake_aws::{FakeAws, Options};
use moto::Moto;
use payment_sim::{
    clock::SystemClock,
    courier::aws::{self, AwsSettings},
};
use tokio::task::JoinSet;

/// When to give up. Nothing depends on how long anything really takes.
const DEADLINE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Fake,
    Moto,
}

/// An AWS, and clients for it. Checks run side by side: each makes its own buses and queues.
#[derive(Clone)]
struct Bed {
    who: Who,
    events: aws_sdk_eventbridge::Client,
    sqs: aws_sdk_sqs::Client,
}

type Check = fn(Bed) -> Pin<Box<dyn Future<Output = ()> + Send>>;

macro_rules! checks {
    ($($module:ident :: $name:ident),* $(,)?) => {
        &[$((stringify!($name), |bed| Box::pin(aws_list::$module::$name(bed)))),*]
    };
}

const LIST: &[(&str, Check)] = checks![
    events::buses_rules_and_targets_are_listed_as_they_were_made,
    events::what_is_not_there_is_not_found,
    events::a_pattern_that_is_none_is_refused,
    events::what_a_rule_matches_arrives_in_the_envelope,
    events::patterns_match_as_documented,
    events::a_rule_that_is_disabled_sends_nothing,
    events::entries_fail_one_by_one,
    events::more_than_ten_entries_or_none_are_refused,
    events::a_call_that_is_too_large_is_refused,
    events::a_bus_that_is_not_there_takes_everything,
    events::a_target_that_is_not_there_loses_events,
    events::the_trace_header_goes_with_the_message,
    sqs::a_queue_is_found_by_its_name,
    sqs::a_queue_is_made_once,
    sqs::a_message_is_received_as_it_was_sent_and_deleted_once,
    sqs::a_batch_is_taken_entry_by_entry,
    sqs::a_batch_that_breaks_a_rule_is_refused_whole,
    sqs::at_most_ten_messages_a_receive,
    sqs::numbers_out_of_range_are_refused,
    sqs::messages_out_of_bounds_are_refused,
    sqs::a_message_comes_again_when_its_visibility_ends,
    sqs::visibility_can_be_extended_and_ended,
    sqs::handles_that_are_none_are_refused,
    sqs::a_message_received_too_often_goes_to_the_dead_letter_queue,
    sqs::a_long_poll_ends_when_a_message_comes,
    sqs::a_delayed_message_comes_later,
];

impl Bed {
    async fn at(who: Who, endpoint: String) -> Self {
        let settings = AwsSettings {
            region: Some(fake_aws::REGION.to_owned()),
            endpoint_url: Some(endpoint),
            ..AwsSettings::default()
        };
        let dummy = Credentials::new("test", "test", None, None, "test");
        let config = aws::sdk_config(&settings).await.into_builder();
        let config = config
            .credentials_provider(SharedCredentialsProvider::new(dummy))
            // Long polls are longer than what the couriers wait.
            .timeout_config(aws_config::timeout::TimeoutConfig::disabled())
            .build();
        let events = aws_sdk_eventbridge::Client::new(&config);
        Self { who, events, sqs: aws_sdk_sqs::Client::new(&config) }
    }

    fn is_moto(&self) -> bool {
        self.who == Who::Moto
    }

    /// All checks that fail, by name; their words are above.
    async fn keeps_the_list(&self) {
        let mut running = JoinSet::new();
        for (name, check) in LIST {
            let checked = tokio::time::timeout(DEADLINE, check(self.clone()));
            running.spawn(async move { (*name, JoinSet::from_iter([checked]).join_next().await) });
        }
        let mut broken = Vec::new();
        while let Some(done) = running.join_next().await {
            let (name, ended) = done.unwrap();
            if !matches!(ended, Some(Ok(Ok(())))) {
                broken.push(name);
            }
        }
        assert!(broken.is_empty(), "{:?} does not keep: {broken:#?}", self.who);
    }
}

/// The error code of a call that was refused.
#[track_caller]
fn refused<T: Debug, E: ProvideErrorMetadata + Debug>(result: Result<T, SdkError<E>>) -> String {
    let error = result.expect_err("refused");
    error.code().unwrap_or_else(|| panic!("no code: {error:?}")).to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_fake_keeps_the_list() {
    let fake = FakeAws::start(Options::new(SystemClock)).await;
    Bed::at(Who::Fake, fake.url.clone()).await.keeps_the_list().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn moto_keeps_the_list() {
    let Some(venv) = moto::venv() else { return };
    let moto = Moto::start(&venv);
    Bed::at(Who::Moto, moto.endpoint()).await.keeps_the_list().await;
}
