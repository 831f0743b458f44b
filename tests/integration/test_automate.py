"""`dmdr automate` on a real Prefect server: a block gets each event of a run once, twice fired flows included."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.support.prefect_server import ROOT, asked

EMIT = """
import sys
from flows.prefect_support.news import emit
from stages.runtime.events import build_alarm, build_sealed
from stages.store.artifacts import Artifact

joint = Artifact(sys.argv[1], "my-run", "joint")
for _ in range(2):
    emit(build_alarm(joint, 40, "ALARM at update 40: it is bad"))
    emit(build_sealed(joint, "ab" * 32, 3.0))
"""


@pytest.fixture
def webhook() -> Iterator[ThreadingHTTPServer]:
    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.server.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.got, server.daemon_threads = [], True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_block_gets_each_event_once(prefect_server, webhook, tmp_path):
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command], env=prefect_server, cwd=ROOT, capture_output=True, text=True, timeout=120
        )

    missing = run("-m", "flows.cli", "automate", "custom-webhook/nobody")
    assert missing.returncode == 66 and "Prefect has no block custom-webhook/nobody" in missing.stderr
    kind = asked(prefect_server, "/block_types/slug/custom-webhook")
    schemas = asked(
        prefect_server, "/block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [kind["id"]]}}}
    )
    block = {
        "name": "here",
        "block_type_id": kind["id"],
        "block_schema_id": schemas[0]["id"],
        "data": {
            "name": "here",
            "url": f"http://127.0.0.1:{webhook.server_port}/",
            "json_data": {"text": "{{body}}", "subject": "{{subject}}"},
            "allow_private_urls": True,
        },
    }
    asked(prefect_server, "/block_documents/", block)
    for _ in range(2):
        done = run("-m", "flows.cli", "automate", "custom-webhook/here", "--event", "alarm")
        assert done.returncode == 0, done.stderr
    assert done.stdout == "changed the automation dmdr to custom-webhook/here: alarm\n"
    for _ in range(2):  # two flows that tell of the same
        emitted = run("-c", EMIT, str(tmp_path))
        assert emitted.returncode == 0, emitted.stderr
    deadline = time.monotonic() + 60
    while not webhook.got and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(3)
    assert webhook.got == [{"text": "my-run, joint: ALARM at update 40: it is bad", "subject": "DMDR: my-run"}]
