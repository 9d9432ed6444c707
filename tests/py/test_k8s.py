"""The manifests: valid, rendered anew, hardened, and true to the settings that exist."""

import re
import subprocess
import sys

import pytest
import yaml

from repository import ROOT, kustomize, objects, settings

RENDERED = ROOT / "k8s" / "payment-sim-api.yaml"
FOLDERS = ["base", "overlays/production", "overlays/monitoring"]
APP = "payment-sim-api"


def base():
    return objects(RENDERED.read_text())


def container(manifests):
    (only,) = manifests["StatefulSet", APP]["spec"]["template"]["spec"]["containers"]
    return only


def test_the_committed_manifest_is_the_base_rendered():
    assert RENDERED.read_text() == kustomize("base"), "run `make k8s` and commit what it wrote"


# The newest schemas that the validator carries, and the oldest release that clusters still run.
@pytest.mark.parametrize("version", ["1.30", "1.37"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_manifests_are_valid(folder, version, tmp_path):
    file = tmp_path / "rendered.yaml"
    file.write_text(kustomize(folder))
    command = [f"{sys.prefix}/bin/kubernetes-validate", "--strict", "-k", version, str(file)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    without_schema = [line for line in (run.stdout + run.stderr).splitlines() if line.startswith("WARN")]
    assert all("ServiceMonitor" in line for line in without_schema), without_schema


def test_the_validator_would_notice(tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text(RENDERED.read_text().replace("replicas: 1", 'replicas: "1"'))
    command = [f"{sys.prefix}/bin/kubernetes-validate", "--strict", str(file)]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_it_applies_on_a_bare_cluster():
    manifests = base()
    assert {kind for kind, _ in manifests} == {
        "ConfigMap", "NetworkPolicy", "PodDisruptionBudget", "Service", "ServiceAccount", "StatefulSet",
    }
    secrets = [e["valueFrom"]["secretKeyRef"] for e in container(manifests)["env"]]
    assert all(secret["optional"] for secret in secrets)
    assert manifests["ConfigMap", APP]["data"]["ENVIRONMENT"] == "development"


def test_production_needs_its_secret_and_sends_real_events():
    manifests = objects(kustomize("overlays/production"))
    (secret,) = [e["valueFrom"]["secretKeyRef"] for e in container(manifests)["env"]]
    assert not secret["optional"]
    data = manifests["ConfigMap", APP]["data"]
    assert (data["ENVIRONMENT"], data["EVENT_SINK"]) == ("production", "eventbridge")
    # Private receivers: one name, and no network, loopback included.
    assert (data["WEBHOOK_ALLOW_CIDRS"], data["WEBHOOK_ALLOW_HOSTS"]) == ("none", "reservation-api")
    labels = manifests["Namespace", "payment-sim"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("folder", FOLDERS)
def test_only_settings_that_exist_are_set(folder):
    manifests = objects(kustomize(folder))
    names = set(manifests["ConfigMap", APP]["data"]) | {e["name"] for e in container(manifests)["env"]}
    assert names <= set(settings()), names - set(settings())


def test_ports_are_the_settings_defaults():
    grpc, ops = int(settings()["GRPC_PORT"]), int(settings()["OPS_PORT"])
    manifests = base()
    assert {p["name"]: p["containerPort"] for p in container(manifests)["ports"]} == {"grpc": grpc, "ops": ops}
    assert {p["name"]: p["port"] for p in manifests["Service", APP]["spec"]["ports"]} == {"grpc": grpc, "ops": ops}
    headless = manifests["Service", f"{APP}-headless"]["spec"]
    assert headless["clusterIP"] == "None"
    assert {p["name"]: p["port"] for p in headless["ports"]} == {"grpc": grpc}
    assert manifests["StatefulSet", APP]["spec"]["serviceName"] == f"{APP}-headless"


def test_the_image_is_this_version():
    version = re.search(r'^version = "(.*)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)[1]
    assert container(base())["image"] == f"{APP}:{version}"


def test_every_selector_finds_the_pods():
    manifests = base()
    labels = manifests["StatefulSet", APP]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        manifests["StatefulSet", APP]["spec"]["selector"]["matchLabels"],
        manifests["Service", APP]["spec"]["selector"],
        manifests["Service", f"{APP}-headless"]["spec"]["selector"],
        manifests["PodDisruptionBudget", APP]["spec"]["selector"]["matchLabels"],
        manifests["NetworkPolicy", APP]["spec"]["podSelector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector and selector.items() <= labels.items()


def test_the_service_monitor_finds_each_pod_once():
    manifests = objects(kustomize("overlays/monitoring"))
    spec = manifests["ServiceMonitor", APP]["spec"]
    wanted = spec["selector"]["matchLabels"].items()
    found = [o for (kind, _), o in manifests.items() if kind == "Service" and wanted <= o["metadata"]["labels"].items()]
    assert [service["metadata"]["name"] for service in found] == [APP]
    assert {e["port"] for e in spec["endpoints"]} <= {p["name"] for p in found[0]["spec"]["ports"]}


def test_the_pod_is_restricted():
    manifests = base()
    pod = manifests["StatefulSet", APP]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 65532
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert manifests["ServiceAccount", APP]["automountServiceAccountToken"] is False
    inside = container(manifests)
    assert inside["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "memory" in inside["resources"]["limits"] and "cpu" not in inside["resources"]["limits"]
    # Where the store is, is where the volume is.
    store = manifests["ConfigMap", APP]["data"]["STORE_URL"]
    assert store == "file:" + inside["volumeMounts"][0]["mountPath"]


def test_the_fence():
    policy = base()["NetworkPolicy", APP]["spec"]
    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
    grpc, ops = policy["ingress"]
    assert grpc["ports"] == [{"port": "grpc"}]
    assert grpc["from"] == [
        {"namespaceSelector": {}, "podSelector": {"matchLabels": {"payment-sim/client": "true"}}}
    ]
    assert ops["ports"] == [{"port": "ops"}]
    dns = policy["egress"][0]["to"][0]["podSelector"]["matchLabels"]
    assert dns == {"k8s-app": "kube-dns"}
    for rule in policy["egress"]:
        for to in rule.get("to", []):
            block = to.get("ipBlock")
            if block and block["cidr"] == "0.0.0.0/0":
                assert "169.254.0.0/16" in block["except"], "instance metadata is in reach"
    # A rule without `to` or `from` would be open to all.
    assert all(rule.get("to") for rule in policy["egress"])
    assert all(rule.get("from") for rule in policy["ingress"])


def test_a_rollout_and_a_drain_are_possible():
    manifests = base()
    assert manifests["PodDisruptionBudget", APP]["spec"]["maxUnavailable"] == 1
    pod = manifests["StatefulSet", APP]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 45
    probes = {name: container(manifests)[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {name: p["httpGet"]["path"] for name, p in probes.items()} == {
        "startupProbe": "/livez", "readinessProbe": "/readyz", "livenessProbe": "/livez",
    }
    assert {p["httpGet"]["port"] for p in probes.values()} == {"ops"}


def test_every_manifest_is_in_the_kustomization():
    for folder in ["base", "overlays/production", "components/servicemonitor"]:
        here = ROOT / "k8s" / folder
        listed = yaml.safe_load((here / "kustomization.yaml").read_text())
        names = set(listed["resources"]) | {p["path"] for p in listed.get("patches", [])}
        files = {f.name for f in here.glob("*.yaml")} - {"kustomization.yaml"}
        assert files <= names, files - names
