"""The running service, as a client of another language sees it: Python's own gRPC (the C core), messages
made from reflection alone, and the off-the-shelf webhook verifier."""

import base64
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.json_format import ParseDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from standardwebhooks import Webhook, WebhookVerificationError

from repository import ROOT

BINARY = Path(os.environ.get("PAYMENT_SIM_BIN", ROOT / "target/debug/payment-sim"))
SERVICE = "payment.v1.PaymentService"
DEADLINE = 30
PLAIN = "an old secret in plain text"
STANDARD = "whsec_" + base64.b64encode(b"a newer secret of 32 bytes, yes.").decode()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def eventually(what, found):
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        if found():
            return
        time.sleep(0.02)
    raise AssertionError(f"not within {DEADLINE} s: {what}")


class Receiver:
    """Keeps every delivery with its headers, and accepts it."""

    def __init__(self):
        self.deliveries = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.deliveries.append((dict(self.headers), body))
                self.send_response(204)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Running:
    def __init__(self, folder, **settings):
        self.grpc_port, self.ops_port = free_port(), free_port()
        environment = {
            "PATH": os.environ["PATH"],
            "GRPC_PORT": str(self.grpc_port),
            "OPS_PORT": str(self.ops_port),
            "STORE_URL": f"file:{folder}/data",
            "EVENT_SINK": "none",
            "DEFAULT_DELAY_MS": "50",
            "LOG_LEVEL": "warn",
            **settings,
        }
        self.process = subprocess.Popen([BINARY], env=environment, cwd=folder)
        eventually("the service is ready", self.ready)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}")
        self.pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(self.channel))

    def ready(self):
        assert self.process.poll() is None, "the service ended while it started"
        try:
            return self.get("/readyz") == "ready\n"
        except OSError:
            return False

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ops_port}{path}", timeout=5) as reply:
            return reply.read().decode()

    def call(self, method, metadata=(), **fields):
        descriptor = self.pool.FindServiceByName(SERVICE).methods_by_name[method]
        request = message_factory.GetMessageClass(descriptor.input_type)()
        reply = message_factory.GetMessageClass(descriptor.output_type)
        stub = self.channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reply.FromString,
        )
        return stub(ParseDict(fields, request), timeout=DEADLINE, metadata=metadata)

    def create(self, **fields):
        payment = {
            "reservation_id": "res-1",
            "user_id": "user-1",
            "amount": {"amount": 100000, "currency": "KRW"},
            **fields,
        }
        return self.call("CreatePaymentIntent", **payment)

    def stop(self):
        self.channel.close()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(DEADLINE) == 0


@pytest.fixture
def service(tmp_path):
    running = Running(tmp_path, WEBHOOK_SECRET=f"{STANDARD},{PLAIN}")
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()


def test_the_off_the_shelf_verifier_accepts_every_delivery_and_no_changed_byte(service):
    receiver = Receiver()
    scenarios = ["approve", "fail", "delay", "random"] * 5
    for scenario in scenarios:
        service.create(scenario=scenario, webhook_url=receiver.url, echo={"n": 1.5, "텍스트": ["✓"]})
    eventually("all webhooks", lambda: len(receiver.deliveries) == len(scenarios))
    # During a rotation either secret verifies; plain text is given as its base64.
    verifiers = [Webhook(STANDARD), Webhook("whsec_" + base64.b64encode(PLAIN.encode()).decode())]
    for headers, body in receiver.deliveries:
        for verifier in verifiers:
            assert verifier.verify(body, headers)["reservation_id"] == "res-1"
        for place in range(0, len(body), 37):
            changed = body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
            with pytest.raises((WebhookVerificationError, UnicodeDecodeError)):
                verifiers[0].verify(changed, headers)
        for name, wrong in [("webhook-id", "evt_other"), ("webhook-timestamp", "1")]:
            with pytest.raises(WebhookVerificationError):
                verifiers[0].verify(body, {**headers, name: wrong})
    assert len({headers["webhook-id"] for headers, _ in receiver.deliveries}) == len(scenarios)


def test_a_payment_is_followed_through_reflection_alone(service):
    created = service.create(scenario="manual", idempotency_key="k")
    again = service.create(scenario="manual", idempotency_key="k")
    assert again.SerializeToString(deterministic=True) == created.SerializeToString(deterministic=True)
    done = service.call("ProcessPayment", payment_intent_id=created.payment_intent_id)
    assert done.result.success and done.transaction_id.startswith("txn_")
    refund = service.call(
        "CancelPayment",
        payment_intent_id=created.payment_intent_id,
        refund_amount={"amount": 40000, "currency": "KRW"},
    )
    assert refund.refunded_amount.amount == 40000
    payment = service.call("GetPaymentIntent", payment_intent_id=created.payment_intent_id).payment
    assert [entry.kind for entry in payment.timeline] == ["created", "status_changed", "partially_refunded"]
    with pytest.raises(grpc.RpcError) as error:
        service.call("GetPaymentIntent", payment_intent_id="pi_00000000000000000000000000")
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


def test_health_is_served_by_grpc_and_by_http(service):
    health = health_pb2_grpc.HealthStub(service.channel)
    for name in ["", SERVICE]:
        reply = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=DEADLINE)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    assert json.loads(service.get("/health"))["status"] == "ok"


def published_pool(service):
    """The contract as the platform published it: without what is ours (100 and above)."""
    stub = reflection_pb2_grpc.ServerReflectionStub(service.channel)
    asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)
    (reply,) = stub.ServerReflectionInfo(iter([asked]), timeout=DEADLINE)
    files = [FileDescriptorProto.FromString(f) for f in reply.file_descriptor_response.file_descriptor_proto]
    wanted = {file.name: file for file in files}
    pool = descriptor_pool.DescriptorPool()

    def add(name):
        file = wanted.get(name) or fetch(name)
        for dependency in file.dependency:
            add(dependency)
        for message in file.message_type if file.package == "payment.v1" else []:
            for place in reversed(range(len(message.field))):
                if message.field[place].number >= 100:
                    del message.field[place]
        try:
            pool.Add(file)
        except TypeError:
            pass

    def fetch(name):
        asked = reflection_pb2.ServerReflectionRequest(file_by_filename=name)
        (reply,) = stub.ServerReflectionInfo(iter([asked]), timeout=DEADLINE)
        return FileDescriptorProto.FromString(reply.file_descriptor_response.file_descriptor_proto[0])

    add("proto/payment/v1/payment.proto")
    return pool


def test_a_client_of_the_published_contract_works_unchanged(service):
    service.pool = published_pool(service)
    request = service.pool.FindMessageTypeByName("payment.v1.CreatePaymentIntentRequest")
    assert "echo" not in request.fields_by_name
    created = service.create(scenario="PAYMENT_SCENARIO_APPROVE")
    status = service.call("GetPaymentStatus", payment_intent_id=created.payment_intent_id)
    assert status.payment.status == 3 and status.payment.amount.amount == 100000
    listed = service.call("ListPayments", user_id="user-1", pagination={"page_size": 5})
    assert [p.payment_intent_id for p in listed.payments] == [created.payment_intent_id]
