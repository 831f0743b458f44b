"""The flow `reap`: stops the Jobs of flow runs that died for good, which nobody waits for any more.

A flow that is cancelled stops its Jobs itself. One whose process was killed cannot: its Jobs go on to their seals. That
is as it should be if it is started again soon, and a waste of GPUs if it never is.

1. A Job is stopped when every flow run that ever waited for it has been over for a while. One that this server does
   not know may live with another server (`dmdr run` has its own), and its Job stays.
2. It is stopped as by a cancelled flow: SIGTERM, and time for a checkpoint. The same run goes on from there.
3. Who attaches marks the Job, and the cluster refuses to delete a Job that has changed since we read it. So nobody can
   come in between.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from prefect import flow, get_run_logger

from dmdr.config.cluster import Label
from dmdr.config.section import Positive
from flows.launch import api
from flows.launch.manifest import read_marks
from flows.launch.owned import OwnedJobs
from flows.prefect_support import owners


@flow(name="reap", persist_result=False, result_serializer="json")
def reap(namespace: Label = "dmdr", after: Positive = 900) -> None:
    """Stop the Jobs that were left behind.

    Args:
        namespace: of the cluster, where the Jobs are
        after: seconds that all flow runs which waited for a Job have to be over

    Raises:
        StageFailed: the cluster does not let us list or delete Jobs, or does not answer.
    """
    say = get_run_logger().info
    if not api.is_known():
        say("no cluster here: nothing to stop")
        return
    owned, latest = OwnedJobs("reap", namespace), datetime.now(UTC) - timedelta(seconds=after)
    for where, job in owned.jobs():
        name, since = job["metadata"]["name"], abandoned_since(job)
        if since is None or since > latest or job["metadata"].get("deletionTimestamp"):
            continue
        if owned.stop(where, job, unchanged=True):
            say(f"stopped {name}: nobody waits for it since {since:%Y-%m-%d %H:%M} UTC")
        else:
            say(f"{name} has changed meanwhile; it is looked at again next time")


def abandoned_since(job: dict) -> datetime | None:
    """Since when no flow run waits for a Job; None if one does, or may."""
    since = datetime.fromisoformat(job["metadata"]["creationTimestamp"])
    for flow_run, deployment in read_marks(job).items():
        if (over := owners.over_since(flow_run, deployment)) is None:
            return None
        since = max(since, over)
    return since
