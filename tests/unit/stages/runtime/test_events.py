"""Events reach each receiver once, whoever tells of them; a receiver in trouble is one line."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dmdr.config.load import load_config
from dmdr.config.notify import Notify
from dmdr.config.run import Config
from dmdr.errors import BudgetSpent, NonFinite
from flows import chain
from flows.launch.failure import StageFailed
from stages.runtime import events
from stages.runtime.events import announce, announce_failure, build_alarm, build_sealed
from stages.store.artifacts import Artifact
from stages.store.removal import plan_removal, remove


class Receiver(BaseHTTPRequestHandler):
    """Keeps what it gets; answers 500 at /broken, and nothing at /silent."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append(json.loads(body))
        if self.path == "/silent":
            self.server.gate.wait(20)
        self.send_response(500 if self.path == "/broken" else 204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.got, server.gate, server.daemon_threads = [], threading.Event(), True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.gate.set()
    server.shutdown()
    server.server_close()


def at(server: ThreadingHTTPServer, path: str = "") -> str:
    return f"http://127.0.0.1:{server.server_port}/{path}"


def with_receivers(config: Config, *receivers: dict) -> Config:
    notify = tuple(Notify.model_validate(each) for each in receivers)
    return config.model_copy(update={"execution": config.execution.model_copy(update={"notify": notify})})


@pytest.fixture
def config(tiny_config) -> Config:
    return load_config(tiny_config())


def test_each_event_is_sent_once_however_many_tell_of_it(config, tmp_path, server):
    lines: list[str] = []
    config = with_receivers(config, {"webhook": at(server)}, {"webhook": at(server), "events": ["failed"]})
    artifact = Artifact(str(tmp_path / "store"), "tiny", "joint")

    def tell() -> None:
        announce(config, lambda: build_alarm(artifact, 40, "ALARM at update 40: it is bad"), lines.append)
        announce(config, lambda: build_sealed(artifact, "ab" * 32, 3.0), lines.append)
        announce_failure(config, artifact, 70, NonFinite("loss_dm is nan at update 41"), lines.append)

    tellers = [threading.Thread(target=tell) for _ in range(4)]  # two flows, and the stages that they fired
    for teller in tellers:
        teller.start()
    for teller in tellers:
        teller.join()
    assert lines == []
    assert sorted(each["event"] for each in server.got) == ["alarm", "failed", "failed", "sealed"]
    assert {each["run"] for each in server.got} == {"tiny"}
    (text,) = {each["text"] for each in server.got if each["event"] == "failed"}
    assert text == "tiny, joint: ended with exit code 70 (internal or not a number): loss_dm is nan at update 41"


@pytest.mark.parametrize(
    ("receiver", "said"),
    [
        ({"webhook": "{at}broken"}, "the webhook {at_host} did not take an event (HTTP Error 500"),
        ({"webhook": "{at}silent"}, "the webhook {at_host} did not take "),
        ({"webhook": "http://127.0.0.1:9/x"}, "the webhook http://127.0.0.1:9 did not take an event ("),
        ({"webhook": "env:NOT_SET"}, "the webhook env:NOT_SET did not take an event (the environment variable NOT_SET"),
        ({"command": ["/no/such/program"]}, "the command /no/such/program did not take an event ("),
    ],
)
def test_a_receiver_in_trouble_is_one_line(config, tmp_path, server, monkeypatch, receiver, said):
    monkeypatch.setattr(events, "LIMIT", 0.3)
    monkeypatch.delenv("NOT_SET", raising=False)
    lines, began = [], time.monotonic()
    host = at(server).rstrip("/")
    filled = {key: value.format(at=at(server)) if isinstance(value, str) else value for key, value in receiver.items()}
    artifact = Artifact(str(tmp_path), "tiny", "joint")
    announce(with_receivers(config, filled), lambda: build_sealed(artifact, "ab" * 32, 3.0), lines.append)
    assert len(lines) == 1 and lines[0].startswith(said.format(at_host=host)), lines
    assert time.monotonic() - began < 5


@pytest.mark.process
def test_a_command_gets_the_event_on_its_stdin(config, tmp_path):
    script = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read() + chr(10))"
    command = [sys.executable, "-c", script, str(tmp_path / "heard")]
    artifact, lines = Artifact(str(tmp_path), "tiny", "joint"), []
    error = BudgetSpent("the run has cost 51 EUR and execution.budget is 50")
    for _ in range(2):
        announce_failure(with_receivers(config, {"command": command}), artifact, 64, error, lines.append)
    (heard,) = (tmp_path / "heard").read_text().splitlines()
    assert json.loads(heard)["event"] == "budget" and lines == []


def test_a_flow_tells_of_the_failure_that_is_left(tiny_config, tmp_path, server):
    path = tiny_config(execution={"device": "cpu", "notify": [{"webhook": at(server)}]})

    def fail(name: str, *_: object, **__: object) -> None:
        if name == "cold_start":
            raise StageFailed(name, 74, "exit code 74", says_more=False)

    for _ in range(2):
        with pytest.raises(StageFailed):
            chain.distil(fail, str(path), "tiny", str(tmp_path / "store"))
    (event,) = server.got
    assert (event["event"], event["stage"]) == ("failed", "cold_start") and "exit code 74" in event["text"]


def test_what_was_told_goes_with_the_run(config, tmp_path, server):
    store, config = tmp_path / "store", with_receivers(config, {"webhook": at(server)})
    Artifact(str(store), "tiny", "prompts").claim({"seed": 1}, {"teacher": "0" * 64})
    event = build_sealed(Artifact(str(store), "tiny", "prompts"), "ab" * 32, 3.0)
    announce(config, lambda: event, print)
    assert list((store / "tiny/events").glob("*.json"))
    remove(plan_removal(str(store), "tiny", None))
    assert not (store / "tiny").exists() or not list((store / "tiny").rglob("*.json"))


@pytest.mark.parametrize(
    ("receiver", "why"),
    [
        ({}, "needs a webhook or a command"),
        ({"webhook": "https://a.example/x", "command": ["mail"]}, "and not both"),
        ({"webhook": "a.example/x"}, "a webhook is an address"),
        ({"webhook": "https://user:password@a.example/x"}, "credentials"),
        ({"webhook": "env:HOOK", "events": ["sealing"]}, "events"),
        ({"webhook": "env:HOOK", "events": []}, "events"),
    ],
)
def test_a_receiver_that_means_nothing_is_refused(receiver, why):
    with pytest.raises(ValueError, match=why):
        Notify.model_validate(receiver)


def test_the_store_of_a_folder_holds_no_half_of_a_mark(tmp_path, config):
    """A mark that another process is writing is not taken for nobody's."""
    artifact = Artifact(str(tmp_path), "tiny", "joint")
    event = build_sealed(artifact, "cd" * 32, 1.0)
    assert [events._take(event) for _ in range(3)] == [True, False, False]
    assert json.loads(Path(tmp_path, "tiny/events", f"{event.key}.json").read_text())["event"] == "sealed"
