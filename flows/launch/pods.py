"""What the status of a pod says: why it waits, and how it ended."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from dmdr.errors import INTERNAL, MOST_TELLING
from flows.launch.manifest import CONTAINER, count_gpus
from flows.launch.objects import ContainerState, ContainerStatus, Pod
from flows.launch.stage import Stage

NO_NODE = "no node"
IMAGE = (  # reasons of a waiting container that time alone seldom mends
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
    "SignatureValidationFailed",
)
CONFIG = ("CreateContainerConfigError", "CreatePodSandboxConfigError")  # what the pod refers to is missing
CONTAINER_FAILS = (
    "CreateContainerError",
    "RunContainerError",
    "PreCreateHookError",
    "PreStartHookError",
    "PostStartHookError",
    "CreatePodSandboxError",
    "CrashLoopBackOff",
)
OUT_OF_MEMORY = "OOMKilled"
LONG_AGO = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Problem:
    """Why a Job does not run. kind: stays the same while the cluster words it in other ways. why: a clause with the
    remedy. is_quiet: it may pass by itself and is not told yet."""

    kind: str
    why: str
    is_quiet: bool = False

    def keep_quiet(self) -> Problem:
        """The same problem, not told yet."""
        return replace(self, is_quiet=True)


@dataclass(frozen=True)
class PodFailure:
    """How a pod ended badly. exit_code: of its container, 128 + n if signal n ended it."""

    exit_code: int
    why: str


def explain_waiting(pod: Pod, stage: Stage) -> Problem | None:
    """Why a pod does not run yet, with the remedy. None if it runs, or will run soon."""
    for condition in pod.status.conditions:
        if condition.type == "PodScheduled" and condition.status == "False":
            if condition.reason != "Unschedulable":
                return None  # a queue holds it back until its turn
            why = (
                f"no node takes pod {pod.name}, which asks for {describe_request(stage)}: "
                f"{_join_lines(condition.message)}; ask for less under execution.cluster.stages.{stage.name}, or add "
                "nodes"
            )
            return Problem(NO_NODE, why)
    return next((each for status in _all_statuses(pod) if (each := _explain_container(pod, status, stage))), None)


def _explain_container(pod: Pod, status: ContainerStatus, stage: Stage) -> Problem | None:
    waiting = status.state.waiting
    if waiting is None or waiting.reason not in (*IMAGE, *CONFIG, *CONTAINER_FAILS):
        return None
    message = _join_lines(waiting.message)
    which = "" if status.name == CONTAINER else f" container {status.name}, which the cluster has added:"
    problem = f"pod {pod.name} cannot start:{which} {waiting.reason}: {message}"
    if waiting.reason in IMAGE and status.name == CONTAINER:
        why = f"{problem}; see that {stage.pods.image} exists and execution.cluster.pull_secret may read it"
    else:
        why = f"{problem}; mend what it names in the namespace {stage.cluster.namespace}, or correct execution.cluster"
    if waiting.reason in CONFIG:  # another secret that is missing is another problem
        return Problem(f"config {status.name} {message}", why)
    return Problem(f"{'image' if waiting.reason in IMAGE else 'container'} {status.name}", why)


def explain_end(pod: Pod, stage: Stage) -> PodFailure | None:
    """How a pod ended badly; None if it did not."""
    end = _state(pod).terminated
    if end is None:
        if pod.status.phase == "Failed" and pod.status.reason:  # evicted before its container ran
            return PodFailure(INTERNAL, f"pod {pod.name}: {pod.status.reason}")
        return None
    if not end.exit_code:
        return None
    if end.reason == OUT_OF_MEMORY:
        why = (
            f"pod {pod.name} was killed for memory: it may use {stage.pods.memory}, including up to "
            f"{stage.pods.shared_memory} of shared memory; raise execution.cluster.stages.{stage.name}.memory, or use "
            "less with execution.micro_batch_size"
        )
        return PodFailure(end.exit_code, why)
    return PodFailure(end.exit_code, f"pod {pod.name} ended with exit code {end.exit_code}")


def explain_worst(pods: Iterable[Pod], stage: Stage) -> PodFailure | None:
    """The failure that tells most, and of several such the newest; None if no pod ended badly."""
    newest_first = sorted(pods, key=lambda pod: pod.metadata.creation_timestamp or LONG_AGO, reverse=True)
    failures = [failure for pod in newest_first if (failure := explain_end(pod, stage)) is not None]
    rank = {code: place for place, code in enumerate(MOST_TELLING)}
    return min(failures, key=lambda failure: rank.get(failure.exit_code, len(rank)), default=None)


def describe_request(stage: Stage) -> str:
    """What a pod asks of a node, for people."""
    wanted = f"{count_gpus(stage)} {stage.pods.gpu_resource}, " if count_gpus(stage) else ""
    return f"{wanted}{stage.pods.cpu} CPUs, {stage.pods.memory} of memory and {stage.pods.scratch} of disk"


def has_log(pod: Pod) -> bool:
    """Whether its container has started, so that there may be a log."""
    return pod.status.phase in ("Succeeded", "Failed") or _state(pod).running is not None


def is_live(pod: Pod) -> bool:
    """Whether it runs, will run, or is still ending."""
    return pod.status.phase not in ("Succeeded", "Failed")


def is_ending(pod: Pod) -> bool:
    """Whether it was deleted and still holds its node's resources."""
    return pod.metadata.deletion_timestamp is not None and is_live(pod)


def is_creating(pod: Pod) -> bool:
    """Whether it has a node, which still prepares volumes and network or pulls the image."""
    waits = any(status.state.waiting is not None for status in _all_statuses(pod))
    return pod.status.phase == "Pending" and waits and pod.metadata.deletion_timestamp is None


def is_up(pod: Pod) -> bool:
    """Whether its container runs, or has ended well."""
    return pod.status.phase == "Succeeded" or (is_live(pod) and _state(pod).running is not None)


def _all_statuses(pod: Pod) -> tuple[ContainerStatus, ...]:
    """Of the stage's container first, then of those that the cluster has added."""
    statuses = (*pod.status.container_statuses, *pod.status.init_container_statuses)
    return tuple(sorted(statuses, key=lambda status: status.name != CONTAINER))


def _state(pod: Pod) -> ContainerState:
    """Of the container that runs the stage; there may be others beside it, which the cluster has added."""
    states = [status.state for status in pod.status.container_statuses if status.name == CONTAINER]
    return states[0] if states else ContainerState()


def _join_lines(message: str | None) -> str:
    return " ".join((message or "no reason was given").split()).rstrip(".;")
