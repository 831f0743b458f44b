"""Whether a flow run has ended, as Prefect knows it. Then others may stop the Jobs that it had started.

A `dmdr run` may have a Prefect server of its own, so a flow run that this server does not know may well live. But if
this server knows its deployment, the flow run was here and somebody deleted it.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.exceptions import ObjectNotFound

HEARTBEAT = "prefect.flow-run.heartbeat"
SILENCE = timedelta(minutes=15)  # after a heartbeat; five times Prefect's default interval between two
LONG_AGO = datetime.min.replace(tzinfo=UTC)


def is_over(flow_run: str, deployment: str) -> bool:
    """Whether a flow run has ended, was deleted or has been silent for too long. deployment: the id of its deployment,
    or ""."""
    end = find_end(flow_run, deployment)
    return end is not None and end <= datetime.now(UTC)


def find_end(flow_run: str, deployment: str) -> datetime | None:
    """When a flow run ended; None while it lives, and for one that this server cannot know.

    After a heartbeat a flow run counts as alive for SILENCE, whatever its state says: a process that was cut off for a
    while is marked crashed and yet goes on. A flow run that is running and has never sent a heartbeat counts as alive.
    """
    with get_client(sync_client=True) as client:
        run = _read_flow_run(client, flow_run)
        if run is None:
            return LONG_AGO if _has_deployment(client, deployment) else None
        if run.state is None:
            return None
        heartbeat = _find_last_heartbeat(client, flow_run)
        if run.state.is_final():
            ended = run.state.timestamp
            return ended if heartbeat is None or heartbeat <= ended else heartbeat + SILENCE
        return heartbeat + SILENCE if heartbeat is not None and run.state.is_running() else None


def _read_flow_run(client: SyncPrefectClient, flow_run: str) -> FlowRun | None:
    try:
        return client.read_flow_run(UUID(flow_run))
    except (ObjectNotFound, ValueError):
        return None


def _has_deployment(client: SyncPrefectClient, deployment: str) -> bool:
    try:
        client.read_deployment(UUID(deployment))
        return True
    except (ObjectNotFound, ValueError):
        return False


def _find_last_heartbeat(client: SyncPrefectClient, flow_run: str) -> datetime | None:
    resource = EventResourceFilter(id=[f"prefect.flow-run.{flow_run}"])
    heartbeats = EventFilter(event=EventNameFilter(name=[HEARTBEAT]), resource=resource)
    newest_first = client.read_events(heartbeats, limit=1).events
    return newest_first[0].occurred if newest_first else None
