"""The Jobs that flow runs started, as others see them: found by their label, and stopped with time for a checkpoint.

A Job that somebody created by hand has no such label and is not among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import urllib3
from kubernetes import client

from dmdr.errors import ConfigError, StoreError
from flows.launch.api import JOB, JOB_SET, JobApi, connect
from flows.launch.cluster_errors import CONFLICT, MISSING, explain_refusal, is_outage
from flows.launch.failure import StageFailed
from flows.launch.labels import FLOW_RUN
from flows.launch.manifest import read_marks
from flows.launch.objects import Job

ClientError = client.ApiException | urllib3.exceptions.HTTPError
CLIENT_ERRORS = (client.ApiException, urllib3.exceptions.HTTPError)


@dataclass(frozen=True)
class OwnedJob:
    """A Job that a flow run started. api: where requests about it go."""

    api: JobApi
    job: Job


class OwnedJobs:
    """The unfinished Jobs of a namespace that flow runs started. asker: the first word of its error messages."""

    def __init__(self, asker: str, namespace: str) -> None:
        custom_objects = client.CustomObjectsApi(connect(asker))
        self.asker, self.host = asker, custom_objects.api_client.configuration.host
        self.apis = [JobApi(custom_objects, kind, namespace) for kind in (JOB, JOB_SET)]

    def list_jobs(self, flow_run: str | None = None) -> list[OwnedJob]:
        """The Jobs of one flow run, or of all.

        Raises:
            StageFailed: the cluster does not let us list them, or does not answer.
        """
        selector = FLOW_RUN if flow_run is None else f"{FLOW_RUN}={flow_run}"
        return [OwnedJob(api, job) for api in self.apis for job in self._list(api, selector) if job.succeeded is None]

    def _list(self, api: JobApi, selector: str) -> tuple[Job, ...]:
        try:
            return api.list_jobs(selector)
        except CLIENT_ERRORS as error:
            if api.kind == JOB_SET and isinstance(error, client.ApiException) and error.status in (403, MISSING):
                return ()  # a cluster without JobSet
            raise self._explain(error, "list", api) from error

    def stop(self, owned: OwnedJob, *, unchanged: bool = False) -> bool:
        """Delete a Job. Its pods get SIGTERM and time for a checkpoint.

        unchanged: delete it only if it is as it was read. Returns whether it is deleted.

        Raises:
            StageFailed: the cluster does not let us delete it, or does not answer.
        """
        try:
            owned.api.delete_job(owned.job.name, unchanged=owned.job if unchanged else None)
        except CLIENT_ERRORS as error:
            if unchanged and isinstance(error, client.ApiException) and error.status == CONFLICT:
                return False
            raise self._explain(error, "delete", owned.api) from error
        return True

    def _explain(self, error: ClientError, verb: str, api: JobApi) -> StageFailed:
        request = f"{verb} {api.kind.plural} in the namespace {api.namespace}"
        if not isinstance(error, client.ApiException) or is_outage(error):
            why = f"cannot {request}: the cluster at {self.host} does not answer sensibly"
            return StageFailed(self.asker, StoreError.exit_code, why)
        why = explain_refusal(error, verb, api.kind.plural, api.namespace)
        return StageFailed(self.asker, ConfigError.exit_code, why, final=True)


def stop_all(namespace: str, flow_run: str) -> list[str]:
    """Delete every unfinished Job that a flow run started; returns their names."""
    jobs = OwnedJobs("cancel", namespace)
    stopped = []
    for owned in jobs.list_jobs(flow_run):
        jobs.stop(owned)
        stopped.append(owned.job.name)
    return stopped


def find_owner(job: Job, flow_run: str | None, is_over: Callable[[str, str], bool]) -> str | None:
    """Who else may want a Job to go on, as a clause; None if nobody does, so that we stop it. flow_run: our own."""
    if job.owner is None:
        return "somebody created it by hand"
    if job.owner == flow_run:
        return None
    for other, deployment in read_marks(job).items():
        if other != flow_run and not _has_ended(other, deployment, is_over):
            return f"the flow run {other} may wait for it"
    return None


def _has_ended(flow_run: str, deployment: str, is_over: Callable[[str, str], bool]) -> bool:
    try:
        return is_over(flow_run, deployment)
    except Exception:  # Prefect's client raises many kinds; whoever cannot be asked may live
        return False
