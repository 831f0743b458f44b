"""A stage that its watch takes back: killed anywhere it ends with the same bits. Its best students are kept apart."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmdr.config.load import load_config
from dmdr.errors import ConfigError, DataError, InputMissing, NonFinite, Stopped
from dmdr.watch.figures import NON_FINITE, REWARD, select_looks
from dmdr.watch.watcher import Watcher
from flows.commands.export import export_form
from stages import joint
from stages.live.read import LiveReader
from stages.reports.provenance import WatchFacts, describe_watch
from stages.store.folder import Folder
from tests.support.trained_run import context_for, run_stage, seal_stage
from tests.support.training_results import digests, steps_saved

UPDATES = 8
TRAINING = {
    "updates": UPDATES,
    "batch_size": 2,
    "fake_updates": 2,
    "student": {"learning_rate": 1e-3},
    "fake_score": {"learning_rate": 1e-3},
}
DEAF = {  # no finite student sets these off
    "reward_drop": 9.0,
    "diversity_drop": 0.999,
    "saturation_rise": 999.0,
    "sharpness_drop": 0.999,
    "blank_rise": 0.999,
    "fake_lag": 999.0,
    "fake_rise": 999.0,
    "gradient_drop": 0.999,
}
WATCH = {"every": 2, "reward": "lab-mixer", "prompts": 3, "on_alarm": "recover", **DEAF}
REFL = {"algorithm": "refl", "weight": 5.0, "rewards": {"lab-conv": 1.0}}
STUDENTS = {"full": {"steps": 2}, "lora": {"steps": 2, "form": "lora", "lora_rank": 4}}


class Killed(BaseException):
    """What ends an attempt without a last word."""


class Bench:
    """Runs over prompts and a cold start that are made once; each in a store of its own."""

    def __init__(self, write: Callable[..., Path], folder: Path, student: dict) -> None:
        self.folder, self.write = folder, partial(write, student=student)
        for stage in ("prompts", "cold_start"):
            seal_stage(self.config(), folder / "begun", stage)

    def config(self, *, execution: dict | None = None, stage: str = "joint", rl: dict | None = REFL, **watch: object):
        training = {**TRAINING, "rl": rl, "watch": {**WATCH, **watch}}
        run = {"device": "cpu", "checkpoint_every": 3, **(execution or {})}
        begin = {**TRAINING, "updates": 1}
        sections = {"cold_start": training if stage == "cold_start" else begin}
        sections["joint"] = {**TRAINING, "rl": REFL} if stage == "cold_start" else training
        return load_config(self.write(**sections, execution=run))

    def store(self, name: str) -> Path:
        return Path(shutil.copytree(self.folder / "begun", self.folder / name))


@pytest.fixture
def bench(tiny_config, tmp_path) -> Bench:
    return Bench(tiny_config, tmp_path, STUDENTS["full"])


@pytest.fixture(params=STUDENTS)
def any_bench(request, tiny_config, tmp_path) -> Bench:
    return Bench(tiny_config, tmp_path, STUDENTS[request.param])


@pytest.fixture
def collapse(monkeypatch) -> Callable[..., None]:
    """Makes looks find a low reward at these updates, until the stage has gone back from each so often."""

    def at(*updates: int, times: int = 1, reward: float = -9.0) -> None:
        measure = Watcher.measure_look

        def look(self: Watcher, state, *, is_first: bool) -> dict:
            figures = measure(self, state, is_first=is_first)
            made = sum(recovery.update == state.update for recovery in state.recoveries)
            return figures | ({REWARD: reward} if state.update in updates and made < times else {})

        monkeypatch.setattr(Watcher, "measure_look", look)

    return at


def facts(store: Path, stage: str = "joint") -> dict:
    return json.loads((store / "tiny" / stage / "record.json").read_text())["facts"]


def rows(store: Path, stage: str = "joint") -> list[dict]:
    return [json.loads(line) for line in (store / "tiny" / stage / "metrics.jsonl").read_text().splitlines()]


def kill_after(calls: int) -> Callable[[], bool]:
    """Kills a stage when it has asked so often whether to stop."""
    left = iter(range(calls))

    def ask() -> bool:
        if next(left, None) is None:
            raise Killed
        return False

    return ask


def test_a_recovery_goes_back_to_the_best_and_halves_what_the_alarm_names(any_bench, collapse, capfd):
    collapse(6)
    config, store = any_bench.config(recoveries=2), any_bench.store("run")
    run_stage(config, store, "joint")
    (recovery,) = facts(store)["watch"]["recoveries"]
    looks = {look["update"]: look for look in select_looks(rows(store))}
    best = max((0, 2, 4), key=lambda update: looks[update][REWARD])
    assert (recovery["update"], recovery["back_to"], recovery["figures"]) == (6, best, [REWARD])
    assert recovery["halved"] == ["rl"] and not recovery["ends"]
    series = rows(store)
    assert [row["update"] for row in series] == list(range(UPDATES + 1)), "each update once"
    assert [row.get("watch/recoveries") for row in series[:UPDATES]] == [None] * best + [1.0] * (UPDATES - best)
    assert {row["rl_weight"] for row in series[:best]} <= {5.0}
    assert {row["rl_weight"] for row in series[best:UPDATES]} == {2.5}
    line = next(line for line in capfd.readouterr().err.splitlines() if "ALARM" in line)
    assert f"goes back to update {best} and halves joint.rl.weight (recovery 1 of 2)" in line
    told = describe_watch(WatchFacts.model_validate(facts(store)["watch"]))
    assert f"{REWARD} at update 6: back to update {best}, halved RL's weight" in told


def test_recoveries_that_help_not_end_the_stage_at_its_best(bench, collapse):
    collapse(4, times=9)
    store = bench.store("run")
    run_stage(bench.config(recoveries=2), store, "joint")
    made = facts(store)["watch"]["recoveries"]
    assert [each["halved"] for each in made] == [["rl"], ["rl", "student"], []]
    assert [each["ends"] for each in made] == [False, False, True]
    best = made[-1]["back_to"]
    assert facts(store)["updates"] == facts(store)["watch"]["stopped"]["after_update"] == best < 4
    assert [row["update"] for row in rows(store)] == list(range(best + 1))
    alone = bench.store("short")
    short = {**TRAINING, "updates": max(1, best), "rl": REFL}
    run_stage(load_config(bench.write(cold_start={**TRAINING, "updates": 1}, joint=short)), alone, "joint")
    if best:
        name = "student_ema.safetensors"
        assert digests(store, "joint")[name] == digests(alone, "joint")[name]


def test_a_student_from_which_nothing_helps_is_left_for_the_first(bench, monkeypatch):
    """Update 2 is the best by far, and the look after it rings whatever was halved."""
    measure = Watcher.measure_look

    def look(self: Watcher, state, *, is_first: bool) -> dict:
        figures, made = measure(self, state, is_first=is_first), state.recoveries
        figures[REWARD] = {0: 0.0, 2: 1.0, 4: 0.9}.get(state.update, 0.95)
        return figures | ({REWARD: -9.0} if state.update == 4 and all(each.back_to for each in made) else {})

    monkeypatch.setattr(Watcher, "measure_look", look)
    store = bench.store("run")
    run_stage(bench.config(recoveries=5), store, "joint")
    made = facts(store)["watch"]["recoveries"]
    assert [(each["update"], each["back_to"]) for each in made] == [(4, 2), (4, 2), (4, 0)]
    assert [each["halved"] for each in made] == [["rl"], ["rl", "student"], ["rl", "student"]]
    assert [row["update"] for row in rows(store)] == list(range(UPDATES + 1)), "each update once"


def test_killed_anywhere_a_recovered_stage_ends_with_the_same_bits(any_bench, collapse):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    collapse(4, 6)
    config = any_bench.config(recoveries=3, keep_best=2)
    whole, broken = any_bench.store("whole"), any_bench.store("broken")
    run_stage(config, whole, "joint")
    assert len(facts(whole)["watch"]["recoveries"]) == 2
    for _ in range(3):
        with pytest.raises((Killed, Stopped)):
            calls = rng.randrange(2, 9)
            stop = kill_after(calls) if rng.random() < 0.7 else partial(next, iter([*[False] * calls, True]))
            joint.run(context_for(config, broken, "joint", stop=stop))
    run_stage(config, broken, "joint")
    assert digests(broken, "joint") == digests(whole, "joint")
    assert facts(broken) == facts(whole)


def test_killed_while_it_writes_a_checkpoint_it_ends_with_the_same_bits(bench, collapse, monkeypatch):
    """Kills at random writes and removals of files; some keep, replace or drop what a recovery goes back to."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    collapse(4, 6)
    config = bench.config(recoveries=3, keep_best=1, execution={"checkpoint_every": 1})
    whole, broken = bench.store("whole"), bench.store("broken")
    run_stage(config, whole, "joint")
    kills = 0
    for _ in range(4):
        left = [rng.randrange(1, 40)]

        def count(call: Callable, left: list[int] = left) -> Callable:
            def counted(self: Folder, *args: object, **kwargs: object) -> object:
                left[0] -= 1
                if not left[0]:
                    raise Killed
                return call(self, *args, **kwargs)

            return counted

        context = context_for(config, broken, "joint")
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "publish", count(Folder.publish))
            patch.setattr(Folder, "remove", count(Folder.remove))
            try:
                joint.run(context)
            except Killed:
                kills += 1
    assert kills
    run_stage(config, broken, "joint")
    assert digests(broken, "joint") == digests(whole, "joint")


def test_divergence_recovers_where_that_is_asked_for(bench, capfd):
    """The student's rate is so high that float32 overflows, and half of it still is."""
    wild = {"student": {"learning_rate": 3e37, "clip": 1.0, "weight_decay": 0.0}}
    quiet = {"on_alarm": "off", "on_divergence": "recover", "recoveries": 2}

    def config(**watch: object):
        training = {**TRAINING, **wild, "watch": {**WATCH, **watch}}
        return load_config(bench.write(cold_start={**TRAINING, "updates": 1}, joint=training))

    with pytest.raises(NonFinite):
        run_stage(config(on_alarm="off"), bench.store("fails"), "joint")
    store = bench.store("run")
    run_stage(config(**quiet), store, "joint")
    made = facts(store)["watch"]["recoveries"]
    assert [each["halved"] for each in made[:2]] == [["student", "fake_score"]] * 2
    assert made[-1]["ends"] and made[-1]["back_to"] == 0
    assert "goes back to update 0 and halves joint.student.learning_rate and joint.fake_score" in capfd.readouterr().err
    ema = load_file(store / "tiny/joint/student_ema.safetensors")
    assert all(value.isfinite().all() for value in ema.values()), "the student that went wrong is not the result"


def test_a_cold_start_is_watched_without_a_reward(bench, monkeypatch):
    """Its first look has the teacher's figures beside its own; the newest healthy look is the one to go back to."""
    measure = Watcher.measure_look

    def look(self: Watcher, state, *, is_first: bool) -> dict:
        figures = measure(self, state, is_first=is_first)
        return figures | ({NON_FINITE: 0.5} if state.update == 6 and not state.recoveries else {})

    config = bench.config(stage="cold_start", rl=None, reward=None)
    store = bench.folder / "cold"
    seal_stage(config, store, "prompts")
    monkeypatch.setattr(Watcher, "measure_look", look)
    run_stage(config, store, "cold_start")
    (recovery,) = facts(store, "cold_start")["watch"]["recoveries"]
    assert (recovery["update"], recovery["back_to"]) == (6, 4)
    assert recovery["halved"] == ["student", "fake_score"]
    first, *later = select_looks(rows(store, "cold_start"))
    assert {"watch/teacher_sharpness", "watch/teacher_saturation"} <= first.keys() and REWARD not in first
    assert not any(name.startswith("watch/teacher_") for row in later for name in row)
    assert all({"watch/fake_lag", "watch/fake_rise", "watch/gradient"} <= row.keys() for row in later)


def test_a_watched_cold_start_has_the_bits_of_an_unwatched_one(bench):
    watched, plain = bench.folder / "watched", bench.folder / "plain"
    config = bench.config(stage="cold_start", rl=None, reward=None)
    bare = load_config(bench.write(cold_start=TRAINING, joint={**TRAINING, "rl": REFL}))
    for store, each in ((watched, config), (plain, bare)):
        seal_stage(each, store, "prompts")
        run_stage(each, store, "cold_start")
    ours, theirs = digests(watched, "cold_start"), digests(plain, "cold_start")
    assert {name for name in theirs if ours[name] != theirs[name]} == {"metrics.jsonl"}
    stripped = [{key: row[key] for key in row if not key.startswith("watch/")} for row in rows(watched, "cold_start")]
    assert stripped == [*rows(plain, "cold_start"), {"update": UPDATES}]


def test_nothing_to_go_back_to_is_one_line(bench, monkeypatch):
    monkeypatch.setattr(Watcher, "measure", lambda self, draw=None: {NON_FINITE: 1.0})
    with pytest.raises(ConfigError, match=r"joint\.watch cannot recover at update 0 .*no checkpoint to go back"):
        run_stage(bench.config(), bench.store("run"), "joint")


def test_a_kept_checkpoint_that_is_gone_is_one_line(bench, collapse, monkeypatch):
    collapse(4)
    store = bench.store("run")
    context = context_for(bench.config(), store, "joint", stop=partial(next, iter([False] * 3 + [True])))
    with pytest.raises(Stopped):
        joint.run(context)
    for step in steps_saved(store, "joint") - {"step-00000003"}:
        shutil.rmtree(store / "tiny/joint/checkpoints" / step)
    with pytest.raises(DataError, match=r"checkpoint .*step-0000000\d was kept and is gone"):
        run_stage(bench.config(), store, "joint")


def test_the_best_students_are_kept_apart_and_exported(any_bench, capsys):
    config, store = any_bench.config(on_alarm="warn", keep_best=2), any_bench.store("run")
    run_stage(config, store, "joint")
    best = sorted(select_looks(rows(store)), key=lambda look: (-look[REWARD], look["update"]))[:2]
    kept = sorted(look["update"] for look in best)
    assert sorted(facts(store)["watch"]["kept"]) == kept
    assert sorted(name for name in digests(store, "joint") if name.startswith("kept/")) == [
        f"kept/update-{update:08d}.safetensors" for update in kept
    ]
    update = next(each for each in kept if each)
    short = any_bench.store("short")
    training = {**TRAINING, "updates": update, "rl": REFL}
    run_stage(load_config(any_bench.write(cold_start={**TRAINING, "updates": 1}, joint=training)), short, "joint")
    ours = load_file(store / f"tiny/joint/kept/update-{update:08d}.safetensors")
    theirs = load_file(short / "tiny/joint/student_ema.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    teacher, out = config.teacher.path, any_bench.folder / "out"
    arguments = {"teacher": teacher, "store": str(store)}
    with pytest.raises(InputMissing, match=rf"--update 7: .*did not keep its student; it kept those of {kept[0]}, "):
        export_form("tiny", "weights", str(out), **arguments, update=7)
    export_form("tiny", "weights", str(out), **arguments, update=update)
    assert f"the student of update {update}" in capsys.readouterr().out
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["update"] == update
    assert f"after update {update} of joint training" in (out / "weights/README.md").read_text()


def test_what_is_shown_is_of_the_course_that_goes_on(bench, collapse):
    collapse(6)
    live = {"live": {"metrics_every": 1, "strips_every": 2, "prompts": 3}}
    dark, lit = bench.store("dark"), bench.store("lit")
    run_stage(bench.config(), dark, "joint")
    run_stage(bench.config(execution=live), lit, "joint")
    assert digests(lit, "joint") == digests(dark, "joint")
    series = LiveReader(str(lit), "tiny", "joint").read()
    assert list(series.rows) == rows(lit), "each update once"
    assert series.strips == (0, 2, 4, 6, 8)
    assert series.status is not None and series.status.recoveries == 1
    assert [alarm.update for alarm in series.alarms] == [6], "and the alarm stays"
