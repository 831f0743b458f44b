"""`dmdr generate`: images of a finished or an open run, each from its seed alone, and one line for what cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from dmdr.config.load import load_config
from dmdr.errors import Stopped
from flows import cli
from stages import cold_start
from tests.support.s3_server import spoil
from tests.support.trained_run import context_for, run_stage, seal_stage, trained_run

PROMPT = "a Red circle, please"


def generate(*arguments: object) -> int:
    return cli.main(["generate", *map(str, arguments)])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_an_export_draws_what_its_pipeline_draws_for_anybody(store, tiny_config, tmp_path, capsys):
    config = load_config(tiny_config())
    seal_stage(config, trained_run(config, store), "export")
    capsys.readouterr()
    assert generate("tiny", PROMPT, "--n", 2, "--store", store, "--out", tmp_path / "two") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "student of tiny: exported, 2 NFE an image"
    first, second = sorted((tmp_path / "two").iterdir())
    assert [line.split("  ")[0] for line in said[1:]] == [str(first), str(second)]
    assert first.name == "tiny-a-red-circle-please-0.png"
    assert not np.array_equal(pixels(first), pixels(second))

    assert generate("tiny", PROMPT, "--seed", 1, "--store", store, "--out", tmp_path / "one") == 0
    (alone,) = (tmp_path / "one").iterdir()
    assert alone.name == second.name
    assert np.array_equal(pixels(alone), pixels(second))

    assert cli.main(["pull", "tiny", "export", str(tmp_path / "pulled"), "--store", store]) == 0
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pulled" / "pipeline")
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    size = {"height": 16, "width": 16}
    (image,) = pipe(PROMPT, num_inference_steps=2, guidance_scale=1.0, generator=generator, **size).images
    assert np.array_equal(np.asarray(image), pixels(alone))


@pytest.mark.parametrize(
    "student", [{"steps": 2}, {"steps": 2, "form": "lora", "lora_rank": 4, "lora_alpha": 10.0}], ids=["full", "lora"]
)
def test_an_open_run_draws_with_the_ema_of_its_newest_checkpoint(student, tiny_config, tmp_path, capsys):
    """After one of two updates: the images of a run that had but one."""
    path = tiny_config(student=student)
    longer = load_config(path)
    shorter = longer.model_copy(update={"cold_start": longer.cold_start.model_copy(update={"updates": 1})})
    open_store, whole_store = tmp_path / "open", tmp_path / "whole"
    seal_stage(longer, open_store, "prompts")
    shutil.copytree(open_store, whole_store)
    updates = iter((False, True))
    with pytest.raises(Stopped):
        cold_start.run(context_for(longer, open_store, "cold_start", stop=lambda: next(updates, True)))
    run_stage(shorter, whole_store, "cold_start")

    drawn = {}
    for store, source in {open_store: "cold_start, the EMA after update 1", whole_store: "cold_start, sealed"}.items():
        assert generate(path, PROMPT, "--store", store, "--out", store / "images") == 0
        assert f"student of tiny: {source}, 2 NFE an image" in capsys.readouterr().out
        (image,) = (store / "images").iterdir()
        drawn[store] = pixels(image)
    assert np.array_equal(drawn[open_store], drawn[whole_store])


@pytest.mark.parametrize("family", ["sdxl", "z_image"])
def test_the_teacher_stands_beside_the_student(family, request, tiny_config, tmp_path, capsys):
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    teacher = {"path": str(folder), "guidance_scale": [2.5, 3.5], "steps": 3, "resolution": 16}
    path = tiny_config(teacher=teacher)  # it draws at the middle of the range
    config, store = load_config(path), tmp_path / "store"
    seal_stage(config, trained_run(config, store), "export")
    assert generate(path, "кошка", "--n", 2, "--compare", "--store", store, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert "student, 2 NFE, " in said
    assert "; teacher, 6 NFE, " in said
    (picture,) = (tmp_path / "out").glob("tiny-*-compare.png")
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert Image.open(picture).width > 2 * 144

    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "vae/config.json").write_text((other / "vae/config.json").read_text() + " ")
    wrong = tiny_config(teacher={"path": str(other), "guidance_scale": 3.0, "steps": 3})
    assert generate(wrong, PROMPT, "--compare", "--store", store, "--out", tmp_path / "new") == 65
    assert "is not the one that run tiny was made from" in capsys.readouterr().err
    assert generate("tiny", PROMPT, "--compare", "--store", store, "--out", tmp_path / "new") == 66
    assert (
        "the store does not know where the teacher of run tiny lies; give the run's config" in capsys.readouterr().err
    )
    assert not (tmp_path / "new").exists()


def test_refusals(tiny_config, tmp_path, capsys):
    config, store = load_config(tiny_config()), tmp_path / "store"
    seal_stage(config, store, "prompts")
    (tmp_path / "file").touch()
    capsys.readouterr()

    def told(code: int, words: str, *arguments: object) -> None:
        assert generate(*arguments, "--store", store) == code
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert words in line

    told(66, "has no student to draw with yet: no training stage has a result or a checkpoint", "tiny", PROMPT)
    told(66, f"there is no run tinny at {store}; did you mean tiny?", "tinny", PROMPT)
    told(66, f"there is no run other at {store}; dmdr runs --store {store} lists", "other", PROMPT)
    told(66, "does not exist", tmp_path / "none.yaml", PROMPT)
    told(64, "run name 'Tiny Run' must be", "Tiny Run", PROMPT)
    told(64, "the prompt is empty", "tiny", "  ")
    told(64, "--n", "tiny", PROMPT, "--n", 0)
    told(64, "a seed is a whole number from 0", "tiny", PROMPT, "--seed", "-1")
    told(64, "file is a file; name a folder", "tiny", PROMPT, "--out", tmp_path / "file")
    trained_run(config, store)
    seal_stage(config, store, "export")
    capsys.readouterr()
    spoil(str(store), "tiny/export/provenance.json", b"{}")
    told(65, "provenance.json is damaged", "tiny", PROMPT)
