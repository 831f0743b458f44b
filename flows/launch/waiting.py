"""Why a Job does not run yet: pods that wait, and pods that cannot even be created. Each problem is told once.

1. A pod that cannot be created leaves no trace but an event of its Job: a quota, a service account or a priority class
   that is missing, an admission webhook. So a Job without its pods is looked up in the events.
2. The cluster words one problem in several ways (ErrImagePull, then ImagePullBackOff, then the first again). Its kind
   stays the same, so it is told once and its time goes on.
3. A pod may find no node for a moment, because the one before it is still ending. That is told only when it lasts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime

from flows.launch.events import explain_event, find_newest, name_fault
from flows.launch.objects import Event, Job, Metadata, Pod
from flows.launch.pods import LONG_AGO, NO_NODE, Problem, explain_waiting, is_creating, is_live, is_up
from flows.launch.stage import Stage, name_command

CREATION = 5.0  # seconds that a Job may have no pod before its events are read
SILENCE = 60.0  # seconds that it may have none before that is told, where no event says why
SETTLING = (
    30.0  # seconds that a pod may find no node before that is told, and may be created before its events are read
)
QUEUED = 900.0  # seconds in a queue of which people are told
MOUNTING = ("FailedMount", "FailedAttachVolume", "FailedMapVolume", "FailedCreatePodSandBox", "NetworkNotReady")
REMEDIES = {  # what the API server says -> what to do; {} is the name of the stage
    " quota": "raise that quota, or ask for less under execution.cluster.stages.{}",
    "service account": "create it, k8s/base has dmdr-stage, or correct execution.cluster.service_account",
    "PriorityClass": "create it, k8s/base has two, or correct execution.cluster.stages.{}.priority_class",
}

ReadEvents = Callable[[str], Sequence[Event] | None]  # of the object of a name; None where the cluster does not let us


class Queue:
    """How long a queue has held a Job back. now: as that of `Waiting`."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self._since: float | None = None
        self._is_told = False

    def lasts(self, *, is_held: bool) -> bool:
        """Whether the Job has been held for QUEUED seconds now. That is so once, however often it is held later."""
        if not is_held:
            self._since = None
            return False
        self._since = self.now() if self._since is None else self._since
        if self._is_told or self.now() - self._since < QUEUED:
            return False
        self._is_told = True
        return True


class Waiting:
    """What one Job has waited for so far. now: time.monotonic, unless a test has another clock."""

    def __init__(self, stage: Stage, read_events: ReadEvents, now: Callable[[], float] = time.monotonic) -> None:
        self.stage, self.read_events, self.now = stage, read_events, now
        self._since: dict[str, float] = {}  # kind of problem -> when it was first seen
        self._told: set[str] = set()

    def find_problem(self, job: Job, pods: Sequence[Pod], *, others_end: Callable[[], bool]) -> Problem | None:
        """Why the Job does not run; None if it does, or will soon.

        others_end: whether pods of other stages are still ending, and hold what this one waits for.
        """
        if job.spec.suspend or job.is_ending:  # a queue holds it back, or somebody has deleted it
            self._since.clear()
            return None
        problem = next((each for pod in pods if (each := explain_waiting(pod, self.stage)) is not None), None)
        if problem is not None and problem.kind == NO_NODE:
            return problem if self._lasts(NO_NODE, SETTLING) and not others_end() else problem.keep_quiet()
        return problem or self._explain_missing(job, pods) or self._explain_creating(pods)

    def note(self, problem: Problem | None, pods: Sequence[Pod]) -> str | None:
        """Remember a problem; returns it in words if it was not told yet."""
        if problem is None:
            if sum(is_up(pod) for pod in pods) >= self.stage.pods.nodes:
                self._since.clear()
                self._told.clear()
            return None
        self._since.setdefault(problem.kind, self.now())
        if problem.is_quiet or problem.kind in self._told:
            return None
        self._told.add(problem.kind)
        return problem.why

    def lasts_too_long(self, problem: Problem) -> bool:
        """Whether a noted problem has lasted longer than the user's patience."""
        return self.now() - self._since[problem.kind] > self.stage.pods.patience

    def _lasts(self, kind: str, seconds: float) -> bool:
        """Whether a problem of this kind was first seen so many seconds ago. The first look counts as seeing it."""
        return self.now() - self._since.setdefault(kind, self.now()) >= seconds

    def _explain_missing(self, job: Job, pods: Sequence[Pod]) -> Problem | None:
        """Why a Job has fewer pods than it should have."""
        there = [pod for pod in pods if is_live(pod) or pod.status.phase == "Succeeded"]
        if len(there) >= self.stage.pods.nodes:
            self._since.pop("creation", None)
            return None
        if not self._lasts("creation", CREATION):
            return None
        since = max(map(_creation, (job.metadata, *(pod.metadata for pod in pods))))
        lists = [self.read_events(name) for name in _list_makers(job, self.stage)]
        event = find_newest([event for events in lists for event in events or ()], since=since, about="Creat")
        if event is not None and event.type == "Warning":
            lacks, reason = "lacks a pod" if there else "gets no pod", explain_event(event)
            return Problem(
                f"creation {name_fault(event)}", f"{job.name} {lacks}: {reason}; {self._find_remedy(event.message)}"
            )
        if pods or not self._lasts("creation", SILENCE):
            return None  # a pod that failed is replaced after a pause, which grows
        why = "its events may not be read, for which k8s/base has the Role" if None in lists else "no event says why"
        look = name_command("describe", job.name, self.stage)
        return Problem("creation", f"{job.name} gets no pod, and {why}; see {look}")

    def _find_remedy(self, text: str) -> str:
        found = next((remedy for word, remedy in REMEDIES.items() if word in text), None)
        if found is not None:
            return found.format(self.stage.name)
        return f"mend what it names in the namespace {self.stage.cluster.namespace}, or correct execution.cluster"

    def _explain_creating(self, pods: Sequence[Pod]) -> Problem | None:
        """Why a pod has a node and yet its container is not even created: a volume or the network of the node."""
        for pod in pods:
            if not is_creating(pod) or not self._lasts(f"creating {pod.name}", SETTLING):
                continue
            event = find_newest(self.read_events(pod.name) or (), since=_creation(pod.metadata))
            if event is not None and event.reason in MOUNTING:
                why = f"pod {pod.name} cannot start: {event.reason}: {explain_event(event)}"
                return Problem(f"creating {event.reason}", f"{why}; {self._find_remedy(event.message)}")
        return None


def _list_makers(job: Job, stage: Stage) -> list[str]:
    """The objects that create the pods, one of the other. A JobSet creates a Job of its own for all nodes."""
    return [job.name, f"{job.name}-nodes-0"] if stage.is_set else [job.name]


def _creation(about: Metadata) -> datetime:
    return about.creation_timestamp or LONG_AGO
