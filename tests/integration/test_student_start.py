"""A run whose joint stage begins at a few-step model: the export of another run, without a cold start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmdr.config.load import load_config
from dmdr.config.run import Config
from dmdr.errors import ConfigError, DataError, Stopped
from flows import chain
from flows.commands.dry_run import print_steps
from flows.commands.plan import print_plan
from flows.commands.render import print_job
from flows.commands.run import RunOptions, run_config
from stages import joint as joint_stage
from stages.store.artifacts import Artifact
from stages.store.sealed_settings import rebuild_config
from tests.support.stage_process import command, finish
from tests.support.trained_run import (
    WEIGHTS,
    context_for,
    full_student,
    lora_student,
    run_stage,
    seal_stage,
    trained_run,
)
from tests.support.training_results import assert_same, results

TRAINING = {
    "updates": 3,
    "batch_size": 2,
    "fake_updates": 2,
    "student": {"learning_rate": 1e-4},
    "fake_score": {"learning_rate": 2e-3},
    "rl": {"algorithm": "refl", "weight": 0.5, "rewards": {"lab-conv": 1.0}},
}
WARMUP = 4
LORA = {"form": "lora", "lora_rank": 4}
LOSSES = ("loss_fake", "loss_teacher")


@pytest.fixture
def exported(tiny_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Exports another run's student and returns the folder of its forms, as `dmdr pull` copies them."""

    def export(**student: object) -> Path:
        config = load_config(tiny_config(student={"steps": 2, **student}, export={"dtype": "float32"}, run="before"))
        store = trained_run(config, tmp_path / "before")
        return seal_stage(config, store, "export")

    return export


@pytest.fixture(scope="session")
def full_start(tmp_path_factory: pytest.TempPathFactory, tiny_sd3_folder: Path) -> Path:
    """A few-step model: the file of a network."""
    return full_student(tmp_path_factory.mktemp("start"), tiny_sd3_folder, 0.01) / WEIGHTS


@pytest.fixture(scope="session")
def lora_start(tmp_path_factory: pytest.TempPathFactory, tiny_sd3_folder: Path) -> Path:
    """The file of a LoRA."""
    return lora_student(tmp_path_factory.mktemp("start"), tiny_sd3_folder) / WEIGHTS


@pytest.fixture
def improving(tiny_config: Callable[..., Path]) -> Callable[..., Config]:
    """The config of a run that begins at a start."""

    def write(path: Path, *, student: dict[str, object] | None = None, **changes: object) -> Config:
        given = {
            "student": {"steps": 2, **(student or {}), "start": {"path": str(path)}},
            "cold_start": None,
            "joint": {**TRAINING, "fake_warmup": WARMUP},
            "evaluate": {"metrics": ["lab-mixer"], "batch_size": 4, "limit": 3},
            **changes,
        }
        return load_config(tiny_config(**given))

    return write


def stop_after(calls: int) -> Callable[[], bool]:
    """Asks to stop at the call of that number."""
    counted: Iterator[int] = iter(range(calls + 1))
    return lambda: next(counted, calls) >= calls


def test_the_whole_run(
    exported: Callable[..., Path], improving: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config, store = improving(exported()), tmp_path / "runs"
    for stage in config.stages:
        folder = run_stage(config, store, stage)
    rows = [json.loads(line) for line in (store / "tiny/joint/metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [-4, -3, -2, -1, 0, 1, 2]
    assert all(figure in row for row in rows[:WARMUP] for figure in LOSSES)
    assert rows[0]["loss_fake"] == pytest.approx(rows[0]["loss_teacher"], rel=1e-6)  # it begins at the teacher
    assert rows[3]["loss_fake"] < rows[3]["loss_teacher"]
    record = json.loads((store / "tiny/joint/record.json").read_text())
    assert record["facts"]["updates"] == 3
    assert record["facts"]["fake_warmup"]["updates"] == WARMUP
    assert "start" in record["inputs"] and "cold_start" not in record["inputs"]
    scorecard = json.loads((folder / "scorecard.json").read_text())
    assert [model["name"] for model in scorecard["models"]] == ["student", "teacher", "naive teacher", "start"]
    html = (folder / "report.html").read_text()
    assert "fresh samples of the student" in html and "loss_teacher" in html
    assert "the model that it started from" in html
    facts = json.loads((store / "tiny/export/provenance.json").read_text())
    assert facts["start"]["name"] == "export" and facts["start"]["digest"] == record["inputs"]["start"]
    assert str(tmp_path) not in json.dumps(facts)
    assert "started from `export`" in (store / "tiny/export/pipeline/README.md").read_text()


def test_killed_in_the_warmup_and_after_it_ends_with_the_same_bits(
    full_start: Path, improving: Callable[..., Config], tmp_path: Path
) -> None:
    config = improving(full_start)
    seal_stage(config, tmp_path / "whole", "prompts")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    run_stage(config, tmp_path / "whole", "joint")
    for calls, words in ((2, "update 2 of 4 of the fake score alone"), (2, "stopped after update 0"), (2, "update 2")):
        context = context_for(config, tmp_path / "killed", "joint", stop=stop_after(calls))
        with pytest.raises(Stopped, match=words):
            joint_stage.run(context)
    run_stage(config, tmp_path / "killed", "joint")
    (weights, rows), (expected, expected_rows) = (results(tmp_path / name, "joint") for name in ("killed", "whole"))
    assert rows == expected_rows
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_student_does_not_move_while_the_fake_score_warms_up(
    full_start: Path, improving: Callable[..., Config], tmp_path: Path
) -> None:
    config = improving(full_start)
    seal_stage(config, tmp_path / "runs", "prompts")
    context = context_for(config, tmp_path / "runs", "joint", stop=stop_after(WARMUP))
    with pytest.raises(Stopped):
        joint_stage.run(context)
    newest = context.artifact.checkpoints(2).newest()
    network = load_file(full_start)
    ema = {name.removeprefix("ema/"): newest.tensors[name] for name in newest.tensors if name.startswith("ema/")}
    assert ema and all(torch.equal(value, network[name]) for name, value in ema.items())
    assert newest.info["update"] == 0 and newest.info["warmup"] == WARMUP


def test_a_lora_goes_on_to_its_own_export(
    exported: Callable[..., Path], improving: Callable[..., Config], tmp_path: Path
) -> None:
    config, store = improving(exported(**LORA), student=LORA), tmp_path / "runs"
    for stage in ("prompts", "joint", "export"):
        folder = run_stage(config, store, stage)
    assert (folder / "lora").is_dir() and (folder / "pipeline").is_dir()
    records = {stage: Artifact(str(store), "tiny", stage).record() for stage in ("prompts", "joint", "export")}
    again = rebuild_config(records, "tiny", config.teacher.path, ("lora",))
    assert again.cold_start is None and again.student.start is not None


def test_another_start_is_another_result(
    full_start: Path, lora_start: Path, improving: Callable[..., Config], tmp_path: Path
) -> None:
    store = tmp_path / "runs"
    config = improving(full_start)
    seal_stage(config, store, "prompts")
    context_for(config, store, "joint")
    (store / "tiny/joint/checkpoints").mkdir()
    (store / "tiny/joint/checkpoints/note").write_text("work was done here")
    shutil.copy(full_start, tmp_path / "moved.safetensors")
    context_for(improving(tmp_path / "moved.safetensors"), store, "joint")  # another place, the same content
    with pytest.raises(ConfigError, match="start"):
        context_for(improving(lora_start), store, "joint")


def test_commands_know_that_there_is_no_cold_start(
    full_start: Path, improving: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    store = str(tmp_path / "runs")
    config, path = improving(full_start), str(tmp_path / "tiny.yaml")
    assert print_steps(config, "tiny", store, None, None) == 0
    assert "cold_start" not in capsys.readouterr().out
    for options in (RunOptions(store=store, until="cold_start"), RunOptions(store=store, cold_start_of="other")):
        with pytest.raises(ConfigError, match="cold_start: null"):
            run_config(path, options)
    assert print_plan(path, "h100-80") == 0
    out = capsys.readouterr().out
    assert "of the fake score alone" in out and "cold_start" not in out
    ran: list[str] = []
    chain.distil(lambda name, *rest, **more: ran.append(name), path, "tiny", store)
    assert ran == ["prompts", "joint", "export", "evaluate"]
    with pytest.raises(ConfigError, match="cold_start"):
        print_job(path, "cold_start", None, store, 0)


def test_a_start_that_does_not_fit_is_refused_before_the_teacher_is_loaded(
    full_start: Path, improving: Callable[..., Config], tiny_sdxl_folder: Path, tmp_path: Path
) -> None:
    for config, error in (
        (improving(tiny_sdxl_folder), DataError),
        (improving(full_start, student=LORA), ConfigError),
    ):
        with pytest.raises(error, match="student.start.path"):
            run_stage(config, tmp_path / f"runs-{error.__name__}", "prompts")
    assert print_steps(improving(tiny_sdxl_folder), "tiny", str(tmp_path / "none"), None, None) == 65


def test_a_cold_start_may_begin_there_too(full_start: Path, improving: Callable[..., Config], tmp_path: Path) -> None:
    cold = {key: value for key, value in TRAINING.items() if key != "rl"}
    config = improving(full_start, cold_start=cold, joint=TRAINING)
    for stage in ("prompts", "cold_start", "joint"):
        run_stage(config, tmp_path / "runs", stage)
    inputs = {
        stage: json.loads((tmp_path / "runs/tiny" / stage / "record.json").read_text())["inputs"]
        for stage in ("cold_start", "joint")
    }
    assert "start" in inputs["cold_start"] and "start" not in inputs["joint"]


@pytest.mark.process
def test_two_ranks_with_split_weights_end_where_one_does(
    full_start: Path, improving: Callable[..., Config], tmp_path: Path
) -> None:
    joint = {**TRAINING, "batch_size": 4, "fake_updates": 3, "fake_warmup": 2}
    one = improving(full_start, joint=joint)
    seal_stage(one, tmp_path / "one", "prompts")
    shutil.copytree(tmp_path / "one/tiny/prompts", tmp_path / "two/tiny/prompts")
    run_stage(one, tmp_path / "one", "joint")
    execution = {"device": "cpu", "checkpoint_every": 1, "processes": 2, "sharding": "fsdp"}
    improving(full_start, joint=joint, execution=execution)
    finish(command("joint", tmp_path / "tiny.yaml", tmp_path / "two"))
    assert_same(tmp_path / "two", tmp_path / "one", "joint")
