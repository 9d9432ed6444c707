#!/usr/bin/env python3
"""Prints the webhooks that arrive, and whether their signatures are right. Needs Python alone.

    python3 scripts/receive_webhooks.py [port, 9000 by default]

The secret is WEBHOOK_SECRET, else the development default. A receiver of your own would rather use an
off-the-shelf Standard Webhooks library; docs/webhooks.md shows how.
"""

import base64
import hashlib
import hmac
import http.server
import os
import sys

SECRET = os.environ.get("WEBHOOK_SECRET") or "payment-sim-dev-secret"


def standard_key():
    if SECRET.startswith("whsec_"):
        return base64.b64decode(SECRET.removeprefix("whsec_"))
    return SECRET.encode()


def is_signed(headers, body):
    legacy = hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
    content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    standard = base64.b64encode(hmac.digest(standard_key(), content, "sha256")).decode()
    signatures = (headers["webhook-signature"] or "").split()
    return hmac.compare_digest(headers["x-webhook-signature"] or "", f"sha256={legacy}") and any(
        hmac.compare_digest(signature, f"v1,{standard}") for signature in signatures
    )


class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        signed = is_signed(self.headers, body)
        print("signed " if signed else "BAD SIGNATURE ", body.decode(), sep="", flush=True)
        self.send_response(204 if signed else 401)
        self.end_headers()

    def log_message(self, *_):
        pass


port = int(sys.argv[1]) if len(sys.argv) > 1 else 9000
with http.server.ThreadingHTTPServer(("127.0.0.1", port), Receiver) as server:
    print(f"waiting for webhooks on http://127.0.0.1:{server.server_port}/", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
