"""gRPC's C core as the client, knowing nothing but what reflection tells it, and Standard Webhooks' own
verifier as the receiver: neither shares a line with the service."""

import base64
import datetime
import hashlib
import hmac
import json

import grpc
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from service import Receiver, drained, running

SERVICE = "payment.v1.PaymentService"
PLAIN = "a plain secret of ours"
KEY = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()


class Client:
    """Calls methods by name with JSON, through a pool of descriptors."""

    def __init__(self, channel, pool):
        self.channel, self.pool = channel, pool

    @classmethod
    def by_reflection(cls, channel):
        database = ProtoReflectionDescriptorDatabase(channel)
        return cls(channel, descriptor_pool.DescriptorPool(database))

    def method(self, name):
        return self.pool.FindServiceByName(SERVICE).FindMethodByName(name)

    def call(self, name, body, metadata=(), timeout=10):
        return self.with_call(name, body, metadata, timeout)[0]

    def with_call(self, name, body, metadata=(), timeout=10):
        method = self.method(name)
        request = json_format.ParseDict(body, message_factory.GetMessageClass(method.input_type)(), descriptor_pool=self.pool)
        call = self.channel.unary_unary(
            f"/{SERVICE}/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
        )
        reply, made = call.with_call(request, metadata=metadata, timeout=timeout)
        return json_format.MessageToDict(reply, descriptor_pool=self.pool), made


def create_body(**more):
    return {
        "reservation_id": "reservation", "user_id": "user", "amount": {"amount": 1000, "currency": "KRW"},
        "scenario": "approve",
    } | more


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with running(tmp_path_factory.mktemp("service"), WEBHOOK_SECRET=PLAIN) as service:
        yield service


@pytest.fixture
def client(service):
    with grpc.insecure_channel(service.address) as channel:
        yield Client.by_reflection(channel)


def refused(call, *arguments, **named):
    """Code, reason and fields of a refusal."""
    with pytest.raises(grpc.RpcError) as error:
        call(*arguments, **named)
    status = rpc_status.from_call(error.value)
    assert status is not None, error.value
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        for message in (info, bad):
            detail.Unpack(message)
    assert info.domain == "payment-sim"
    return error.value.code(), info.reason, [violation.field for violation in bad.field_violations]


# ---- The client ----


def test_reflection_lists_the_services(service):
    with grpc.insecure_channel(service.address) as channel:
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert sorted(services) == [
        "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection", SERVICE,
        "simulation.v1.SimulationService",
    ]


def test_a_payments_life_by_reflection_alone(client):
    created = client.call("CreatePaymentIntent", create_body(echo={"k": [1, None, "x"]}, metadata={"tags": {"a": "b"}}))
    assert created["status"] == "PAYMENT_STATUS_PENDING"
    identity = {"payment_intent_id": created["paymentIntentId"]}
    payment = client.call("GetPaymentIntent", identity)["payment"]
    assert payment["status"] == "PAYMENT_STATUS_COMPLETED"
    assert payment["echo"] == {"k": [1.0, None, "x"]}
    assert client.call("GetPaymentStatus", identity)["payment"] == payment
    part = client.call("CancelPayment", identity | {"refund_amount": {"amount": 400, "currency": "KRW"}})
    assert part["refundedAmount"] == {"amount": "400", "currency": "KRW"}
    rest = client.call("CancelPayment", identity)
    assert (rest["status"], rest["refundedAmount"]["amount"]) == ("PAYMENT_STATUS_REFUNDED", "600")
    listed = client.call("ListPayments", {"user_id": "user", "status": "PAYMENT_STATUS_REFUNDED"})["payments"]
    assert created["paymentIntentId"] in [payment["paymentIntentId"] for payment in listed]


@pytest.mark.parametrize("scenario", ["approve", "PAYMENT_SCENARIO_APPROVE", 1])
def test_both_spellings_of_a_scenario(client, scenario):
    created = client.call("CreatePaymentIntent", create_body(scenario=scenario))
    payment = client.call("GetPaymentIntent", {"payment_intent_id": created["paymentIntentId"]})["payment"]
    assert payment["scenario"] == "PAYMENT_SCENARIO_APPROVE"


def test_refusals_arrive_with_their_details(client):
    assert refused(client.call, "CreatePaymentIntent", create_body(user_id="", amount={"amount": -1, "currency": "won"})) == (
        grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED", ["user_id", "amount.amount", "amount.currency"],
    )
    nobody = {"payment_intent_id": "pi_01M7YXEA357V7JDH0C147D6FCY"}
    assert refused(client.call, "GetPaymentIntent", nobody) == (grpc.StatusCode.NOT_FOUND, "PAYMENT_NOT_FOUND", [])
    created = client.call("CreatePaymentIntent", create_body(scenario="timeout"))
    held = {"payment_intent_id": created["paymentIntentId"]}
    with pytest.raises(grpc.RpcError) as error:
        client.call("ProcessPayment", held, timeout=0.3)
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_long_list_of_mistakes_fits_the_clients_headers(client):
    long = "\u001b\"%<🙂" * 60
    card = {name: long for name in ("card_number", "expiry_month", "expiry_year", "cardholder_name", "cvv")}
    card |= {"installment_months": -1, "vat": {"amount": -1, "currency": long}}
    bank = {name: long for name in ("bank_code", "account_number", "account_holder")}
    mobile = {name: long for name in ("provider", "mobile_number")}
    metadata = {name: long for name in ("source", "user_agent", "ip_address", "session_id")}
    code, reason, fields = refused(client.call, "CreatePaymentIntent", {
        "reservation_id": long, "user_id": long, "webhook_url": long, "idempotency_key": long, "provider": long,
        "scenario_name": long, "metadata": metadata,
        "payment_details": {"credit_card": card, "bank_transfer": bank, "mobile_pay": mobile},
    })
    assert (code, reason, len(fields)) == (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED", 21)


def test_a_key_replays_the_first_reply(client):
    key = (("idempotency-key", "python"),)
    first, made = client.with_call("CreatePaymentIntent", create_body(), metadata=key)
    assert dict(made.initial_metadata()).get("idempotent-replayed") is None
    again, made = client.with_call("CreatePaymentIntent", create_body(), metadata=key)
    assert again == first and dict(made.initial_metadata())["idempotent-replayed"] == "true"
    other = create_body(user_id="other")
    assert refused(client.call, "CreatePaymentIntent", other, metadata=key)[:2] == (
        grpc.StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_CONFLICT",
    )


def test_health_is_grpcs_own_and_follows_the_drain(tmp_path):
    with running(tmp_path, DRAIN_DELAY_MS="1500") as service, grpc.insecure_channel(service.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as error:
            stub.Check(health_pb2.HealthCheckRequest(service="no.such.Service"))
        assert error.value.code() == grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=30)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        service.process.terminate()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert service.process.wait(30) == 0


# ---- A client of the published contract ----

# What other teams hold: the fields of the published contract and nothing of ours (those from 100 on).
OURS_FROM = 100


def published_pool(database):
    """Our files without what only we have, as if they were compiled from the published contract."""
    pool = descriptor_pool.DescriptorPool()
    rpcs = {
        "CreatePaymentIntent", "GetPaymentStatus", "ProcessPayment", "CancelPayment", "ListPayments", "SimulateWebhook",
    }
    added = set()

    def add(file):
        if file.name in added:
            return
        added.add(file.name)
        for name in file.dependency:
            add(database.FindFileByName(name))
        if file.package == "payment.v1":
            ours = {"Refund", "Card", "TimelineEntry", "Delivery", "Attempt", "GetPaymentIntentRequest", "GetPaymentIntentResponse"}
            keep(file.message_type, lambda message: message.name not in ours)
            for message in file.message_type:
                keep(message.field, lambda field: field.number < OURS_FROM)
            for enum in file.enum_type:
                keep(enum.value, lambda value: value.number < OURS_FROM and value.name.isupper())
                enum.ClearField("options")
            for service in file.service:
                keep(service.method, lambda method: method.name in rpcs)
        pool.AddSerializedFile(file.SerializeToString())

    add(database.FindFileContainingSymbol(SERVICE))
    return pool


def keep(repeated, wanted):
    for at in reversed(range(len(repeated))):
        if not wanted(repeated[at]):
            del repeated[at]


# Name and number of each field, as published.
PUBLISHED = {
    "CreatePaymentIntentRequest": "reservation_id 1 amount 2 user_id 3 method 4 scenario 5 webhook_url 6 idempotency_key 7 metadata 8",
    "CreatePaymentIntentResponse": "payment_intent_id 1 status 2 client_secret 3 payment_url 4 expires_at 5 error 6",
    "ProcessPaymentRequest": "payment_intent_id 1 payment_details 2 idempotency_key 3",
    "ProcessPaymentResponse": "payment_id 1 status 2 processed_at 3 transaction_id 4 result 5 error 6",
    "GetPaymentStatusRequest": "payment_intent_id 1 user_id 2",
    "GetPaymentStatusResponse": "payment 1 error 2",
    "CancelPaymentRequest": "payment_intent_id 1 reason 2 refund_amount 3 idempotency_key 4",
    "CancelPaymentResponse": "status 1 cancelled_at 2 refunded_amount 3 refund_id 4 error 5",
    "ListPaymentsRequest": "user_id 1 status 2 reservation_id 3 pagination 4",
    "ListPaymentsResponse": "payments 1 page_info 2 error 3",
    "SimulateWebhookRequest": "payment_intent_id 1 target_status 2 delay_seconds 3 force_trigger 4",
    "SimulateWebhookResponse": "webhook_sent 1 webhook_id 2 scheduled_at 3 error 4",
    "Payment": "payment_intent_id 1 payment_id 2 reservation_id 3 user_id 4 status 5 amount 6 method 7 created_at 8 "
    "updated_at 9 processed_at 10 transaction_id 11 result 12 metadata 13",
    "PaymentDetails": "method 1 credit_card 2 bank_transfer 3 mobile_pay 4",
    "CreditCardDetails": "card_number 1 expiry_month 2 expiry_year 3 cardholder_name 4 cvv 5",
    "BankTransferDetails": "bank_code 1 account_number 2 account_holder 3",
    "MobilePayDetails": "provider 1 mobile_number 2",
    "PaymentMetadata": "source 1 user_agent 2 ip_address 3 session_id 4 scenario 5 tags 6",
    "PaymentResult": "success 1 failure_reason 2 gateway_response 3 response_code 4 processed_at 5",
}


def test_a_client_of_the_published_contract_works_unchanged(service, client):
    pool = published_pool(ProtoReflectionDescriptorDatabase(client.channel))
    for name, fields in PUBLISHED.items():
        message = pool.FindMessageTypeByName(f"payment.v1.{name}")
        words = fields.split()
        assert {field.name: field.number for field in message.fields} == dict(zip(words[::2], map(int, words[1::2]), strict=True)), name
    published = Client(client.channel, pool)
    with Receiver() as receiver:
        body = create_body(scenario="PAYMENT_SCENARIO_APPROVE", method="PAYMENT_METHOD_CREDIT_CARD", webhook_url=receiver.url)
        created = published.call("CreatePaymentIntent", body | {"idempotency_key": "published"})
        assert created["status"] == "PAYMENT_STATUS_PENDING"
        assert published.call("CreatePaymentIntent", body | {"idempotency_key": "published"}) == created
        identity = {"payment_intent_id": created["paymentIntentId"]}
        details = {"credit_card": {"card_number": "4242424242424242", "expiry_month": "12", "expiry_year": "2099", "cvv": "123"}}
        processed = published.call("ProcessPayment", identity | {"payment_details": details})
        assert processed["result"]["success"] and processed["transactionId"].startswith("txn_")
        payment = published.call("GetPaymentStatus", identity | {"user_id": "user"})["payment"]
        assert payment["paymentId"] == processed["paymentId"] and payment["method"] == "PAYMENT_METHOD_CREDIT_CARD"
        sent = published.call("SimulateWebhook", identity | {"target_status": "PAYMENT_STATUS_FAILED", "force_trigger": True})
        assert sent["webhookSent"]
        told = {json.loads(body)["event_id"] for _, _, body in receiver.wait(2)}
        assert sent["webhookId"] in told and len(told) == 2
        refunded = published.call("CancelPayment", identity | {"reason": "why not"})
        assert refunded["status"] == "PAYMENT_STATUS_REFUNDED"
    listed = published.call("ListPayments", {"reservation_id": "reservation", "pagination": {"page": 1, "page_size": 1}})
    assert len(listed["payments"]) == 1 and listed["pageInfo"]["hasNextPage"]


# ---- The receiver ----


def verifier_key(secret):
    """As the documents say: `whsec_` and the base64 of a secret that does not begin so."""
    return secret if secret.startswith("whsec_") else "whsec_" + base64.b64encode(secret.encode()).decode()


def deliveries(folder, secrets):
    """Every webhook of some payments' lives, retries included."""
    with running(folder, WEBHOOK_SECRET=secrets, WEBHOOK_BACKOFF_BASE_MS="10") as service, Receiver() as receiver:
        receiver.answers = [500, 302, 204]
        with grpc.insecure_channel(service.address) as channel:
            client = Client.by_reflection(channel)
            for scenario in ("approve", "fail", "delay"):
                body = create_body(scenario=scenario, webhook_url=receiver.url, echo={"글": "🙂 <&>", "n": 0.5}, user_id="사용자")
                created = client.call("CreatePaymentIntent", body)
                identity = {"payment_intent_id": created["paymentIntentId"]}
                client.call("SimulateWebhook", identity | {"target_status": "PAYMENT_STATUS_EXPIRED"})
                if scenario == "approve":
                    client.call("CancelPayment", identity | {"refund_amount": {"amount": 1, "currency": "KRW"}})
            # Two a payment, the refund, and two attempts that were not taken.
            came = receiver.wait(9)
        assert drained(service) == 0
        return came


@pytest.mark.parametrize("secrets", [PLAIN, KEY, f"{KEY}, {PLAIN}"], ids=["plain", "whsec", "both"])
def test_the_off_the_shelf_verifier_accepts_every_delivery_and_nothing_else(tmp_path, secrets):
    came = deliveries(tmp_path, secrets)
    every = [secret.strip() for secret in secrets.split(",")]
    by_id = {}
    for path, headers, body in came:
        headers = {name.lower(): value for name, value in headers.items()}
        assert path == "/hook" and headers["content-type"] == "application/json"
        assert headers["user-agent"].startswith("payment-sim/")
        for secret in every:
            told = Webhook(verifier_key(secret)).verify(body, headers)
            assert told["event_id"] == headers["webhook-id"]
        newest = hmac.new(every[0].encode(), body, hashlib.sha256).hexdigest()
        assert headers["x-webhook-signature"] == f"sha256={newest}"
        # The same on every attempt.
        assert by_id.setdefault(headers["webhook-id"], body) == body
        assert len(headers["webhook-signature"].split()) == len(every)
        refuses_what_was_changed(Webhook(verifier_key(every[0])), headers, body)
    assert len(by_id) == 7


def refuses_what_was_changed(webhook, headers, body):
    def refuses(headers, body):
        with pytest.raises(WebhookVerificationError):
            webhook.verify(body, headers)

    for at in (0, len(body) // 2, len(body) - 1):
        refuses(headers, body[:at] + bytes([body[at] ^ 1]) + body[at + 1:])
    refuses(headers, body + b" ")
    refuses(headers | {"webhook-id": headers["webhook-id"] + "0"}, body)
    stamp = int(headers["webhook-timestamp"])
    refuses(headers | {"webhook-timestamp": str(stamp + 1)}, body)
    # Rightly signed, but long ago.
    old = datetime.datetime.fromtimestamp(stamp - 301, tz=datetime.timezone.utc)
    signed = webhook.sign(headers["webhook-id"], old, body.decode())
    refuses(headers | {"webhook-timestamp": str(stamp - 301), "webhook-signature": signed}, body)
    others = Webhook("whsec_" + base64.b64encode(b"somebody else's secret").decode())
    with pytest.raises(WebhookVerificationError):
        others.verify(body, headers)
