"""Whether a flow run has ended, by Prefect's word: who may stop what it had started."""

from __future__ import annotations

from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound


def is_over(flow_run: str) -> bool:
    """True for one that is in a final state, and for one that Prefect has no memory of."""
    with get_client(sync_client=True) as client:
        try:
            return client.read_flow_run(UUID(flow_run)).state.is_final()
        except (ObjectNotFound, ValueError):
            return True
