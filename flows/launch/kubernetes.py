"""A stage as a Job of Kubernetes: created or met, watched to its end, stopped with the flow.

1. Creating is safe to repeat: the name is a function of run, stage and attempt, and one that exists is attached to. An
   attempt is new when all before it have ended.
2. What is true is read anew whenever a watch says that something happened, breaks off or says nothing for a while. Only
   the conditions Complete and Failed end a Job; suspended, as a queue leaves it, is waiting.
3. The cluster may be away for a while (api.py); nothing is deleted meanwhile.
4. A flow stops the Jobs that it started, and those it met which no living flow run waits for. Others belong to
   somebody. Each flow run marks the Jobs that it waits for, so that one that dies leaves none behind; see owned.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import urllib3
from kubernetes import client, watch

from flows.launch import pods
from flows.launch.api import (
    KINDS,
    MERGE,
    TIMEOUT,
    Backoff,
    ClusterUnavailable,
    NameTaken,
    connect,
    delete_job,
    error_message,
)
from flows.launch.failure import StageFailed
from flows.launch.logs import Logs
from flows.launch.manifest import ATTEMPT, FLOW_RUN, IDENTITY, STORE, build_manifest, build_mark, read_marks
from flows.launch.stage import PREFIX, Stage

CONFIG, STOPPED, INTERNAL = 64, 75, 70  # exit codes, as in stages/__main__.py
POLL = 15  # seconds that a watch may be silent
LAST_LINES = 10  # seconds for the end of the logs
ENDS = {"Complete": True, "Completed": True, "Failed": False}  # conditions of Jobs and JobSets


def run_job(
    stage: Stage,
    *,
    say: Callable[[str], None],
    sealed: Callable[[], bool],
    flow_run: str | None = None,
    deployment: str | None = None,
    is_over: Callable[[str, str], bool] = lambda flow_run, deployment: False,
) -> None:
    """Run a stage to its end, or wait for the Job that does.

    say: gets the lines of its pods and what becomes of them. sealed: whether the artifact is. flow_run, deployment:
    ours. is_over: whether another flow run of a deployment has ended.

    Raises:
        StageFailed: it ended without its seal, cannot start, or the cluster refuses.
    """
    jobs = Jobs(stage, say, deployment)
    if (job := jobs.begin(flow_run, sealed)) is None:
        return
    name, owner = job["metadata"]["name"], job["metadata"]["labels"].get(FLOW_RUN)
    others = {other: of for other, of in read_marks(job).items() if other != flow_run}
    ours = owner is not None and (owner == flow_run or all(is_over(*other) for other in others.items()))
    try:
        problem = jobs.watched(name)
    except BaseException:
        if ours:
            say(f"{stage.name}: stopping {name}")
            jobs.stop(name)
        jobs.logs.finish(LAST_LINES if ours else 0)
        raise
    jobs.logs.finish(LAST_LINES)
    if problem is not None and not sealed():
        raise problem


class Jobs:
    """The Jobs of one stage of one run, all attempts."""

    def __init__(self, stage: Stage, say: Callable[[str], None], deployment: str | None = None) -> None:
        self.stage, self.say, self.deployment = stage, say, deployment
        self.api, self.core = connect(stage.name)
        self.kind = KINDS[stage.is_set]
        self.where = (*self.kind[:2], stage.cluster.namespace, self.kind[2])
        self.logs, self.patience = Logs(self.core, stage.cluster.namespace, say), Backoff(stage.name, say)

    def begin(self, flow_run: str | None, sealed: Callable[[], bool] = lambda: False) -> dict | None:
        """The Job of this attempt: an unfinished one that is met, or a new one.

        None if the last attempt has sealed the stage, which it may have done since we looked.
        """
        while True:
            try:
                attempts = self.attempts()
                self.patience.reached()
                newest = attempts[-1] if attempts else None
                if newest is not None and job_outcome(newest) is None:
                    if not newest["metadata"].get("deletionTimestamp"):
                        newest = self._met(newest, flow_run)
                    if newest is None:
                        continue
                    if not newest["metadata"].get("deletionTimestamp"):
                        return newest
                    self.say(f"{self.stage.name}: waiting for {newest['metadata']['name']} to end, which was deleted")
                    time.sleep(POLL / 5)
                    continue
                if newest is not None and sealed():
                    return None
                return self._created(1 + max((job_attempt(each) for each in attempts), default=0), flow_run)
            except ClusterUnavailable as error:  # created or not, the list will say
                self.patience.wait(error)

    def attempts(self) -> list[dict]:
        """All that the cluster still has, the newest last."""
        with self._asked("list"):
            found = self.api.list_namespaced_custom_object(
                *self.where, label_selector=self.stage.selector, _request_timeout=TIMEOUT
            )["items"]
        ours = [each for each in found if each["metadata"]["annotations"].get(f"{PREFIX}/run") == self.stage.run]
        return sorted(ours, key=job_attempt)

    def _created(self, number: int, flow_run: str | None) -> dict:
        body = build_manifest(self.stage, number, flow_run, self.deployment)
        with self._asked("create"):
            job = self.api.create_namespaced_custom_object(*self.where, body=body, _request_timeout=TIMEOUT)
        self.say(f"{self.stage.name}: created {self.kind[2][:-1]} {job['metadata']['name']}")
        return job

    def _met(self, job: dict, flow_run: str | None) -> dict | None:
        """A Job of ours that is there already, with our mark on it; None if it has gone meanwhile."""
        asked, name = build_manifest(self.stage, job_attempt(job))["metadata"]["annotations"], job["metadata"]["name"]
        differs = [key for key in (STORE, IDENTITY) if job["metadata"]["annotations"].get(key) != asked[key]]
        if differs:
            what = {STORE: "for another store", IDENTITY: "with other settings"}[differs[0]]
            raise StageFailed(
                self.stage.name,
                CONFIG,
                f"{name} runs already for run {self.stage.run} {what}; wait for it, delete it with kubectl, or give "
                "this run another name",
            )
        if job["metadata"]["labels"].get(FLOW_RUN) == flow_run:
            return job
        met = self._marked(name, build_mark(flow_run, self.deployment)) if flow_run else job
        if met is not None and not met["metadata"].get("deletionTimestamp"):
            self.say(f"{self.stage.name}: attached to {name}")
        return met

    def _marked(self, name: str, ours: dict[str, str]) -> dict | None:
        with self._asked("patch"), ignore_missing():
            return self.api.patch_namespaced_custom_object(
                *self.where, name, {"metadata": {"annotations": ours}}, _content_type=MERGE, _request_timeout=TIMEOUT
            )

    def watched(self, name: str) -> StageFailed | None:
        """Wait for the end of a Job; what went wrong, if anything."""
        stuck, queued = None, False
        while True:
            try:
                job = self.read(name)
                if job is None:
                    why = f"{name} was deleted by somebody; the same command goes on from here"
                    return StageFailed(self.stage.name, STOPPED, why, final=True)
                if not queued and job["spec"].get("suspend"):
                    self.say(f"{self.stage.name}: {name} waits in the queue")
                queued, found = bool(job["spec"].get("suspend")), self.pods(job)
                if (good := job_outcome(job)) is not None:
                    return None if good else self._failure(job, found)
                stuck = self._stuck(name, found, stuck)
                self.patience.answered()
                self._until_something_happens(job)
            except ClusterUnavailable as error:
                self.patience.wait(error)

    def _stuck(self, name: str, found: list[dict], since: tuple[float, str] | None) -> tuple[float, str] | None:
        """When and why pods began to wait; ends the Job when that is too long ago."""
        why = next((why for pod in found if (why := pods.explain_waiting(pod, self.stage)) is not None), None)
        if why is None:
            return None
        began = since[0] if since else time.monotonic()
        if since is None or since[1] != why:
            self.say(f"{self.stage.name}: {why}")
        if time.monotonic() - began > self.stage.pods.patience:
            self.stop(name)
            waited = f"it waited {self.stage.pods.patience:,} s (execution.cluster.patience)"
            raise StageFailed(self.stage.name, CONFIG, f"{why}; {waited}", final=True)
        return began, why

    def _failure(self, job: dict, found: list[dict]) -> StageFailed:
        condition = next(each for each in job["status"]["conditions"] if ENDS.get(each["type"]) is False)
        reason = f"{condition.get('reason')}: {' '.join((condition.get('message') or '').split())}"
        code, why = pods.explain_worst(found, self.stage) or (INTERNAL, "no pod of it is left to tell why")
        return StageFailed(self.stage.name, code, f"{why} ({job['metadata']['name']}, {reason})", final=True)

    def pods(self, job: dict) -> list[dict]:
        """The pods of an attempt; their logs are followed from now on."""
        number = job["metadata"]["labels"][ATTEMPT]
        with self._asked("list", "pods"):
            answer = self.core.list_namespaced_pod(
                self.stage.cluster.namespace,
                label_selector=f"{self.stage.selector},{ATTEMPT}={number}",
                _request_timeout=TIMEOUT,
                _preload_content=False,
            )
            if answer.status != 200:
                raise client.ApiException(http_resp=answer)
            found = json.loads(answer.data)["items"]
        for pod in found:
            if pods.has_begun(pod):
                index = pod["metadata"].get("annotations", {}).get("batch.kubernetes.io/job-completion-index", "")
                self.logs.follow(pod["metadata"]["name"], f"node {index}: " if self.stage.is_set else "")
        return found

    def read(self, name: str) -> dict | None:
        with self._asked("get"), ignore_missing():
            return self.api.get_namespaced_custom_object(*self.where, name, _request_timeout=TIMEOUT)

    def stop(self, name: str) -> None:
        """Delete a Job; its pods get SIGTERM and their time. Returns when all are gone, or should be."""
        until = time.monotonic() + self.stage.pods.grace + 30
        asked = False
        while time.monotonic() < until:
            try:
                if not asked:
                    delete_job(self.api, self.where, name)
                    asked = True
                if self.read(name) is None:
                    return
            except (ClusterUnavailable, client.ApiException, urllib3.exceptions.HTTPError):
                pass
            time.sleep(0.5)

    def _until_something_happens(self, job: dict) -> None:
        """To the first event of a Job or for POLL seconds; what happened, to its pods too, is read anew."""
        events = watch.Watch()
        try:
            for _ in events.stream(
                self.api.list_namespaced_custom_object,
                *self.where,
                timeout_seconds=POLL,
                field_selector=f"metadata.name={job['metadata']['name']}",
                resource_version=job["metadata"]["resourceVersion"],
                _request_timeout=(5, POLL + 10),
            ):
                return
        except (client.ApiException, urllib3.exceptions.HTTPError, ValueError):
            time.sleep(1)  # 410 when the version is too old, a broken connection, half an event
        finally:
            events.stop()

    @contextmanager
    def _asked(self, verb: str, resource: str | None = None) -> Iterator[None]:
        """Turn what the API server answers into one line, or into Away."""
        try:
            yield
        except urllib3.exceptions.HTTPError as error:
            raise ClusterUnavailable(
                f"the cluster at {self.core.api_client.configuration.host} does not answer"
            ) from error
        except client.ApiException as error:
            if error.status == 409:
                raise NameTaken(f"the cluster has an object of that name already: {error_message(error)}") from error
            if error.status == 429 or error.status >= 500:
                raise ClusterUnavailable(f"the cluster answered {error.status} {error.reason}") from error
            raise StageFailed(
                self.stage.name, CONFIG, self._refusal(error, verb, resource or self.kind[2]), final=True
            ) from error

    def _refusal(self, error: client.ApiException, verb: str, resource: str) -> str:
        namespace, said = self.stage.cluster.namespace, error_message(error)
        if error.status in (401, 403):
            return (
                f"the cluster does not let this flow {verb} {resource} in the namespace {namespace}: {said}; "
                "k8s/base has the Role that it needs"
            )
        if error.status == 404 and "namespace" in said:
            return f"the cluster has no namespace {namespace}; create it (k8s/base), or set execution.cluster.namespace"
        if error.status == 404:
            return f"the cluster knows no {resource}, which several nodes need ({said}); install JobSet or set nodes: 1"
        return f"the cluster refuses to {verb} {resource} in the namespace {namespace}: {said}"


@contextmanager
def ignore_missing() -> Iterator[None]:
    """Leaves the block where the cluster has no such object, whose name then means None."""
    try:
        yield
    except client.ApiException as error:
        if error.status != 404:
            raise


def job_outcome(job: dict) -> bool | None:
    """Whether a Job ended well; None while it has not ended."""
    for condition in job.get("status", {}).get("conditions") or []:
        if condition["type"] in ENDS and condition["status"] == "True":
            return ENDS[condition["type"]]
    return None


def job_attempt(job: dict) -> int:
    return int(job["metadata"]["labels"][ATTEMPT])
