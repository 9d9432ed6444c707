"""The real binary as a process of its own, and a receiver for its webhooks.

PAYMENT_SIM_BIN names the binary; `make test` builds it and says where it is."""

import contextlib
import http.server
import os
import pathlib
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest

READY_S = 30


def binary():
    path = os.environ.get("PAYMENT_SIM_BIN")
    if path:
        return str(pathlib.Path(path).resolve())
    if os.environ.get("CI") == "true":
        pytest.fail("PAYMENT_SIM_BIN is not set, and CI skips nothing")
    pytest.skip("PAYMENT_SIM_BIN is not set (run `make test`)")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Service:
    def __init__(self, process, grpc_port, ops_port):
        self.process = process
        self.address = f"127.0.0.1:{grpc_port}"
        self.ops = f"http://127.0.0.1:{ops_port}"

    def is_ready(self):
        try:
            with urllib.request.urlopen(f"{self.ops}/readyz", timeout=2) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False


@contextlib.contextmanager
def running(folder, **settings):
    """The service on free ports, ready; gone afterwards."""
    grpc_port, ops_port = free_port(), free_port()
    env = {
        "GRPC_PORT": str(grpc_port), "OPS_PORT": str(ops_port), "STORE_URL": f"file:{folder}/data",
        "EVENT_SINK": "none", "LOG_LEVEL": "warn", "DEFAULT_DELAY_MS": "50", "HOME": str(folder),
    } | settings
    log = open(folder / "service.log", "ab")
    process = subprocess.Popen([binary()], env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        service = Service(process, grpc_port, ops_port)
        deadline = time.monotonic() + READY_S
        while not service.is_ready():
            told = (folder / "service.log").read_text()
            assert process.poll() is None and time.monotonic() < deadline, f"not ready: {told}"
            time.sleep(0.02)
        yield service
    finally:
        process.kill()
        process.wait(10)
        log.close()


def drained(service):
    """SIGTERM, and the code that it ends with."""
    service.process.send_signal(signal.SIGTERM)
    return service.process.wait(30)


class Receiver:
    """Keeps every request: path, headers, body. Answers with the next of `answers`, then with 204."""

    def __init__(self):
        self.requests, self.answers, self.changed = [], [], threading.Condition()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                with outer.changed:
                    outer.requests.append((self.path, dict(self.headers.items()), body))
                    status = outer.answers.pop(0) if outer.answers else 204
                    outer.changed.notify_all()
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def wait(self, count, seconds=30):
        with self.changed:
            came = self.changed.wait_for(lambda: len(self.requests) >= count, seconds)
            assert came, f"{len(self.requests)} of {count} webhooks came"
            return list(self.requests)
