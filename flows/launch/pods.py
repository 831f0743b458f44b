"""What the pods of a stage say of themselves: why one waits, and how one ended. All from its status, as plain data."""

from __future__ import annotations

from dmdr.errors import INTERNAL, MOST_TELLING
from flows.launch.manifest import CONTAINER, count_gpus
from flows.launch.stage import Stage

STUCK = (  # reasons of a waiting container that time alone seldom mends
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
)
OUT_OF_MEMORY = "OOMKilled"


def explain_waiting(pod: dict, stage: Stage) -> str | None:
    """Why a pod does not run yet, as one clause with the remedy; None if it runs, or is simply on its way."""
    for condition in pod["status"].get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            if condition.get("reason") != "Unschedulable":
                return None  # held back by a queue, which is its turn's business
            return (
                f"no node takes pod {_name(pod)}, which asks for {describe_request(stage)}: "
                f"{_line(condition.get('message'))}; ask for less under execution.cluster.stages.{stage.name}, or add "
                "nodes"
            )
    state = _state(pod).get("waiting", {})
    if state.get("reason") not in STUCK:
        return None
    said = f"pod {_name(pod)} cannot start: {state['reason']}: {_line(state.get('message'))}"
    if "Image" in state["reason"] or "Pull" in state["reason"]:
        return f"{said}; see that {stage.pods.image} exists and execution.cluster.pull_secret may read it"
    return f"{said}; mend what it names in the namespace {stage.cluster.namespace}, or correct execution.cluster"


def explain_end(pod: dict, stage: Stage) -> tuple[int, str] | None:
    """The exit code of a pod that ended badly and what is known of it; None if it has not."""
    state = _state(pod).get("terminated")
    if state is None:
        reason = pod["status"].get("reason")  # evicted before its container left a word
        return (INTERNAL, f"pod {_name(pod)}: {reason}") if pod["status"].get("phase") == "Failed" and reason else None
    if not state["exitCode"]:
        return None
    if state.get("reason") == OUT_OF_MEMORY:
        return state["exitCode"], (
            f"pod {_name(pod)} was killed for memory: it may use {stage.pods.memory}, shared memory of up to "
            f"{stage.pods.shared_memory} with it; raise execution.cluster.stages.{stage.name}.memory, or take less "
            "with execution.micro_batch_size"
        )
    return state["exitCode"], f"pod {_name(pod)} ended with exit code {state['exitCode']}"


def explain_worst(pods: list[dict], stage: Stage) -> tuple[int, str] | None:
    """Of the pods that ended badly, the one that tells most, the newest of its kind."""
    newest_first = sorted(pods, key=lambda pod: pod["metadata"].get("creationTimestamp") or "", reverse=True)
    found = [end for pod in newest_first if (end := explain_end(pod, stage)) is not None]
    rank = {code: place for place, code in enumerate(MOST_TELLING)}
    return min(found, key=lambda end: rank.get(end[0], len(rank)), default=None)


def describe_request(stage: Stage) -> str:
    """What a pod asks of a node, for people."""
    wanted = f"{count_gpus(stage)} {stage.pods.gpu_resource}, " if count_gpus(stage) else ""
    return f"{wanted}{stage.pods.cpu} CPUs, {stage.pods.memory} of memory and {stage.pods.scratch} of disk"


def is_over(pod: dict) -> bool:
    return pod["status"].get("phase") in ("Succeeded", "Failed")


def has_begun(pod: dict) -> bool:
    """Whether there may be a log."""
    return is_over(pod) or "running" in _state(pod)


def _state(pod: dict) -> dict:
    for status in pod["status"].get("containerStatuses") or []:
        if status["name"] == CONTAINER:
            return {kind: state for kind, state in (status.get("state") or {}).items() if state is not None}
    return {}


def _name(pod: dict) -> str:
    return pod["metadata"]["name"]


def _line(message: str | None) -> str:
    return " ".join((message or "no word why").split()).rstrip(".;")
