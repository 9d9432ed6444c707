use std::time::Duration;

use serde_json::{Value, json};

use super::{
    receiver::{Answer, DEADLINE, Receiver, Seen, aws_config, aws_reply, deaf_port},
    startup_check::StartupCheck,
};

const OURS: &str = r#"{"source":["payment-sim-api"],"detail-type":["Payment Status Updated"]}"#;

fn target(seen: &Seen) -> &str {
    seen.headers["x-amz-target"].to_str().unwrap()
}

fn asked(seen: &Seen, key: &str) -> Value {
    serde_json::from_slice::<Value>(&seen.body).unwrap()[key].clone()
}

fn rule(name: &str, pattern: &str, state: &str) -> Value {
    json!({"Name": name, "EventPattern": pattern, "State": state})
}

/// A bus with these rules, each on a page of its own; the rules of these names have a target.
async fn bus(rules: Vec<Value>, with_target: &'static [&'static str]) -> Receiver {
    Receiver::start(move |_, seen| match target(seen) {
        "AWSEvents.DescribeEventBus" => aws_reply(200, r#"{"Name":"the-bus"}"#),
        "AWSEvents.ListRules" => {
            let token = asked(seen, "NextToken");
            let page: usize = token.as_str().map_or(0, |token| token.parse().unwrap());
            let next = (page + 1 < rules.len()).then(|| (page + 1).to_string());
            let listed: Vec<_> = rules.get(page).into_iter().collect();
            aws_reply(200, &json!({"Rules": listed, "NextToken": next}).to_string())
        }
        "AWSEvents.ListTargetsByRule" => {
            let has = with_target.contains(&asked(seen, "Rule").as_str().unwrap());
            let targets = if has { json!([{"Id": "1", "Arn": "a"}]) } else { json!([]) };
            aws_reply(200, &json!({ "Targets": targets }).to_string())
        }
        other => panic!("{other}"),
    })
    .await
}

async fn problems_of_bus(receiver: &Receiver) -> Vec<String> {
    let mut check = StartupCheck::default();
    let config = aws_config(receiver.addr).await;
    check.wants_bus(&config, "the-bus".into(), "payment-sim-api".into());
    check.problems(DEADLINE).await
}

async fn problems_of_queue(answer: impl Fn() -> Answer + Send + Sync + 'static) -> Vec<String> {
    let receiver = Receiver::start(move |_, _| answer()).await;
    let mut check = StartupCheck::default();
    let url = "http://127.0.0.1:1/123456789012/events".to_owned();
    check.wants_queue(&aws_config(receiver.addr).await, url, "PAYMENT_WEBHOOK_QUEUE_URL");
    check.problems(DEADLINE).await
}

fn error(status: u16, code: &str) -> Answer {
    aws_reply(status, &json!({"__type": code, "message": "no"}).to_string())
}

#[tokio::test]
async fn nothing_wanted_is_nothing_missing() {
    assert!(StartupCheck::default().problems(DEADLINE).await.is_empty());
}

#[tokio::test]
async fn a_rule_with_a_target_on_any_page_is_enough() {
    let rules = vec![
        rule("others", r#"{"source":["orders"]}"#, "ENABLED"),
        rule("without-target", OURS, "ENABLED"),
        rule("ours", OURS, "ENABLED"),
    ];
    let mut receiver = bus(rules, &["ours", "others"]).await;
    assert_eq!(problems_of_bus(&receiver).await, [""; 0]);
    let first = receiver.next().await;
    assert_eq!(asked(&first, "Name"), "the-bus");
    assert_eq!(asked(&receiver.next().await, "EventBusName"), "the-bus");
}

#[tokio::test]
async fn a_bus_that_is_not_there_is_told_with_its_remedy() {
    let receiver = Receiver::start(|_, _| error(400, "ResourceNotFoundException")).await;
    let problems = problems_of_bus(&receiver).await;
    assert_eq!(problems.len(), 1);
    assert!(problems[0].starts_with("the bus the-bus does not exist"), "{problems:?}");
    assert!(problems[0].contains("aws events create-event-bus --name the-bus;"), "{problems:?}");
}

#[tokio::test]
async fn a_missing_rule_a_disabled_one_and_a_missing_target_are_told_apart() {
    let schedule = json!({"Name": "nightly", "ScheduleExpression": "rate(1 day)"});
    let cases = [
        (vec![], "no rule on the bus the-bus matches source payment-sim-api"),
        (vec![schedule], "no rule on the bus the-bus matches"),
        (vec![rule("a", r#"{"source":["b"]}"#, "ENABLED")], "no rule on the bus the-bus matches"),
        (vec![rule("a", OURS, "DISABLED")], "the rule a on the bus the-bus is disabled"),
        (vec![rule("a", OURS, "ENABLED")], "the rule a on the bus the-bus has no target"),
    ];
    for (rules, said) in cases {
        let problems = problems_of_bus(&bus(rules, &[]).await).await;
        assert_eq!(problems.len(), 1);
        assert!(problems[0].starts_with(said), "{said}: {problems:?}");
        assert!(problems[0].contains("; aws events "), "a remedy: {problems:?}");
    }
    let problems = problems_of_bus(&bus(vec![], &[]).await).await;
    assert!(problems[0].contains(&format!("--event-pattern '{OURS}'")), "{problems:?}");
}

#[tokio::test]
async fn patterns_are_read_as_far_as_source_and_detail_type_go() {
    let status = r#""detail-type":["Payment Status Updated"]"#;
    let cases = [
        ("{}", true),
        (r#"{"source":["other","payment-sim-api"]}"#, true),
        (r#"{"source":["payment-sim"]}"#, false),
        (r#"{"source":["Payment-sim-api"]}"#, false),
        (r#"{"source":[{"prefix":"payment-"}]}"#, true),
        (r#"{"source":[{"prefix":"order-"}]}"#, false),
        (r#"{"source":[{"prefix":"order-"},"payment-sim-api"]}"#, true),
        (r#"{"detail-type":["Payment Refund Updated"]}"#, false),
        (r#"{"source":[]}"#, false),
        // Cannot tell: counts as a match.
        (r#"{"source":[{"suffix":"nonsense"}]}"#, true),
        (r#"{"source":[{"prefix":{"equals-ignore-case":"PAY"}}]}"#, true),
        (r#"{"$or":[{"source":["other"]}]}"#, true),
        (r#"{"source":["payment-sim-api"],"detail":{"status":["X"]}}"#, true),
        ("no JSON", true),
    ];
    for (pattern, is_match) in cases {
        let receiver = bus(vec![rule("a", pattern, "ENABLED")], &["a"]).await;
        assert_eq!(problems_of_bus(&receiver).await.is_empty(), is_match, "{pattern}");
    }
    let other_source = format!("{{\"source\":[\"x\"],{status}}}");
    let receiver = bus(vec![rule("a", &other_source, "ENABLED")], &["a"]).await;
    assert_eq!(problems_of_bus(&receiver).await.len(), 1, "both have to match");
}

#[tokio::test]
async fn what_cannot_be_looked_at_is_told_with_what_it_takes() {
    let denied = Receiver::start(|_, _| error(400, "AccessDeniedException")).await;
    let problems = problems_of_bus(&denied).await;
    assert_eq!(problems.len(), 1);
    assert!(problems[0].contains("could not be looked at: AccessDeniedException"), "{problems:?}");
    assert!(problems[0].contains("events:ListRules"), "{problems:?}");

    let (_socket, addr) = deaf_port();
    let mut check = StartupCheck::default();
    check.wants_bus(&aws_config(addr).await, "the-bus".into(), "s".into());
    let problems = check.problems(DEADLINE).await;
    assert!(problems[0].contains("could not be looked at: CONNECTION"), "{problems:?}");
}

#[tokio::test]
async fn an_aws_that_does_not_answer_ends_the_check() {
    let receiver = Receiver::start(|_, _| Answer::Hang).await;
    let mut check = StartupCheck::default();
    check.wants_bus(&aws_config(receiver.addr).await, "the-bus".into(), "s".into());
    let problems = check.problems(Duration::from_millis(50)).await;
    assert_eq!(problems, ["not everything could be looked at within 50ms"]);
}

#[tokio::test]
async fn a_queue_is_there_or_missing_or_cannot_be_looked_at() {
    let there = problems_of_queue(|| aws_reply(200, r#"{"Attributes":{"QueueArn":"a"}}"#)).await;
    assert_eq!(there, [""; 0]);
    for code in ["com.amazonaws.sqs#QueueDoesNotExist", "AWS.SimpleQueueService.NonExistentQueue"] {
        let missing = problems_of_queue(move || error(400, code)).await;
        assert_eq!(missing.len(), 1);
        assert!(missing[0].contains("/events (PAYMENT_WEBHOOK_QUEUE_URL) does not exist"));
        assert!(missing[0].contains("aws sqs create-queue --queue-name events;"), "{missing:?}");
    }
    let denied = problems_of_queue(|| error(403, "AccessDenied")).await;
    assert!(denied[0].contains("could not be looked at: AccessDenied"), "{denied:?}");
}
