"""Image, compose file, make targets and scripts, as far as they can be judged without a container engine."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import boto3
import pytest
import yaml

from repository import ROOT, settings

DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
# What every AWS SDK reads by itself; no setting of ours.
AWS_SDK = {
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED", "AWS_ENDPOINT_URL", "AWS_PROFILE",
    "AWS_REGION",
}


def instruction(name):
    """An instruction's arguments in the final stage."""
    return re.findall(rf"^{name} +(.*)$", DOCKERFILE.rsplit("\nFROM ", 1)[1], re.MULTILINE)


def test_the_image_exposes_the_default_ports():
    assert instruction("EXPOSE") == [f"{settings()['GRPC_PORT']} {settings()['OPS_PORT']}"]


def test_the_image_sets_only_settings_that_exist():
    (line,) = instruction("ENV")
    env = dict(pair.split("=", 1) for pair in line.split())
    assert env.keys() <= settings().keys()
    assert env == {"STORE_URL": "file:/data", "WORKER_STATE": "file:/worker-data/state", "BIND_ADDRESS": "0.0.0.0"}


def test_the_image_runs_as_nobody_in_particular():
    assert instruction("USER") == ["65532:65532"]
    assert instruction("VOLUME") == ["/data"]
    assert json.loads(instruction("ENTRYPOINT")[0]) == ["/usr/local/bin/payment-sim"]
    assert "healthcheck" in instruction("HEALTHCHECK")[0]


def test_the_image_carries_both_binaries():
    build = DOCKERFILE.rsplit("\nFROM ", 1)[0]
    assert "cargo build --locked --release --bins" in build
    assert {"payment-sim", "reservation-worker"} == set(re.findall(r"target/release/(\S+)", build))


def test_the_image_is_built_from_all_that_the_build_reads(tmp_path):
    sent = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    for name in sent:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name)
        elif source.exists():
            shutil.copy(source, tmp_path / name)
    # Before cargo looks for the binary it refuses a manifest that names a target without a file.
    command = ["cargo", "check", "--offline", "--locked", "--bin", "no-such-binary"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "no bin target named `no-such-binary`" in run.stderr, run.stderr
    for file in [*tmp_path.glob("build.rs"), *tmp_path.glob("src/**/*.rs")]:
        for included in re.findall(r'include_(?:str|bytes)!\(\s*"([^"]+)"', file.read_text()):
            assert (file.parent / included).exists(), f"{file.relative_to(tmp_path)} includes {included}"


def test_compose_sets_only_settings_that_exist():
    known = settings().keys() | AWS_SDK
    for service in COMPOSE["services"].values():
        environment = service.get("environment", {})
        assert environment.keys() <= known, environment.keys() - known


def test_compose_is_hardened_and_ordered():
    for name, service in COMPOSE["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        for needed in service.get("depends_on", {}):
            assert needed in COMPOSE["services"], needed
    ours = COMPOSE["services"]["payment-sim-api"]
    published = {port.rsplit(":", 1)[1] for port in ours["ports"]}
    assert published == {settings()["GRPC_PORT"], settings()["OPS_PORT"]}


def test_compose_runs_the_emulator_that_the_tests_run():
    pinned = re.search(r"^moto\[.*\]==(\S+)", (ROOT / "tests/py/requirements.txt").read_text(), re.MULTILINE)[1]
    images = {s["image"] for s in COMPOSE["services"].values()} - {"payment-sim-api:latest"}
    assert images == {f"motoserver/moto:{pinned}"}


TARGETS = """help run build test lint ci bench docker-build docker-run perf-test grpcui status dev-deps clean
crash-test bench-store bench-footprint bench-webhooks bench-requests bench-creates bench-creates-memory bench-gets
bench-open-loop bench-smoke bench-test bench-delivery bench-courier bench-whole bench-lateness k8s demo-aws""".split()


def make(*arguments):
    # Without the outer make's flags: this one stands alone.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    run = subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_make_help_lists_every_target():
    assert sorted(line.split()[0] for line in make("help").splitlines()) == sorted(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_expands(target):
    make("-n", target)


def test_perf_test_is_the_first_systems_commands_to_the_letter():
    flat = re.sub(r" \\\n *", " ", make("-n", "perf-test"))
    call = "ghz --insecure --proto proto/payment/v1/payment.proto --call payment.v1.PaymentService.CreatePaymentIntent"
    assert (
        f"""{call} -d '{{"reservation_id":"perf-test","user_id":"user-test","amount":{{"amount":100000,"""
        """"currency":"KRW"},"scenario":"approve"}' -c 10 -n 1000 localhost:8030"""
    ) in flat
    assert (
        f"""{call} -d '{{"reservation_id":"load-test","user_id":"user-load","amount":{{"amount":50000,"""
        """"currency":"KRW"},"scenario":"random"}' -c 50 -z 30s localhost:8030"""
    ) in flat
    for page in ("health", "metrics"):
        assert f"http://localhost:8031/{page};" in flat


@pytest.fixture
def moto():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [f"{sys.prefix}/bin/moto_server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 30
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/moto-api/", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None and time.monotonic() < deadline, "moto_server did not start"
                time.sleep(0.05)
        yield url
    finally:
        server.terminate()
        server.wait(10)


def test_the_set_up_emulator_routes_our_events_and_no_others(moto):
    env = COMPOSE["x-aws"] | {"AWS_ENDPOINT_URL": moto}

    def aws_setup(command):
        run = subprocess.run(
            [sys.executable, ROOT / "scripts/aws_setup.py", command],
            env=os.environ | env, capture_output=True, text=True, check=False,
        )
        assert run.returncode == 0, run.stderr
        return run.stdout

    aws_setup("setup")
    aws_setup("setup")
    events = boto3.client(
        "events", region_name=env["AWS_REGION"], endpoint_url=moto, aws_access_key_id="test", aws_secret_access_key="test"
    )
    for detail_type in ["Payment Status Updated", "Payment Refund Updated"]:
        entry = {
            "Source": env["PAYMENT_EVENT_SOURCE"], "DetailType": detail_type, "EventBusName": env["EVENT_BUS_NAME"],
            "Detail": json.dumps({"payment_id": "pay_1"}),
        }
        assert events.put_events(Entries=[entry])["FailedEntryCount"] == 0
    # Looking takes nothing away.
    for _ in range(2):
        (line,) = aws_setup("receive").splitlines()
        assert json.loads(line)["detail-type"] == "Payment Status Updated"
        assert json.loads(line)["detail"] == {"payment_id": "pay_1"}
