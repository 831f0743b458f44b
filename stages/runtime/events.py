"""Tell people what becomes of a run: events, each sent once to each receiver of `execution.notify`.

1. The store decides who sends: whoever creates {store}/{run}/events/KEY.json first. So a flow that is fired twice, a
   stage that is resumed and rings an alarm again, and a flow that tells of a failure that its stage has told send once.
2. The key comes first and the message second: a receiver that is away loses the event, and gets none twice.
3. A receiver that hangs, refuses or fails is one line and stops nothing. Nobody waits longer than LIMIT.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread

from dmdr.config.notify import EventName, Notify
from dmdr.config.run import Config
from dmdr.errors import MEANINGS, BudgetSpent, ConfigError
from stages.runtime.background import describe
from stages.store.address import open_place
from stages.store.artifacts import Artifact
from stages.store.layout import CHECKPOINTS, EVENTS
from stages.store.records import Decision, Record

LIMIT = 10.0  # seconds for all receivers of an event together
TIMEOUT = 8.0  # seconds of a receiver
FLOW = "DMDR_FLOW"  # set where a flow runs the stage: it tries again, and tells of the failure that is left
Say = Callable[[str], None]


@dataclass(frozen=True)
class Event:
    """Something that became of a run. key: the same for the same event, whoever tells of it."""

    kind: EventName
    run: str
    stage: str
    store: str
    text: str
    key: str

    def to_json(self) -> bytes:
        """What receivers get. Chats show `text`."""
        return json.dumps(
            {
                "event": self.kind,
                "run": self.run,
                "stage": self.stage,
                "store": self.store,
                "text": self.text,
                "at": round(time.time(), 3),
            }
        ).encode()


def build_alarm(artifact: Artifact, update: int, line: str) -> Event:
    """An alarm that rang after `update` updates."""
    digest = hashlib.sha256(line.encode()).hexdigest()[:8]
    text = f"{artifact.run}, {artifact.stage}: {line}"
    return Event(
        "alarm", artifact.run, artifact.stage, artifact.store, text, f"alarm-{artifact.stage}-{update}-{digest}"
    )


def build_sealed(artifact: Artifact, fingerprint: str, seconds: float) -> Event:
    """A stage that was sealed by this process."""
    text = f"{artifact.run}: {artifact.stage} is sealed at {artifact.address} after {seconds:.0f} s"
    key = f"sealed-{artifact.stage}-{fingerprint[:12]}"
    return Event("sealed", artifact.run, artifact.stage, artifact.store, text, key)


def build_finished(artifact: Artifact, record: Record) -> Event:
    """A run whose last stage was sealed, with its first verdict."""
    verdicts = record.facts.get("verdicts")
    first = str(verdicts[0]) if isinstance(verdicts, list) and verdicts else ""
    text = f"{artifact.run} is finished. {first}".strip()
    key = f"finished-{record.fingerprint[:12]}"
    return Event("finished", artifact.run, artifact.stage, artifact.store, text, key)


def build_end(artifact: Artifact, code: int, line: str, *, is_budget: bool = False) -> Event:
    """A stage that ended without its seal. The key has its newest checkpoint: when it got further, that is news."""
    kind: EventName = "budget" if is_budget else "failed"
    key = f"ended-{artifact.stage}-{code}-{_find_step(artifact)}"
    text = f"{artifact.run}, {artifact.stage}: {line}"
    return Event(kind, artifact.run, artifact.stage, artifact.store, text, key)


def build_waiting(artifact: Artifact, reason: str, line: str) -> Event:
    """A Job that does not run. reason: what it waits for, the same however the cluster words it."""
    digest = hashlib.sha256(reason.encode()).hexdigest()[:8]
    text = f"{artifact.run}, {artifact.stage}: {line}"
    key = f"waiting-{artifact.stage}-{digest}-{_find_step(artifact)}"
    return Event("waiting", artifact.run, artifact.stage, artifact.store, text, key)


def build_promotion(store: str, decision: Decision) -> Event:
    """A decision about a promotion. Who judges the same two results again tells nothing new."""
    kind: EventName = "promoted" if decision.is_promoted else "kept"
    digest = hashlib.sha256(f"{decision.fingerprint} {decision.over}".encode()).hexdigest()[:12]
    return Event(kind, decision.run, "export", store, decision.text, f"{kind}-{decision.name}-{digest}")


def _find_step(artifact: Artifact) -> str:
    names = [name.split("/")[1] for name in artifact.place.names() if name.startswith(f"{CHECKPOINTS}/step-")]
    return max(names, default="step-0").removeprefix("step-").lstrip("0") or "0"


def announce(config: Config, build: Callable[[], Event], say: Say) -> None:
    """Send an event to those who want it, unless somebody has. say: takes a line for what goes wrong.

    build: makes the event; it is called only if somebody is to hear of something.
    """
    if not config.execution.notify:
        return
    try:
        event = build()
        receivers = [each for each in config.execution.notify if event.kind in each.events]
        if not receivers or not _take(event):
            return
    except Exception as error:  # the store is away, for example
        say(f"nobody is told of an event: {describe(error)}")
        return
    _send_all(event, receivers, say)


def announce_failure(config: Config, artifact: Artifact, code: int, error: BaseException | str, say: Say) -> None:
    """Tell that a stage ended with an exit code, and why."""
    is_budget = isinstance(error, BudgetSpent) or "execution.budget" in str(error)
    meaning = MEANINGS.get(code, "ended by a signal")
    line = f"ended with exit code {code} ({meaning}): {error if isinstance(error, str) else describe(error)}"
    announce(config, lambda: build_end(artifact, code, line, is_budget=is_budget), say)


def _take(event: Event) -> bool:
    """Whether this process is to send it: nobody has taken it before."""
    mark = json.dumps({"event": event.kind, "token": uuid.uuid4().hex}).encode()
    place = open_place(f"{event.store.rstrip('/')}/{event.run}/{EVENTS}")
    return place.create(f"{event.key}.json", mark) == mark


def _send_all(event: Event, receivers: list[Notify], say: Say) -> None:
    data = event.to_json()
    threads = [Thread(target=_try, args=(each, data, say), daemon=True) for each in receivers]
    for thread in threads:
        thread.start()
    until = time.monotonic() + LIMIT
    for thread, each in zip(threads, receivers, strict=True):
        thread.join(max(0.0, until - time.monotonic()))
        if thread.is_alive():
            say(f"{_name(each)} did not take the event {event.kind} within {LIMIT:.0f} s; the run goes on")


def _try(receiver: Notify, data: bytes, say: Say) -> None:
    try:
        _send(receiver, data)
    except Exception as error:
        say(f"{_name(receiver)} did not take an event ({describe(error)}); the run goes on")


def _send(receiver: Notify, data: bytes) -> None:
    if receiver.command is not None:
        done = subprocess.run(receiver.command, input=data, capture_output=True, timeout=TIMEOUT, check=False)
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise OSError(f"exit code {done.returncode}{': ' + last[0] if last else ''}")
        return
    request = urllib.request.Request(_find_address(receiver), data, {"Content-Type": "application/json"}, method="POST")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        answer.read(1024)


def _find_address(receiver: Notify) -> str:
    """The webhook's address.

    Raises:
        ConfigError: the environment does not have it.
    """
    webhook = receiver.webhook or ""
    if not webhook.startswith("env:"):
        return webhook
    address = os.environ.get(webhook.removeprefix("env:"), "")
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"the environment variable {webhook.removeprefix('env:')} holds no address here")
    return address


def _name(receiver: Notify) -> str:
    """Which receiver it is; an address may end in a secret."""
    if receiver.command is not None:
        return f"the command {receiver.command[0]}"
    webhook = receiver.webhook or ""
    return f"the webhook {'/'.join(webhook.split('/')[:3])}"
