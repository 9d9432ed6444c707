"""What several tests need: the repository's root, the settings that exist, rendered manifests."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]


def settings():
    """The settings that exist and their defaults, from .env.template: `NAME=value`, or `# NAME=value`
    where the default applies without being set."""
    lines = (ROOT / ".env.template").read_text().splitlines()
    found = (re.fullmatch(r"(?:# ?)?([A-Z][A-Z0-9_]+)=(\S*).*", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def kustomize(folder):
    """A folder rendered, as text. `make test` sets kustomize up wherever Go is; kubectl carries one too."""
    tools = os.environ.get("PAYMENT_SIM_TOOLS")
    if tools:
        command = [f"{tools}/bin/kustomize", "build"]
    elif shutil.which("kubectl"):
        command = ["kubectl", "kustomize"]
    elif os.environ.get("CI") == "true":
        pytest.fail("neither kustomize nor kubectl is there")
    else:
        pytest.skip("neither kustomize nor kubectl is there (kustomize is set up where Go is)")
    run = subprocess.run([*command, str(ROOT / "k8s" / folder)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def objects(text):
    """Manifests by (kind, name); a name generated with a hash of its content goes without the hash."""
    return {
        (o["kind"], re.sub(r"-[a-z0-9]{10}$", "", o["metadata"]["name"])): o
        for o in yaml.safe_load_all(text)
    }
