#!/usr/bin/env python3
"""The whole way once, on an emulated AWS: payment -> event -> rule -> queue -> worker -> reservation.

    demo_aws.py <folder with the binaries>       (make demo-aws builds them and calls this)

Starts everything that it needs on free ports: the emulator (moto), a reservation API of ten lines,
payment-sim and reservation-worker. Prints each step as it is seen, exits with 0 only if all were, and
ends whatever it started.
"""

import contextlib
import http.server
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

import boto3
import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

SCRIPTS = pathlib.Path(__file__).resolve().parent
REGION = "ap-northeast-2"
SEEN_WITHIN_S = 60
# The emulator asks for credentials and checks none; the metadata service of EC2 is not there to ask.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
# So short that five receipts, after which a message goes to the dead-letter queue, take ten seconds.
VISIBILITY = "2s"


class Failed(Exception):
    pass


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def until(what, is_so):
    """What `is_so` gives, once that is true."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while time.monotonic() < deadline:
        found = is_so()
        if found:
            return found
        time.sleep(0.05)
    raise Failed(f"not seen within {SEEN_WITHIN_S} s: {what}")


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


@contextlib.contextmanager
def process(folder, name, command, env, ready):
    """A child that is ready; ended by its number afterwards. Its output goes to `<folder>/<name>.log`."""
    log_path = folder / f"{name}.log"
    with open(log_path, "ab") as log:
        child = subprocess.Popen(command, env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        until(f"{name} is ready", lambda: child.poll() is not None or answers(ready))
        if child.poll() is not None:
            raise Failed(f"{name} ended with {child.returncode}:\n{log_path.read_text()}")
        yield child
    finally:
        child.kill()
        child.wait(10)


def drained(child):
    """SIGTERM, and the code that it ends with."""
    child.send_signal(signal.SIGTERM)
    return child.wait(30)


def moto(folder):
    port = free_port()
    command = [f"{sys.prefix}/bin/moto_server", "-H", "127.0.0.1", "-p", str(port)]
    url = f"http://127.0.0.1:{port}"
    return url, process(folder, "moto", command, os.environ, f"{url}/moto-api/")


def aws(url):
    """What both binaries need to know of the emulator."""
    return CREDENTIALS | {"AWS_REGION": REGION, "AWS_ENDPOINT_URL": url}


def sqs(url):
    return boto3.client(
        "sqs", region_name=REGION, endpoint_url=url, aws_access_key_id="test", aws_secret_access_key="test"
    )


def set_up_aws(url):
    """Bus, rule, queue and dead-letter queue, by the script that people use."""
    run = subprocess.run(
        [sys.executable, SCRIPTS / "aws_setup.py", "setup"],
        env=os.environ | aws(url), capture_output=True, text=True, check=False,
    )
    if run.returncode:
        raise Failed(run.stderr)
    queues = sqs(url).list_queues()["QueueUrls"]
    dead = next(queue for queue in queues if queue.endswith("-dlq"))
    return dead.removesuffix("-dlq"), dead


def worker(folder, binaries, url, queue, **settings):
    port = free_port()
    env = aws(url) | {
        "HOME": str(folder), "WORKER_PORT": str(port), "PAYMENT_WEBHOOK_QUEUE_URL": queue,
        "WORKER_VISIBILITY": VISIBILITY, "LOG_LEVEL": "info", "NO_COLOR": "1",
    } | settings
    ops = f"http://127.0.0.1:{port}"
    return ops, process(folder, "reservation-worker", [binaries / "reservation-worker"], env, f"{ops}/readyz")


def payment_sim(folder, binaries, url):
    grpc_port, ops_port = free_port(), free_port()
    env = aws(url) | {
        "HOME": str(folder), "GRPC_PORT": str(grpc_port), "OPS_PORT": str(ops_port), "EVENT_SINK": "eventbridge",
        "DEFAULT_DELAY_MS": "500", "LOG_LEVEL": "info", "NO_COLOR": "1",
    }
    ready = f"http://127.0.0.1:{ops_port}/readyz"
    return f"127.0.0.1:{grpc_port}", process(folder, "payment-sim", [binaries / "payment-sim"], env, ready)


class ReservationApi:
    """Reservations are HOLD until somebody says otherwise; each call is kept."""

    def __init__(self):
        self.status, self.calls, self.answer = {}, [], threading.Event()
        self.answer.set()
        api = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                _, _, _, reservation, verb = self.path.split("/")
                api.calls.append((self.path, self.headers, body))
                api.answer.wait(SEEN_WITHIN_S)
                api.status[reservation] = {"confirm": "CONFIRMED", "cancel": "CANCELLED"}[verb]
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.answer.set()
        self.server.shutdown()
        self.server.server_close()


def create_payment(channel, reservation, scenario):
    """CreatePaymentIntent, knowing nothing but what reflection tells."""
    pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    method = pool.FindServiceByName("payment.v1.PaymentService").FindMethodByName("CreatePaymentIntent")
    body = {
        "reservation_id": reservation, "user_id": "user_456", "amount": {"amount": 100000, "currency": "KRW"},
        "scenario": scenario,
    }
    request = json_format.ParseDict(body, message_factory.GetMessageClass(method.input_type)(), descriptor_pool=pool)
    call = channel.unary_unary(
        "/payment.v1.PaymentService/CreatePaymentIntent",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
    )
    return json_format.MessageToDict(call(request, timeout=10), descriptor_pool=pool)


def pay(channel, api, reservation, scenario, wanted):
    api.status[reservation] = "HOLD"
    created = create_payment(channel, reservation, scenario)
    intent = created["paymentIntentId"]
    print(f"   payment {intent} for {reservation}, scenario {scenario}: {created['status']}; reservation is HOLD")
    until(f"{reservation} is {wanted}", lambda: api.status[reservation] == wanted)
    path, headers, body = next(call for call in api.calls if call[0].split("/")[3] == reservation)
    key = headers["Idempotency-Key"]
    if not key.startswith(f"evt_{intent.removeprefix('pi_')}_") or body != {"payment_id": f"pay_{intent[3:]}"}:
        raise Failed(f"called with {key}, {body}")
    print(f"   event -> rule -> queue -> worker: POST {path} with Idempotency-Key {key}")
    print(f"   reservation {reservation} is {wanted}")


def poison(url, queue, dead):
    body = "this is no event"
    client = sqs(url)
    client.send_message(QueueUrl=queue, MessageBody=body)
    print(f"   sent {body!r} to the queue; the worker leaves it alone")

    def landed():
        names = ["ApproximateReceiveCount"]
        reply = client.receive_message(QueueUrl=dead, WaitTimeSeconds=1, MessageSystemAttributeNames=names)
        return reply.get("Messages")

    (message,) = until("the poison message is in the dead-letter queue", landed)
    if message["Body"] != body:
        raise Failed(f"the dead-letter queue has {message['Body']!r}")
    print("   it is in the dead-letter queue, after its five receipts")


def empty(url, queue):
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    found = sqs(url).get_queue_attributes(QueueUrl=queue, AttributeNames=names)["Attributes"]
    return set(found.values()) == {"0"}


def demo(folder, binaries):
    url, emulator = moto(folder)
    with contextlib.ExitStack() as running:
        running.enter_context(emulator)
        print(f"1. an emulated AWS on {url}")
        queue, dead = set_up_aws(url)
        print(f"2. bus, rule, queue {queue.rsplit('/', 1)[1]} and dead-letter queue {dead.rsplit('/', 1)[1]}")
        api = running.enter_context(ReservationApi())
        address, service = payment_sim(folder, binaries, url)
        service = running.enter_context(service)
        ops, consumer = worker(folder, binaries, url, queue, RESERVATION_API_URL=api.url)
        consumer = running.enter_context(consumer)
        print(f"3. reservation API on {api.url}, payment-sim on {address}, reservation-worker on {ops}")
        channel = running.enter_context(grpc.insecure_channel(address))
        print("4. a payment that is approved")
        pay(channel, api, "res-approved", "approve", "CONFIRMED")
        print("5. a payment that fails")
        pay(channel, api, "res-failed", "fail", "CANCELLED")
        print("6. a poison message")
        poison(url, queue, dead)
        until("the queue is empty", lambda: empty(url, queue))
        codes = drained(consumer), drained(service)
        if codes != (0, 0) or len(api.calls) != 2:
            raise Failed(f"worker and service ended with {codes}, the API was called {len(api.calls)} times")
        print("7. the queue is empty, each reservation was told once, and both ended cleanly on SIGTERM")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    binaries = pathlib.Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        try:
            demo(pathlib.Path(folder), binaries)
        except Failed as why:
            for log in sorted(pathlib.Path(folder).glob("*.log")):
                print(f"---- {log.name} ----\n{log.read_text()[-4000:]}", file=sys.stderr)
            sys.exit(f"FAILED: {why}")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    main()
