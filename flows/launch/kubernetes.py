"""A stage as a Job of Kubernetes: created or attached to, watched to its end, stopped with the flow.

1. Creating is safe to repeat: the name is a function of run, stage and attempt, and a Job of that name is attached to.
   A new attempt starts when all before it have ended.
2. The state is read anew whenever a watch reports an event, breaks off or is silent for a while. Only the conditions
   Complete and Failed end a Job. A suspended Job, as a queue leaves it, is waiting.
3. The cluster may be unreachable for a while (backoff.py); nothing is deleted meanwhile.
4. A flow stops the Jobs that it started, and those it attached to which no living flow run waits for. Others belong to
   somebody: it leaves them running, and says so. Each flow run marks the Jobs that it waits for, so that one that dies
   leaves none behind; see owned.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial

import urllib3
from kubernetes import client

from dmdr.errors import INTERNAL, USER_ERRORS, ConfigError, Stopped
from flows.launch import events, pods
from flows.launch.api import JOB, JOB_SET, TIMEOUT, JobApi, connect
from flows.launch.backoff import Backoff
from flows.launch.cluster_errors import ClusterUnavailable, explain_errors, ignore_missing
from flows.launch.failure import StageFailed
from flows.launch.labels import ATTEMPT, FLOW_RUN, IDENTITY, NODE, PREFIX, STAGE, STORE
from flows.launch.logs import Logs
from flows.launch.manifest import build_annotations, build_manifest, build_mark, job_name
from flows.launch.objects import ENDS, Job, Pod, PodList
from flows.launch.objects import Event as ClusterEvent
from flows.launch.owned import find_owner
from flows.launch.stage import Stage, name_command
from flows.launch.waiting import QUEUED, Queue, Waiting
from stages.runtime.events import Event, announce, build_waiting
from stages.store.artifacts import Artifact

POLL = 15  # seconds that a watch may be silent
LAST_LINES = 10  # seconds for the end of the logs


def run_job(
    stage: Stage,
    *,
    say: Callable[[str], None],
    sealed: Callable[[], bool],
    flow_run: str | None = None,
    deployment: str | None = None,
    is_over: Callable[[str, str], bool] = lambda flow_run, deployment: False,
    tell: Callable[[Event], object] = lambda event: None,
) -> None:
    """Run a stage to its end, or wait for the Job that already runs it.

    say: gets the lines of its pods, and news of them. sealed: whether the artifact is sealed. flow_run, deployment: ids
    of our own. is_over: whether another flow run of a deployment has ended. tell: gets the event of a Job that waits.

    Raises:
        StageFailed: it ended without its seal, cannot start, or the cluster refuses.
    """
    jobs = Jobs(stage, say, deployment, tell)
    job: Job | None = None
    try:
        job = jobs.begin(flow_run, sealed)
        if job is None:
            return
        problem = jobs.watch(job.name)
    except BaseException:
        if (ours := job or jobs.find_created()) is not None:
            jobs.leave(ours, flow_run, is_over)
        raise
    jobs.logs.finish(LAST_LINES)
    if problem is not None and not sealed():
        raise problem


@dataclass(frozen=True)
class Snapshot:
    """A Job and its pods as they were read."""

    job: Job
    pods: tuple[Pod, ...]


class Jobs:
    """The Jobs of one stage of one run: all attempts."""

    def __init__(
        self,
        stage: Stage,
        say: Callable[[str], None],
        deployment: str | None = None,
        tell: Callable[[Event], object] = lambda event: None,
    ) -> None:
        self.stage, self.say, self.deployment, self.tell = stage, say, deployment, tell
        connection = connect(stage.name)
        self.core = client.CoreV1Api(connection)
        kind = JOB_SET if stage.is_set else JOB
        self.api = JobApi(client.CustomObjectsApi(connection), kind, stage.cluster.namespace)
        self.logs = Logs(self.core, stage.cluster.namespace, say)
        self.backoff = Backoff(stage.name, say)
        self._asked: str | None = None  # the name of the Job that the cluster was asked to create

    def begin(self, flow_run: str | None, sealed: Callable[[], bool] = lambda: False) -> Job | None:
        """The unfinished Job of this stage, with our mark on it, or a new one.

        None if the last attempt has sealed the stage, perhaps after we looked for the seal.
        """
        self.backoff.reach(self.list_attempts)
        return self.backoff.call(lambda: self._attach_or_create(flow_run, sealed))

    def _attach_or_create(self, flow_run: str | None, sealed: Callable[[], bool]) -> Job | None:
        while True:
            attempts = self.list_attempts()
            newest = attempts[-1] if attempts else None
            if newest is None:
                return self._create(1, flow_run)
            if newest.succeeded is not None:
                return None if sealed() else self._create(1 + newest.attempt, flow_run)
            job = newest if newest.is_ending else self._attach(newest, flow_run)
            if job is not None and not job.is_ending:
                return job
            if job is not None:
                self.say(f"{self.stage.name}: waiting for {job.name} to end, which was deleted")
                time.sleep(POLL / 5)

    def list_attempts(self) -> list[Job]:
        """All attempts that the cluster still has, the newest last."""
        with self._explain_errors("list"):
            jobs = self.api.list_jobs(self.stage.selector)
        ours = [job for job in jobs if job.metadata.annotations.get(f"{PREFIX}/run") == self.stage.run]
        return sorted(ours, key=lambda job: job.attempt)

    def _create(self, attempt: int, flow_run: str | None) -> Job:
        manifest = build_manifest(self.stage, attempt, flow_run, self.deployment)
        self._asked = job_name(self.stage.run, self.stage.name, attempt)
        with self._explain_errors("create"):
            job = self.api.create_job(manifest)
        self.say(f"{self.stage.name}: created {self.api.kind.singular} {job.name}")
        return job

    def find_created(self) -> Job | None:
        """The Job that the cluster was asked to create, if it is there: who is cancelled meanwhile hears no answer."""
        if self._asked is not None:
            with suppress(ClusterUnavailable, StageFailed):
                return self.read_job(self._asked)
        return None

    def _attach(self, job: Job, flow_run: str | None) -> Job | None:
        """Mark an unfinished Job as one that we wait for; None if it is gone meanwhile."""
        wanted = build_annotations(self.stage)
        for key, difference in {STORE: "for another store", IDENTITY: "with other settings"}.items():
            if job.metadata.annotations.get(key) != wanted[key]:
                why = (
                    f"{job.name} runs already for run {self.stage.run} {difference}; wait for it, delete it with "
                    "kubectl, or give this run another name"
                )
                raise StageFailed(self.stage.name, ConfigError.exit_code, why)
        if job.metadata.labels.get(FLOW_RUN) == flow_run:
            return job
        marked: Job | None = job
        if flow_run is not None:
            marked = None
            with self._explain_errors("patch"), ignore_missing():
                marked = self.api.annotate_job(job.name, build_mark(flow_run, self.deployment))
        if marked is not None and not marked.is_ending:
            self.say(f"{self.stage.name}: attached to {job.name}")
        return marked

    def watch(self, name: str) -> StageFailed | None:
        """Wait for the end of a Job; returns what went wrong, if anything did."""
        waiting, queue = Waiting(self.stage, self.read_events), Queue()
        was_suspended = False
        while True:
            snapshot = self.backoff.call(lambda: self._look(name))
            if snapshot is None:
                why = f"{name} was deleted by somebody; the same command goes on from here"
                return StageFailed(self.stage.name, Stopped.exit_code, why, final=True)
            job = snapshot.job
            if job.spec.suspend and not was_suspended:
                self.say(f"{self.stage.name}: {name} waits in the queue")
            was_suspended = job.spec.suspend
            if queue.lasts(is_held=job.spec.suspend):
                self._tell("queue", f"{name} has waited in the queue for {QUEUED / 60:.0f} min")
            if job.succeeded is not None:
                return None if job.succeeded else self._explain_failure(snapshot)
            self._check_waiting(snapshot, waiting)
            self.api.wait_for_event(job, POLL)

    def _tell(self, reason: str, line: str) -> None:
        """Tell people that the Job waits. reason: for what."""
        artifact = Artifact(self.stage.store, self.stage.run, self.stage.name)
        try:
            event = build_waiting(artifact, reason, line)
        except USER_ERRORS:  # the store does not answer, and the line stands in the log
            return
        self.tell(event)
        announce(self.stage.config, lambda: event, self.say)

    def _look(self, name: str) -> Snapshot | None:
        """A Job with its pods; None if it is gone."""
        job = self.read_job(name)
        return None if job is None else Snapshot(job, self.list_pods(job))

    def _check_waiting(self, snapshot: Snapshot, waiting: Waiting) -> None:
        """Tell why the Job does not run, if there is a reason.

        Raises:
            StageFailed: it has waited too long; the Job is deleted.
        """
        find = partial(waiting.find_problem, snapshot.job, snapshot.pods, others_end=self.others_end)
        problem = self.backoff.call(find)
        if (news := waiting.note(problem, snapshot.pods)) is not None:
            self.say(f"{self.stage.name}: {news}")
            self._tell("" if problem is None else problem.kind, news)
        if problem is not None and waiting.lasts_too_long(problem):
            self.stop(snapshot.job.name)
            waited = f"it waited {self.stage.pods.patience:,} s (execution.cluster.patience)"
            raise StageFailed(self.stage.name, ConfigError.exit_code, f"{problem.why}; {waited}", final=True)

    def _explain_failure(self, snapshot: Snapshot) -> StageFailed:
        job = snapshot.job
        condition = next(each for each in job.status.conditions if ENDS.get(each.type) is False)
        verdict = f"{condition.reason}: {' '.join((condition.message or '').split())}"
        worst = pods.explain_worst(snapshot.pods, self.stage)
        if worst is None:
            worst = pods.PodFailure(INTERNAL, "no pod of it is left to tell why")
        return StageFailed(self.stage.name, worst.exit_code, f"{worst.why} ({job.name}, {verdict})", final=True)

    def list_pods(self, job: Job) -> tuple[Pod, ...]:
        """The pods of an attempt. Their logs are followed from now on."""
        pods_of_job = self._list_pods(f"{self.stage.selector},{ATTEMPT}={job.attempt}")
        for pod in pods_of_job:
            if pods.has_log(pod):
                node = pod.metadata.annotations.get(NODE, "")
                self.logs.follow(pod.name, f"node {node}: " if self.stage.is_set else "")
        return pods_of_job

    def _list_pods(self, selector: str) -> tuple[Pod, ...]:
        with self._explain_errors("list", "pods"):
            answer: urllib3.HTTPResponse = self.core.list_namespaced_pod(  # type: ignore[assignment]  # no V1PodList:
                self.stage.cluster.namespace,
                label_selector=selector,
                _request_timeout=TIMEOUT,
                _preload_content=False,  # with it, the client returns the response itself
            )
            if answer.status != 200:
                raise client.ApiException(http_resp=answer)
            return PodList.model_validate_json(answer.data).items

    def others_end(self) -> bool:
        """Whether pods of stages are still ending, after a cancellation or an eviction for example."""
        return any(pods.is_ending(pod) for pod in self._list_pods(STAGE))

    def read_events(self, name: str) -> tuple[ClusterEvent, ...] | None:
        """The warnings about the object of a name; None where our Role does not let us read them."""
        with self._explain_errors("list", "events"):
            return events.read_events(self.core, self.stage.cluster.namespace, name)

    def read_job(self, name: str) -> Job | None:
        """A Job as it is now; None if there is none of that name."""
        with self._explain_errors("get"), ignore_missing():
            return self.api.read_job(name)
        return None

    def stop(self, name: str) -> None:
        """Delete a Job. Its pods get SIGTERM and time for a checkpoint. Returns when all are gone, or should be."""
        until = time.monotonic() + self.stage.pods.grace + 30
        is_deleted = False
        while time.monotonic() < until:
            try:
                if not is_deleted:
                    self.api.delete_job(name)
                    is_deleted = True
                if self.read_job(name) is None:
                    return
            except (ClusterUnavailable, client.ApiException, urllib3.exceptions.HTTPError):
                pass
            time.sleep(0.5)

    def leave(self, job: Job, flow_run: str | None, is_over: Callable[[str, str], bool]) -> None:
        """Stop a Job that nobody else waits for. Where somebody may, say so, and how a person stops it.

        job: as it was when we began to wait. is_over: as that of `run_job`.
        """
        with suppress(ClusterUnavailable, StageFailed):  # then what we know has to do
            now = self.read_job(job.name)
            if now is None or now.is_ending or now.succeeded is not None:
                self.logs.finish(LAST_LINES)
                return
            job = now
        owner = find_owner(job, flow_run, is_over)
        if owner is None:
            self.say(f"{self.stage.name}: stopping {job.name}")
            self.stop(job.name)
        else:
            command = name_command("delete", job.name, self.stage)
            self.say(f"{self.stage.name}: {job.name} runs on, because {owner}; to stop it: {command}")
        self.logs.finish(LAST_LINES if owner is None else 0)

    def _explain_errors(self, verb: str, resource: str | None = None) -> AbstractContextManager[None]:
        host = self.core.api_client.configuration.host
        return explain_errors(
            self.stage.name, verb, resource or self.api.kind.plural, namespace=self.api.namespace, host=host
        )
