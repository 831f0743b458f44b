"""Whether a flow run has ended, by Prefect's word: who may stop what it had started.

A `dmdr run` may have a Prefect server of its own, so that a flow run this server has never heard of may well live. One
that is gone from here, where its deployment still is, was deleted.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.exceptions import ObjectNotFound

HEARTBEAT = "prefect.flow-run.heartbeat"
SILENCE = timedelta(minutes=15)  # after a heartbeat, until it means something: five times Prefect's default interval
LONG_AGO = datetime.min.replace(tzinfo=UTC)


def is_over(flow_run: str, deployment: str) -> bool:
    """True for one that is in a final state, and for one that was deleted. deployment: its id, or ""."""
    with get_client(sync_client=True) as client:
        found = _flow_run(client, flow_run)
        return _has(client, deployment) if found is None else found.state.is_final()


def over_since(flow_run: str, deployment: str) -> datetime | None:
    """Since when a flow run is over; None while it lives, and for one that this server cannot know.

    A heartbeat is life for SILENCE, whatever the state says: a process that was cut off for a while is marked crashed
    and goes on. One that runs without having ever sent one lives.
    """
    with get_client(sync_client=True) as client:
        found = _flow_run(client, flow_run)
        if found is None:
            return LONG_AGO if _has(client, deployment) else None
        heard = _last_heartbeat(client, flow_run)
        silent = None if heard is None else heard + SILENCE
        if found.state.is_final():
            ended = found.state.timestamp
            return silent if silent is not None and heard > ended else ended
        return silent if found.state.is_running() else None


def _flow_run(client: SyncPrefectClient, flow_run: str) -> FlowRun | None:
    try:
        return client.read_flow_run(UUID(flow_run))
    except (ObjectNotFound, ValueError):
        return None


def _has(client: SyncPrefectClient, deployment: str) -> bool:
    try:
        client.read_deployment(UUID(deployment))
        return True
    except (ObjectNotFound, ValueError):
        return False


def _last_heartbeat(client: SyncPrefectClient, flow_run: str) -> datetime | None:
    of = EventResourceFilter(id=[f"prefect.flow-run.{flow_run}"])
    newest = EventFilter(event=EventNameFilter(name=[HEARTBEAT]), resource=of)
    return next((event.occurred for event in client.read_events(newest, limit=1).events), None)
