"""A pipeline of diffusers on the scorecard: the teacher's own pipeline draws what our sampler draws."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline

from dmdr.config.identity import identity
from dmdr.config.load import load_config
from dmdr.errors import ConfigError, DataError, InputMissing
from dmdr.teacher.load import digest_teacher
from stages.evaluation.samples import unpack
from tests.support.trained_run import run_stage, seal_stage, trained_run


def images(folder: Path, model: str) -> np.ndarray:
    return np.concatenate([each.images for each in unpack(folder / "samples" / f"{model}-00000.tar")]).astype(int)


def others(tiny_config, path: object, *, models: tuple[str, ...] = ("teacher",), **settings: object) -> Path:
    pipelines = {"Other 1.0": {"path": str(path), "steps": 3, "guidance_scale": 3.0, **settings}}
    return tiny_config(
        evaluate={"metrics": ["lab-mixer"], "batch_size": 4, "models": list(models), "pipelines": pipelines}
    )


def test_the_teachers_own_pipeline_draws_the_teachers_images(tiny_config, tiny_sd3_folder, tmp_path):
    """diffusers' sampler and text encoding beside ours, from the same noise."""
    config = load_config(others(tiny_config, tiny_sd3_folder))
    folder = run_stage(config, trained_run(config, tmp_path / "store"), "evaluate")
    assert np.abs(images(folder, "Other-1.0") - images(folder, "teacher")).max() <= 1
    card = json.loads((folder / "scorecard.json").read_text())
    assert [(m["name"], m["steps"], m["nfe"]) for m in card["models"]] == [("teacher", 3, 6), ("Other 1.0", 3, 6)]
    (pair,) = card["paired"]
    assert (pair["a"], pair["b"]) == ("teacher", "Other 1.0") and abs(pair["difference"]) < 1e-4
    assert "Other 1.0" in (folder / "report.html").read_text()


def test_another_family_draws_its_own_noise(tiny_config, tiny_sdxl_folder, tmp_path):
    config = load_config(others(tiny_config, tiny_sdxl_folder, guidance_scale=1.0))
    store = trained_run(config, tmp_path / "store")
    folder = run_stage(config, store, "evaluate")
    found = images(folder, "Other-1.0")
    assert found.shape == images(folder, "teacher").shape
    assert len({each.tobytes() for each in found}) == len(found)
    card = json.loads((folder / "scorecard.json").read_text())
    assert [m["nfe"] for m in card["models"]] == [6, 3]


def test_what_counts_of_a_pipeline_is_what_it_holds(tiny_config, tiny_sd3_folder, tmp_path):
    config = load_config(others(tiny_config, tiny_sd3_folder))
    assert not any(key.endswith(".path") for key in identity(config, "evaluate"))
    assert identity(config, "evaluate")["evaluate.pipelines.Other 1.0.steps"] == 3
    plain = load_config(tiny_config())
    assert not any("pipelines" in key for key in identity(plain, "evaluate"))


@pytest.mark.parametrize(
    ("damage", "kind", "says"),
    [
        (lambda folder: folder.rename(folder.with_name("gone")), InputMissing, "no such folder"),
        (lambda folder: (folder / "model_index.json").unlink(), DataError, "has no model_index.json"),
        (
            lambda folder: next(folder.glob("transformer/*.safetensors")).write_bytes(b"no tensors"),
            DataError,
            "does not load",
        ),
    ],
)
def test_a_pipeline_that_is_not_whole_is_named(tiny_config, tiny_sd3_folder, tmp_path, damage, kind, says):
    folder = tmp_path / "other"
    DiffusionPipeline.from_pretrained(tiny_sd3_folder).save_pretrained(folder)
    config = load_config(others(tiny_config, folder))
    store = trained_run(config, tmp_path / "store")
    damage(folder)
    with pytest.raises(kind, match=rf"evaluate\.pipelines\.Other 1\.0.*{says}"):
        run_stage(config, store, "evaluate")


def test_a_taken_name_is_refused(tiny_config):
    pipelines = {"teacher": {"path": "lab:flow", "steps": 4}}
    with pytest.raises(ConfigError, match=r"evaluate\.pipelines\.teacher.*choose another name"):
        load_config(tiny_config(evaluate={"metrics": ["lab-mixer"], "pipelines": pipelines}))


@pytest.mark.process
def test_the_command_adds_a_column_to_a_run(tiny_config, tiny_sd3_folder, tmp_path):
    """The run's stages are copied, the card has its models and the new one; again: nothing is left to do."""
    path = tiny_config()
    config = load_config(path)
    store = trained_run(config, tmp_path / "store")
    seal_stage(config, store, "export")
    command = [sys.executable, "-m", "flows.cli", "evaluate", str(path), "--pipeline", str(tiny_sd3_folder)]
    command += ["--steps", "3", "--guidance", "3", "--name", "Theirs", "--store", str(store)]
    environment = os.environ | {"PREFECT_HOME": str(tmp_path / "prefect"), "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "Theirs" in done.stdout
    assert "starting Prefect" not in done.stderr
    folder = store / "tiny-with-theirs-3" / "evaluate"
    card = json.loads((folder / "scorecard.json").read_text())
    assert [m["name"] for m in card["models"]] == ["student", "teacher", "naive teacher", "cold start", "Theirs"]
    assert json.loads((folder.parent / "export" / "record.json").read_text())["adopted_from"] == "tiny"
    assert (
        digest_teacher(tiny_sd3_folder) == json.loads((folder / "record.json").read_text())["inputs"]["pipeline:Theirs"]
    )
