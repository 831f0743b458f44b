"""The Jobs that flow runs started, as they are seen from outside of these: found by their label, stopped in time.

A Job that somebody created by hand has no such label and is not among them.
"""

from __future__ import annotations

import urllib3
from kubernetes import client

from flows.launch.api import KINDS, TIMEOUT, connect, delete_job, error_message
from flows.launch.failure import StageFailed
from flows.launch.kubernetes import job_outcome
from flows.launch.manifest import FLOW_RUN

CONFIG, IO, CONFLICT = 64, 74, 409  # exit codes, as in stages/__main__.py; HTTP's


class OwnedJobs:
    """The unfinished Jobs of a namespace that flow runs started; `asker` begins what goes wrong."""

    def __init__(self, asker: str, namespace: str) -> None:
        self.asker, self.namespace = asker, namespace
        self.api, _ = connect(asker)

    def jobs(self, flow_run: str | None = None) -> list[tuple[tuple[str, ...], dict]]:
        """(where, Job) of one flow run or of all.

        Raises:
            StageFailed: the cluster does not let us list them, or does not answer.
        """
        selector = FLOW_RUN if flow_run is None else f"{FLOW_RUN}={flow_run}"
        return [
            (where, job)
            for kind in KINDS.values()
            for where in [(*kind[:2], self.namespace, kind[2])]
            for job in self._listed(where, selector)
            if job_outcome(job) is None
        ]

    def _listed(self, where: tuple[str, ...], selector: str) -> list[dict]:
        try:
            return self.api.list_namespaced_custom_object(*where, label_selector=selector, _request_timeout=TIMEOUT)[
                "items"
            ]
        except (client.ApiException, urllib3.exceptions.HTTPError) as error:
            if isinstance(error, client.ApiException) and error.status in (403, 404) and where[3] == "jobsets":
                return []  # a cluster without JobSet
            raise self._failed("list", where, error) from error

    def stop(self, where: tuple[str, ...], job: dict, *, unchanged: bool = False) -> bool:
        """Delete a Job; its pods get SIGTERM and their time. unchanged: only as it was read; whether it was.

        Raises:
            StageFailed: the cluster does not let us delete it, or does not answer.
        """
        try:
            delete_job(self.api, where, job["metadata"]["name"], only=job if unchanged else None)
        except (client.ApiException, urllib3.exceptions.HTTPError) as error:
            if unchanged and isinstance(error, client.ApiException) and error.status == CONFLICT:
                return False
            raise self._failed("delete", where, error) from error
        return True

    def _failed(
        self, verb: str, where: tuple[str, ...], error: client.ApiException | urllib3.exceptions.HTTPError
    ) -> StageFailed:
        about = f"{verb} {where[3]} in the namespace {self.namespace}"
        if not isinstance(error, client.ApiException) or error.status == 429 or error.status >= 500:
            host = self.api.api_client.configuration.host
            return StageFailed(self.asker, IO, f"cannot {about}: the cluster at {host} does not answer sensibly")
        why = f"the cluster does not let us {about}: {error_message(error)}; k8s/base has the Role that it needs"
        return StageFailed(self.asker, CONFIG, why, final=True)


def stop_all(namespace: str, flow_run: str) -> list[str]:
    """Delete every unfinished Job that a flow run started; returns their names."""
    owned, stopped = OwnedJobs("cancel", namespace), []
    for where, job in owned.jobs(flow_run):
        owned.stop(where, job)
        stopped.append(job["metadata"]["name"])
    return stopped
