"""A secret is rotated: first the old one, then both, then the new one. The verifiers of Standard Webhooks
for Python and for Node.js accept what is signed with a secret in force, whichever of them the receiver
holds, and nothing else."""

import base64
import json
import os
import pathlib
import subprocess

import pytest
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from repository import ROOT
from test_clients import deliveries, verifier_key

OLD = "the plain secret that goes"
NEW = "whsec_" + base64.b64encode(b"the secret that comes, 32 bytes.").decode()
STRANGE = "a secret of somebody else"


def python_accepts(questions, _):
    def accepts(question):
        try:
            Webhook(question["secret"]).verify(base64.b64decode(question["body"]), question["headers"])
        except WebhookVerificationError:
            return False
        return True

    return [accepts(question) for question in questions]


def node_accepts(questions, folder):
    tools = os.environ.get("PAYMENT_SIM_TOOLS", "")
    package = pathlib.Path(tools, "node_modules", "standardwebhooks")
    if not tools or not package.exists():
        if os.environ.get("CI") == "true":
            pytest.fail("PAYMENT_SIM_TOOLS has no node_modules/standardwebhooks, and CI skips nothing")
        pytest.skip("PAYMENT_SIM_TOOLS has no node_modules/standardwebhooks (run `make dev-deps`)")
    asked = folder / "questions.json"
    asked.write_text(json.dumps(questions))
    command = ["node", ROOT / "tests" / "js" / "verify.js", package, asked]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def changed(body):
    """The body with one bit turned, at its start, in its middle, at its end; longer, and shorter."""
    for at in (0, len(body) // 2, len(body) - 1):
        yield body[:at] + bytes([body[at] ^ 1]) + body[at + 1:]
    yield body + b" "
    yield body[:-1]


def questions(came, in_force):
    """What to ask a verifier, and what it is to say."""
    for _, headers, body in came:
        headers = {name.lower(): value for name, value in headers.items()}

        def question(secret, body=body, headers=headers, **more):
            body = base64.b64encode(body).decode()
            return {"secret": verifier_key(secret), "headers": headers | more, "body": body}

        for secret in (OLD, NEW, STRANGE):
            yield question(secret), secret in in_force
            for other in changed(body):
                yield question(secret, other), False
            yield question(secret, **{"webhook-id": "evt_another"}), False
            stamp = int(headers["webhook-timestamp"]) - 1
            yield question(secret, **{"webhook-timestamp": str(stamp)}), False


@pytest.mark.parametrize("accepts", [python_accepts, node_accepts], ids=["python", "node"])
def test_during_a_rotation_either_secret_verifies_and_nothing_else(tmp_path, accepts):
    for in_force in ([OLD], [NEW, OLD], [NEW]):
        came = deliveries(tmp_path, ", ".join(in_force))
        asked, expected = zip(*questions(came, in_force), strict=True)
        said = accepts(asked, tmp_path)
        wrong = [question for question, right, said in zip(asked, expected, said, strict=True) if right != said]
        assert not wrong, (in_force, wrong)
