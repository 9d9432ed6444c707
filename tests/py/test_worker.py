"""reservation-worker as a process of its own, against an emulated AWS and a reservation API of ours."""

import json
import pathlib
import subprocess
import sys
import time
import urllib.request

import pytest

from repository import ROOT
from service import binary

sys.path.insert(0, str(ROOT / "scripts"))

import demo_aws  # noqa: E402


def binaries():
    return pathlib.Path(binary()).parent


def test_the_demo_sees_all_that_it_promises():
    command = [sys.executable, ROOT / "scripts/demo_aws.py", binaries()]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    for seen in ["res-approved is CONFIRMED", "res-failed is CANCELLED", "in the dead-letter queue", "\n7. "]:
        assert seen in run.stdout, run.stdout


@pytest.fixture
def bed(tmp_path):
    """An emulated AWS with its queues, and a reservation API."""
    url, emulator = demo_aws.moto(tmp_path)
    with emulator, demo_aws.ReservationApi() as api:
        yield Bed(tmp_path, url, *demo_aws.set_up_aws(url), api)


class Bed:
    def __init__(self, folder, url, queue, dead, api):
        self.folder, self.url, self.queue, self.dead, self.api = folder, url, queue, dead, api

    def send(self, reservation, status="COMPLETED", version=2, **more):
        detail = {
            "event_id": f"evt_{reservation}_{version}", "event_type": "payment.status_updated", "version": version,
            "payment_id": f"pay_{reservation}", "reservation_id": reservation, "status": f"PAYMENT_STATUS_{status}",
        } | more
        envelope = {"source": "payment-sim-api", "detail-type": "Payment Status Updated", "detail": detail}
        demo_aws.sqs(self.url).send_message(QueueUrl=self.queue, MessageBody=json.dumps(envelope))

    def worker(self, **settings):
        settings = {"RESERVATION_API_URL": self.api.url} | settings
        return demo_aws.worker(self.folder, binaries(), self.url, self.queue, **settings)

    def is_empty(self):
        return demo_aws.empty(self.url, self.queue)

    def log(self):
        return (self.folder / "reservation-worker.log").read_text()


def metric(ops, series):
    with urllib.request.urlopen(f"{ops}/metrics", timeout=5) as reply:
        lines = reply.read().decode().splitlines()
    (value,) = [line.rsplit(" ", 1)[1] for line in lines if line.startswith(f"{series} ")]
    return float(value)


def results(ops, result):
    return metric(ops, f'worker_messages_total{{result="{result}"}}')


def test_sigterm_ends_what_is_in_hand_deletes_it_and_exits_with_zero(bed):
    bed.api.answer.clear()
    ops, worker = bed.worker(WORKER_VISIBILITY="60s")
    with worker as process:
        bed.send("slow")
        demo_aws.until("the call is under way", lambda: bed.api.calls)
        process.terminate()
        demo_aws.until("it is draining", lambda: not demo_aws.answers(f"{ops}/readyz"))
        bed.send("late")
        assert process.poll() is None, "it left what it had in hand"
        bed.api.answer.set()
        assert process.wait(30) == 0, bed.log()
    assert bed.api.status == {"slow": "CONFIRMED"}
    # Of the two only the late one is left, untouched. It may be hidden for a while: the emulator hands it to
    # the long poll that was under way, whose caller has gone.
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    left = demo_aws.sqs(bed.url).get_queue_attributes(QueueUrl=bed.queue, AttributeNames=names)["Attributes"]
    assert sorted(left[name] for name in names) == ["0", "1"]
    assert len(bed.api.calls) == 1


def test_a_restart_knows_what_was_applied(bed):
    ops, worker = bed.worker()
    with worker as process:
        bed.send("paid")
        bed.send("refunded", "REFUNDED", 3)
        demo_aws.until("both are applied", lambda: len(bed.api.calls) == 2 and bed.is_empty())
        # No drain: what is remembered must be on the disk by itself.
        process.kill()
    ops, worker = bed.worker()
    with worker as process:
        assert metric(ops, "worker_remembered_events") == 2
        bed.send("paid")
        bed.send("refunded", "COMPLETED", 2)
        bed.send("new", "FAILED")
        demo_aws.until("the queue is empty", lambda: len(bed.api.calls) == 3 and bed.is_empty())
        assert (results(ops, "duplicate"), results(ops, "stale"), results(ops, "cancelled")) == (1, 1, 1)
        assert demo_aws.drained(process) == 0
    assert bed.api.status == {"paid": "CONFIRMED", "refunded": "CANCELLED", "new": "CANCELLED"}


def test_without_an_api_it_logs_whom_it_would_tell(bed):
    ops, worker = bed.worker(RESERVATION_API_URL="", WORKER_STATE="memory:")
    with worker as process:
        bed.send("res-logged")
        demo_aws.until("the queue is empty", lambda: results(ops, "confirmed") == 1 and bed.is_empty())
        assert demo_aws.drained(process) == 0
    (line,) = [line for line in bed.log().splitlines() if "res-logged" in line]
    assert "RESERVATION_API_URL is not set" in line and "Confirm" in line
    assert bed.api.calls == []


def test_the_heartbeat_keeps_a_message_hidden_while_it_is_worked_on(bed):
    bed.api.answer.clear()
    ops, worker = bed.worker(WORKER_VISIBILITY="2s", RESERVATION_API_TIMEOUT_MS="30000")
    with worker as process:
        bed.send("slow")
        demo_aws.until("the call is under way", lambda: bed.api.calls)
        # What is waited for is that nothing happens, for more than the visibility.
        time.sleep(5)
        assert metric(ops, "worker_in_flight") == 1 and len(bed.api.calls) == 1
        bed.api.answer.set()
        demo_aws.until("the queue is empty", bed.is_empty)
        demo_aws.until("nothing is in hand", lambda: metric(ops, "worker_in_flight") == 0)
        assert demo_aws.drained(process) == 0
    assert len(bed.api.calls) == 1


def test_health_is_its_own_and_bad_settings_are_told_at_once(bed):
    ops, worker = bed.worker()
    with worker:
        with urllib.request.urlopen(f"{ops}/health", timeout=5) as reply:
            health = json.load(reply)
        assert (health["service"], health["status"], health["store"]) == ("reservation-worker", "ok", "ok")
        port = ops.rsplit(":", 1)[1]
        command = [binaries() / "reservation-worker", "healthcheck", f"--worker-port={port}"]
        assert subprocess.run(command, cwd=bed.folder, env={}, check=False).returncode == 0
    run = subprocess.run(
        [binaries() / "reservation-worker", "--worker-port=x"], cwd=bed.folder, env={"WORKER_STATE": "x"},
        capture_output=True, text=True, check=False,
    )
    assert run.returncode == 78
    for name in ["PAYMENT_WEBHOOK_QUEUE_URL (default): not set", "WORKER_PORT (flag)", "WORKER_STATE (environment)"]:
        assert name in run.stderr, run.stderr
