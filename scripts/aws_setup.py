#!/usr/bin/env python3
"""Makes in an emulated AWS what the service publishes to: bus, rule, target and queues.

    aws_setup.py setup      make them; again does no harm
    aws_setup.py receive    print what is on the queue, for at most 5 seconds, and leave it there

Reads AWS_ENDPOINT_URL, AWS_REGION, EVENT_BUS_NAME and PAYMENT_EVENT_SOURCE. Without an endpoint it
refuses: a real account is set up by hand, with a queue policy and a dead-letter queue on the target.
"""

import json
import os
import sys
import time

import boto3

REGION = os.environ.get("AWS_REGION", "ap-northeast-2")
BUS = os.environ.get("EVENT_BUS_NAME", "ticket-reservation-events")
SOURCE = os.environ.get("PAYMENT_EVENT_SOURCE", "payment-sim-api")
RULE = "payment-events-to-sqs"
QUEUE = "traffic-tacos-payment-webhooks"
# What the rule cannot bring to the queue, and what its consumer cannot digest.
QUEUE_DLQ = f"{QUEUE}-dlq"
# For PAYMENT_WEBHOOK_DLQ_URL.
DEAD_WEBHOOKS = "traffic-tacos-payment-dead-webhooks"
RECEIVES_MAX = 5
# EventBridge's own defaults, in words: a day, or 185 attempts.
RETRY_POLICY = {"MaximumEventAgeInSeconds": 86400, "MaximumRetryAttempts": 185}


def client(service):
    return boto3.client(service, region_name=REGION, endpoint_url=os.environ["AWS_ENDPOINT_URL"])


def made(sqs, name):
    url = sqs.create_queue(QueueName=name)["QueueUrl"]
    attributes = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]
    return url, attributes["QueueArn"]


def setup():
    events, sqs = client("events"), client("sqs")
    try:
        events.create_event_bus(Name=BUS)
    except events.exceptions.ResourceAlreadyExistsException:
        pass
    pattern = {"source": [SOURCE], "detail-type": ["Payment Status Updated"]}
    events.put_rule(Name=RULE, EventBusName=BUS, EventPattern=json.dumps(pattern))
    (url, arn), (_, dlq_arn), (dead_url, _) = (made(sqs, name) for name in (QUEUE, QUEUE_DLQ, DEAD_WEBHOOKS))
    redrive = {"deadLetterTargetArn": dlq_arn, "maxReceiveCount": RECEIVES_MAX}
    sqs.set_queue_attributes(QueueUrl=url, Attributes={"RedrivePolicy": json.dumps(redrive)})
    target = {"Id": "1", "Arn": arn, "RetryPolicy": RETRY_POLICY, "DeadLetterConfig": {"Arn": dlq_arn}}
    put = events.put_targets(Rule=RULE, EventBusName=BUS, Targets=[target])
    # Success of the call says nothing about its entries.
    if put["FailedEntryCount"]:
        sys.exit(f"the target was refused: {put['FailedEntries']}")
    print(f"bus {BUS}, rule {RULE}, queue {url}, dead webhooks {dead_url}")


def receive():
    sqs = client("sqs")
    url = sqs.get_queue_url(QueueName=QUEUE)["QueueUrl"]
    until = time.monotonic() + 5
    while time.monotonic() < until:
        # Visible again at once: this only looks.
        reply = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10, WaitTimeSeconds=5, VisibilityTimeout=0)
        for message in reply.get("Messages", []):
            print(message["Body"])
        if reply.get("Messages"):
            return
    print("the queue is empty", file=sys.stderr)


if __name__ == "__main__":
    commands = {"setup": setup, "receive": receive}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    if not os.environ.get("AWS_ENDPOINT_URL"):
        sys.exit("AWS_ENDPOINT_URL is not set: this is for an emulated AWS only")
    commands[sys.argv[1]]()
