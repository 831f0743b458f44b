"""The flow `reap`: stops the Jobs of flow runs that died for good. Nobody waits for these Jobs any more.

A flow that is cancelled stops its Jobs itself. A flow whose process was killed cannot: its Jobs go on to their seals.
That is right if the flow is started again soon, and a waste of GPUs if it never is.

1. A Job is stopped when every flow run that ever waited for it has been over for a while. A flow run that this server
   does not know may live with another server (`dmdr run` has its own), and its Job stays.
2. A Job is stopped as by a cancelled flow: SIGTERM, and time for a checkpoint. The same run continues from there.
3. A flow that attaches to a Job marks it, and the cluster refuses to delete a Job that has changed since we read it. So
   no flow can attach between our look and the deletion.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from prefect import flow, get_run_logger

from dmdr.config.cluster import Label
from dmdr.config.section import Positive
from flows.launch import api
from flows.launch.failure import explain_faults
from flows.launch.manifest import read_marks
from flows.launch.objects import Job
from flows.launch.owned import OwnedJobs
from flows.prefect_support import owners


@flow(name="reap", persist_result=False, result_serializer="json")
def reap(namespace: Label = "dmdr", after: Positive = 900) -> None:
    """Stop the Jobs that were left behind.

    Args:
        namespace: the namespace of the Jobs
        after: a Job is stopped when all flow runs that waited for it have been over for this many seconds

    Raises:
        StageFailed: the cluster does not let us list or delete Jobs, or does not answer.
    """
    with explain_faults("flow reap"):
        say = get_run_logger().info
        if not api.is_known():
            say("no cluster here: nothing to stop")
            return
        jobs = OwnedJobs("reap", namespace)
        latest = datetime.now(UTC) - timedelta(seconds=after)
        for owned in jobs.list_jobs():
            since = find_abandoned_since(owned.job)
            if since is None or since > latest or owned.job.is_ending:
                continue
            if jobs.stop(owned, unchanged=True):
                say(f"stopped {owned.job.name}: nobody waits for it since {since:%Y-%m-%d %H:%M} UTC")
            else:
                say(f"{owned.job.name} has changed meanwhile; it is looked at again next time")


def find_abandoned_since(job: Job) -> datetime | None:
    """Since when no flow run waits for a Job; None if one does, or may."""
    since = job.metadata.creation_timestamp
    for flow_run, deployment in read_marks(job).items():
        over = owners.find_end(flow_run, deployment)
        if over is None:
            return None
        since = over if since is None else max(since, over)
    return since
