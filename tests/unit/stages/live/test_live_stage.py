"""An open training stage shows itself, and trains as if it did not: in this process, on tiny networks."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dmdr.config.load import load_config
from dmdr.errors import BudgetSpent, NonFinite, Stopped, StoreError
from stages import joint
from stages.__main__ import check_budget
from stages.live import stage as live_stage
from stages.live.layout import Status, choose_kept
from stages.live.read import LiveReader
from stages.live.writer import Writer
from stages.store.artifacts import Artifact
from stages.store.folder import Folder
from tests.support.trained_run import context_for, run_stage
from tests.support.training_results import digests, steps_saved

UPDATES = 6
TRAINING = {
    "updates": UPDATES,
    "batch_size": 2,
    "fake_updates": 2,
    "student": {"learning_rate": 1e-3},
    "fake_score": {"learning_rate": 1e-3},
}
LOUD = {
    "every": 2,
    "reward": "lab-mixer",
    "prompts": 3,
    "diversity_drop": 1e-9,
    "reward_drop": 1e-9,
    "saturation_rise": 1e-9,
}
LIVE = {"metrics_every": 1, "strips_every": 2, "prompts": 3, "scores": True}
STUDENTS = {"full": {"steps": 2}, "lora": {"steps": 2, "form": "lora", "lora_rank": 4}}


class Begun:
    """Runs over prompts and a cold start that are made once; each in a store of its own."""

    def __init__(self, write: Callable[..., Path], folder: Path, student: dict) -> None:
        self.folder = folder
        rl = {"algorithm": "refl", "weight": 5.0, "rewards": {"lab-conv": 1.0}}
        self.write = partial(write, student=student, joint={**TRAINING, "rl": rl, "watch": LOUD})
        for stage in ("prompts", "cold_start"):
            run_stage(load_config(self.config(live=None)), folder / "begun", stage)

    def config(self, **execution: object) -> Path:
        return self.write(execution={"device": "cpu", "checkpoint_every": 2, **execution})

    def store(self, name: str) -> Path:
        return Path(shutil.copytree(self.folder / "begun", self.folder / name))

    def context(self, store: Path, *, stop: Callable[[], bool] = lambda: False, **execution: object):
        return context_for(load_config(self.config(**execution)), store, "joint", stop=stop)

    def run(self, name: str, **execution: object) -> Path:
        run_stage(load_config(self.config(**execution)), self.store(name), "joint")
        return self.folder / name


@pytest.fixture(params=STUDENTS)
def any_begun(request, tiny_config, tmp_path) -> Begun:
    return Begun(tiny_config, tmp_path, STUDENTS[request.param])


@pytest.fixture
def begun(tiny_config, tmp_path) -> Begun:
    return Begun(tiny_config, tmp_path, STUDENTS["full"])


def sealed_rows(store: Path) -> list[dict]:
    return [json.loads(line) for line in (store / "tiny/joint/metrics.jsonl").read_text().splitlines()]


def stop_after(calls: int) -> Callable[[], bool]:
    """Tells a stage to stop when it has asked so often."""
    left = iter(range(calls))
    return lambda: next(left, None) is None


def test_what_is_shown_changes_no_bit(any_begun):
    dark, lit = any_begun.run("dark", live=None), any_begun.run("lit", live=LIVE)
    assert digests(lit, "joint") == digests(dark, "joint")
    assert not (dark / "tiny/joint/live").exists()
    reader = LiveReader(str(lit), "tiny", "joint")
    series = reader.read()
    assert list(series.rows) == sealed_rows(lit), "each update once, and the watch's last look"
    assert series.status is not None and (series.status.state, series.status.step) == ("finished", UPDATES)
    assert series.strips == (0, 2, 4, 6) and series.has_teacher and len(series.prompts) == 3
    strips = [reader.read_strip(update) for update in series.strips]
    assert all(len(images) == 3 for images in (*strips, reader.read_teacher(), reader.read_strip(4, "fake")))
    assert any((a != b).any() for a, b in zip(strips[0], strips[-1], strict=True)), "the student has moved"
    looks = [row for row in sealed_rows(lit) if "watch/reward" in row]
    assert series.alarms and {alarm.update for alarm in series.alarms} <= {row["update"] for row in looks}


def test_a_resumed_stage_goes_on_without_gaps_or_doubles(begun):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    whole, broken = begun.run("whole", live=LIVE), begun.store("broken")
    live = broken / "tiny/joint/live"
    for updates in rng.sample((1, 2, 2), 3):
        with pytest.raises(Stopped):
            joint.run(begun.context(broken, stop=stop_after(updates), live=LIVE))
        # what a killed attempt shows beyond its checkpoint, and what a store that was away lacks
        (live / "rows-000001.jsonl").write_text('{"n": 100, "update": 100, "loss_dm": 1.0}\n')
        (live / "strips/update-00000098.png").write_bytes(b"no picture")
        for name in rng.sample(sorted(path.name for path in live.glob("*.json*")), 2):
            (live / name).unlink()
    (live / "strips/teacher.png").unlink(missing_ok=True)
    run_stage(load_config(begun.config(live=LIVE)), broken, "joint")
    assert digests(broken, "joint") == digests(whole, "joint")
    series = LiveReader(str(broken), "tiny", "joint").read()
    assert list(series.rows) == sealed_rows(whole)
    assert set(series.strips) <= {0, 2, 4, 6} and series.strips[-1] == 6
    assert series.has_teacher, "drawn anew"
    alarms = [(alarm.update, alarm.line) for alarm in series.alarms]
    assert len(alarms) == len(set(alarms))


def test_the_teachers_images_of_the_cold_start_serve_the_joint_stage(begun):
    store = begun.store("copied")
    writer = Writer(f"{store}/tiny/cold_start/live", load_config(begun.config(live=LIVE)).execution.live)
    prompts = LiveReader(str(begun.run("drawn", live=LIVE)), "tiny", "joint").read().prompts
    drawn = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    writer.resume([], 0, prompts)
    writer.write_teacher(drawn)
    run_stage(load_config(begun.config(live=LIVE)), store, "joint")
    reader = LiveReader(str(store), "tiny", "joint")
    assert reader.read().has_teacher and (np.stack(reader.read_teacher()) == drawn).all()


def test_a_store_that_is_away_costs_nothing_but_the_picture(begun, monkeypatch, capfd):
    dark = begun.run("dark", live=None)

    def be_away(*_: object) -> None:
        raise StoreError("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_publish", be_away)
        patch.setattr(live_stage, "LAST", 0.2)
        lit = begun.run("lit", live=LIVE)
    assert digests(lit, "joint") == digests(dark, "joint")
    lines = [line for line in capfd.readouterr().err.splitlines() if "away" in line]
    assert lines == ["joint: live page fails (the store is away); training goes on, and it is tried again"]


def test_other_settings_take_an_address_that_only_shows_something(begun):
    store = begun.store("shown")
    context = begun.context(store, live=LIVE)
    Writer(f"{context.artifact.address}/live", context.config.execution.live).write_status(
        Status(state="running", at=1.0, began=0.0, step=1, steps=6, update=1, updates=6)
    )
    context.artifact.place = Folder(Path(context.artifact.address))
    other = Artifact(str(store), "tiny", "joint")
    assert other.claim({"seed": 4}, {"teacher": "0" * 64}) is None
    assert not (Path(other.address) / "live").exists(), "what belongs to other settings is gone"
    Writer(f"{other.address}/live", context.config.execution.live).write_status(
        Status(state="running", at=1.0, began=0.0, step=1, steps=6, update=1, updates=6)
    )
    other.delete()
    assert not list(Path(other.address).glob("live/*")), "and goes with its stage"


def test_a_budget_stops_after_a_checkpoint_and_goes_on_when_raised(begun):
    price = {"currency": "EUR", "hour": {"cpu": 3600.0}}  # a EUR a second
    dark, store = begun.run("dark", live=None), begun.store("poor")
    with pytest.raises(Stopped):
        joint.run(begun.context(store, stop=stop_after(2), price=price))
    spent = json.loads((store / "tiny/joint/checkpoints/spent.json").read_text())["device_s"]["cpu"]
    assert spent > 0
    context = begun.context(store, price=price, budget=spent / 2)
    with pytest.raises(BudgetSpent, match=r"stopped after update 2 of 6: the run has cost .* EUR and execution.budget"):
        joint.run(context)
    with pytest.raises(BudgetSpent, match="stopped before it began"):
        check_budget(context.config, context.artifact)
    assert steps_saved(store, "joint") == {"step-00000002"}
    run_stage(load_config(begun.config(price=price, budget=1e9)), store, "joint")
    assert digests(store, "joint") == digests(dark, "joint")


@pytest.mark.parametrize("keep", [2, 3, 5, 8])
def test_strips_that_are_kept_cover_the_whole_training(keep):
    known: set[int] = set()
    for update in range(0, 640, 10):
        known = choose_kept({*known, update}, every=10, keep=keep)
        assert len(known) <= keep and {0, update} <= known
        assert len({after - before for before, after in pairwise(sorted(known - {update}))}) <= 1, sorted(known)


def test_a_stage_that_fails_says_so(begun):
    store, rates = begun.store("fails"), {"student": {"learning_rate": 1e30}}
    config = begun.write(joint={**TRAINING, **rates}, execution={"device": "cpu", "live": LIVE})
    with pytest.raises(NonFinite):
        joint.run(context_for(load_config(config), store, "joint"))
    series = LiveReader(str(store), "tiny", "joint").read()
    assert series.status is not None and series.status.state == "failed"
