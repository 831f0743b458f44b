"""Events of Prefect about runs, for its automations: dmdr.alarm, dmdr.sealed, dmdr.finished, dmdr.failed, dmdr.waiting,
dmdr.budget, dmdr.promoted and dmdr.kept.

They are about the resource dmdr.run.NAME, and their payload has run, stage, store and text. The id of an event follows
from what happened, so that a flow that is fired twice emits it once: the server drops an id that it knows.
"""

from __future__ import annotations

from contextlib import suppress
from uuid import NAMESPACE_URL, uuid5

from httpx import HTTPError
from prefect.client.orchestration import get_client
from prefect.events import Event as PrefectEvent
from prefect.events import Resource
from prefect.exceptions import PrefectException

from dmdr.errors import USER_ERRORS
from stages.runtime.events import Event, build_end, build_finished, build_sealed
from stages.store.artifacts import Artifact

PREFIX, RESOURCE = "dmdr", "dmdr.run"


def emit(event: Event) -> None:
    """Emit an event of a run. A server that does not take it is no reason to stop."""
    about = PrefectEvent(
        id=uuid5(NAMESPACE_URL, f"{event.store}/{event.run}/{event.key}"),
        event=f"{PREFIX}.{event.kind}",
        resource=Resource({"prefect.resource.id": f"{RESOURCE}.{event.run}", "prefect.resource.name": event.run}),
        payload={"run": event.run, "stage": event.stage, "store": event.store, "text": event.text},
    )
    with suppress(HTTPError, PrefectException):
        get_client(sync_client=True).request("POST", "/events", json=[about.model_dump(mode="json")])


def emit_sealed(artifact: Artifact, *, is_last: bool) -> None:
    """Tell that a stage is sealed, and if it is the last one of its run, that the run is finished."""
    with suppress(*USER_ERRORS):
        record = artifact.record()
        if record is None:
            return
        emit(build_sealed(artifact, record.fingerprint, record.provenance.duration_s))
        if is_last:
            emit(build_finished(artifact, record))


def emit_failure(artifact: Artifact, code: int, line: str) -> None:
    """Tell that a stage ended without its seal, and that no other try follows."""
    with suppress(*USER_ERRORS):
        emit(build_end(artifact, code, line, is_budget="execution.budget" in line))
