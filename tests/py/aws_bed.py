"""The AWS side of tests/moto.rs: makes bus, rule, queue and target, and reads the queue.

    aws_bed.py setup <endpoint> <bus>                       -> {"queue_url": "..."}
    aws_bed.py receive <endpoint> <queue url> <at least>    -> [message body, ...]
"""

import json
import sys
import time

import boto3

DEADLINE_S = 20
# One more poll after the last message that is expected: what should not have come, would be there.
LAST_POLL_S = 1
PATTERN = {"source": ["payment-sim-api"], "detail-type": ["Payment Status Updated"]}


def client(service, endpoint):
    return boto3.client(
        service,
        endpoint_url=endpoint,
        region_name="ap-northeast-2",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


def setup(endpoint, bus):
    events, sqs = client("events", endpoint), client("sqs", endpoint)
    queue_url = sqs.create_queue(QueueName=f"{bus}-queue")["QueueUrl"]
    attributes = sqs.get_queue_attributes(QueueUrl=queue_url, AttributeNames=["QueueArn"])
    queue_arn = attributes["Attributes"]["QueueArn"]
    events.create_event_bus(Name=bus)
    events.put_rule(Name="statuses", EventBusName=bus, EventPattern=json.dumps(PATTERN))
    target = {"Id": "queue", "Arn": queue_arn}
    answer = events.put_targets(Rule="statuses", EventBusName=bus, Targets=[target])
    assert answer["FailedEntryCount"] == 0, answer
    return {"queue_url": queue_url}


def receive(endpoint, queue_url, at_least):
    sqs = client("sqs", endpoint)
    bodies = []
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        enough = len(bodies) >= int(at_least)
        answer = sqs.receive_message(
            QueueUrl=queue_url, MaxNumberOfMessages=10, WaitTimeSeconds=LAST_POLL_S
        )
        messages = answer.get("Messages", [])
        for message in messages:
            sqs.delete_message(QueueUrl=queue_url, ReceiptHandle=message["ReceiptHandle"])
            bodies.append(json.loads(message["Body"]))
        if enough and not messages:
            break
    return bodies


if __name__ == "__main__":
    command = {"setup": setup, "receive": receive}[sys.argv[1]]
    print(json.dumps(command(*sys.argv[2:])))
