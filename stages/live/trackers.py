"""Trackers that people have: TensorBoard, Weights & Biases and MLflow get scalars, strips, settings and the address.

1. accelerate's trackers are not taken: each of their calls makes a PartialState, which reads the environment of our
   ranks and joins a group of processes of its own.
2. Each tracker works in a thread of its own (`background.py`): one that hangs holds up nobody. What it lacks, such as
   its package, a login or a server, is one line, and the stage trains on.
3. Steps are the finished updates of the stage, those of the fake score alone included. A resumed stage goes on in the
   same run of the tracker. TensorBoard purges what was logged after the checkpoint; the others are told no step twice.
   So it is where a watch takes a stage back.
"""

from __future__ import annotations

import hashlib
import netrc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from dmdr.config.execution import TrackerName
from stages.runtime.background import Background, describe

PROJECT = "dmdr"  # of Weights & Biases, and the experiment of MLflow
LAST = 10.0  # seconds that the end of a stage waits for its trackers


@dataclass(frozen=True)
class TrackedStage:
    """What a tracker is told of a stage when it begins.

    step: that it goes on after. settings: that name its result. folder: for files of trackers without a server.
    recoveries: how often its watch has taken it back.
    """

    run: str
    stage: str
    address: str
    step: int
    settings: Mapping[str, object]
    folder: Path
    recoveries: int = 0

    @property
    def key(self) -> str:
        """The same for every attempt of the stage, and for no other stage."""
        return hashlib.sha256(self.address.encode()).hexdigest()[:16]


class Tracker(Protocol):
    """One tracker. Its methods raise what they like."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of the stage after `step` updates."""

    def show(self, step: int, name: str, images_P: np.ndarray, prompts: Sequence[str]) -> None:
        """Take images (P, H, W, 3) uint8, one of each prompt."""

    def finish(self, *, is_finished: bool) -> None:
        """Write what is left. is_finished: the stage reached its end; else it was stopped."""


class TensorBoard:
    """Event files at FOLDER/tensorboard/RUN/STAGE."""

    def __init__(self, stage: TrackedStage) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = stage.folder / "tensorboard" / stage.run / stage.stage
        is_new = not (stage.step or stage.recoveries)
        self._writer = SummaryWriter(str(place), purge_step=None if is_new else stage.step + 1)
        if is_new:
            lines = [f"address: {stage.address}", *(f"{key}: {value}" for key, value in stage.settings.items())]
            self._writer.add_text("settings", "\n".join(f"    {line}" for line in lines), 0)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def show(self, step: int, name: str, images_P: np.ndarray, prompts: Sequence[str]) -> None:
        self._writer.add_image(name, np.concatenate(list(images_P), axis=1), step, dataformats="HWC")
        self._writer.flush()

    def finish(self, *, is_finished: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; offline, in FOLDER/wandb, where nobody has logged in and WANDB_MODE says nothing."""

    def __init__(self, stage: TrackedStage) -> None:
        import wandb

        self._wandb = wandb
        stage.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=stage.key,
            name=f"{stage.run}/{stage.stage}",
            group=stage.run,
            config={"address": stage.address, **stage.settings},
            resume="allow",
            dir=str(stage.folder),
            mode=None if os.environ.get("WANDB_MODE") or has_wandb_login() else "offline",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def show(self, step: int, name: str, images_P: np.ndarray, prompts: Sequence[str]) -> None:
        pictures = [self._wandb.Image(image, caption=prompt) for image, prompt in zip(images_P, prompts, strict=True)]
        self._run.log({name: pictures}, step=step)

    def finish(self, *, is_finished: bool) -> None:
        self._run.finish(exit_code=0 if is_finished else 1)


def has_wandb_login() -> bool:
    """Whether this machine knows a key of Weights & Biases; without one its library would ask for it."""
    if "WANDB_API_KEY" in os.environ:
        return True
    with suppress(OSError, netrc.NetrcParseError):
        return any("wandb" in host for host in netrc.netrc().hosts)
    return False


class MLflow:
    """A run of MLflow: of the server that MLFLOW_TRACKING_URI names, or in FOLDER/mlflow.db."""

    def __init__(self, stage: TrackedStage) -> None:
        from mlflow import MlflowClient

        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:
            stage.folder.mkdir(parents=True, exist_ok=True)
            folder = stage.folder.resolve()
            uri, artifacts = f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlflow-artifacts").as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name, artifacts) if found is None else found.experiment_id
        earlier = self._client.search_runs([experiment], f"tags.`dmdr.key` = '{stage.key}'", max_results=1)
        tags = {"dmdr.key": stage.key, "dmdr.address": stage.address}
        run = (
            earlier[0]
            if earlier
            else self._client.create_run(experiment, tags=tags, run_name=f"{stage.run}/{stage.stage}")
        )
        self._id = run.info.run_id
        self._last = int(run.data.metrics.get("step", 0))  # that an earlier attempt has logged
        self._client.update_run(self._id, status="RUNNING")
        if not earlier:
            self._client.log_dict(self._id, {"address": stage.address, **stage.settings}, "settings.json")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        if step > self._last:
            now = int(1000 * time.time())
            metrics = [Metric(name, value, now, step) for name, value in {**figures, "step": float(step)}.items()]
            self._client.log_batch(self._id, metrics=metrics)

    def show(self, step: int, name: str, images_P: np.ndarray, prompts: Sequence[str]) -> None:
        joined = Image.fromarray(np.concatenate(list(images_P), axis=1))
        self._client.log_image(self._id, joined, artifact_file=f"{name}/{step:08d}.png")

    def finish(self, *, is_finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if is_finished else "KILLED")


TrackerWork = Callable[[Tracker], object]
Say = Callable[[str], None]
KINDS: Mapping[TrackerName, type[TensorBoard] | type[WeightsAndBiases] | type[MLflow]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


class Tracking:
    """The trackers of one stage. say: takes the line of one that fails; it is then left alone."""

    def __init__(self, names: Sequence[TrackerName], stage: TrackedStage, say: Say) -> None:
        self._threads = [_Thread(name, stage, say) for name in names]

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Pass on the metrics row of an update."""
        figures = {name: value for name, value in row.items() if name != "update" and np.isfinite(value)}
        for thread in self._threads:
            thread.do(f"log {step}", lambda tracker: tracker.log(step, figures))

    def show(self, step: int, name: str, images_P: np.ndarray, prompts: Sequence[str]) -> None:
        """Pass on a strip."""
        for thread in self._threads:
            # one that waits is replaced: a tracker that hangs must not fill the memory
            thread.do(f"show {name}", lambda tracker: tracker.show(step, name, images_P, prompts))

    def finish(self, *, is_finished: bool) -> None:
        """Let them write what is left; together they have LAST seconds."""
        for thread in self._threads:
            thread.do("finish", lambda tracker: tracker.finish(is_finished=is_finished))
        until = time.monotonic() + LAST
        for thread in self._threads:
            thread.end(max(0.0, until - time.monotonic()))


class _Thread:
    """One tracker and its thread."""

    def __init__(self, name: TrackerName, stage: TrackedStage, say: Say) -> None:
        self._name, self._say = name, say
        self._tracker: Tracker | None = None
        self._is_broken = False
        self._background = Background(name, say, most=512)
        self._background.put("begin", partial(self._begin, stage))

    def do(self, what: str, work: TrackerWork) -> None:
        self._background.put(what, partial(self._guard, work))

    def end(self, seconds: float) -> None:
        self._background.end(seconds)

    def _begin(self, stage: TrackedStage) -> None:
        try:
            self._tracker = KINDS[self._name](stage)
        except ImportError:
            self._give_up(f"its package is not installed here; pip install 'dmdr[{self._name}]' adds it")
        except BaseException as error:  # wandb raises SystemExit's kin where nobody has logged in
            self._give_up(describe(error))

    def _guard(self, work: TrackerWork) -> None:
        if self._tracker is None or self._is_broken:
            return
        try:
            work(self._tracker)
        except Exception as error:
            self._give_up(describe(error))

    def _give_up(self, reason: str) -> None:
        self._is_broken = True
        self._say(f"tracker {self._name} is left out ({reason}); training goes on")
