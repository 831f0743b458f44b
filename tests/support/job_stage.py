"""A stage of a quick run as a Job, and what is asked of it, for tests of the launcher."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.launch import kubernetes, waiting
from flows.launch.failure import StageFailed
from flows.launch.stage import Stage, prepare_stage
from stages.store.artifacts import Artifact
from tests.support.fake_cluster.server import QUICK, Cluster

RATE = {"learning_rate": 1e-4}
TRAINING = {"updates": 2, "batch_size": 16, "fake_updates": 5, "student": RATE, "fake_score": RATE}
TWO_NODES = {"cold_start": {"nodes": 2}, "joint": {"nodes": 2}}


@pytest.fixture
def watches_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "POLL", 1)
    monkeypatch.setattr(waiting, "CREATION", 0.2)
    monkeypatch.setattr(waiting, "SETTLING", 0.5)


@pytest.fixture
def stage(tiny_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Stage]:
    """A stage of a quick run whose store is a folder that pods see; keywords change what the cluster is asked for."""

    def made(which: str = "prompts", environment: dict[str, str] | None = None, run: str = "tiny", **asked) -> Stage:
        claims = {str(tmp_path.parent): "everything"}
        about = {"image": QUICK, "environment": environment or {}, "claims": claims, "grace": 5, **asked}
        config = tiny_config(execution={"device": "cpu", "cluster": about}, cold_start=TRAINING, joint=TRAINING)
        return prepare_stage(which, str(config), run, str(tmp_path / "store"))

    return made


def launched(stage: Stage, **more) -> list[str]:
    """Run a stage; what was said."""
    said: list[str] = []
    artifact = Artifact(stage.store, stage.run, stage.name)
    kubernetes.run_job(stage, say=said.append, sealed=lambda: artifact.record() is not None, **more)
    return said


def failed(stage: Stage, **more) -> StageFailed:
    with pytest.raises(StageFailed) as failure:
        launched(stage, **more)
    assert "\n" not in str(failure.value)
    return failure.value


def jobs(cluster: Cluster) -> list[str]:
    return [each["metadata"]["name"] for each in cluster.objects.list("jobs")[0]]


def until(holds: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)
