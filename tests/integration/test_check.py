"""`dmdr check`: what is broken is named in one line, the other checks go on, and nothing stays in the store."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flows import cli

CHEAP = ("config", "store", "files", "run", "prompts", "training", "metrics", "memory", "rewards")
CHECKS = (*CHEAP, "teacher", "disk", "images", "cold_start", "joint", "export")
VAE = "vae/diffusion_pytorch_model.safetensors"


def check(capsys: pytest.CaptureFixture, config: Path, *arguments: object) -> tuple[int, dict[str, tuple[str, str]]]:
    """The exit code of `dmdr check`, and by check its mark and its words."""
    code = cli.main(["check", str(config), *map(str, arguments)])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    lines = [re.fullmatch(r"(\S+) +(\S+) +(?:[\d.]+ s)? +(.+)", line) for line in printed.out.splitlines()]
    return code, {line[2]: (line[1], line[3]) for line in lines if line}


def copy_teacher(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> dict[str, object]:
    """The section `teacher` of a copy whose autoencoder is changed."""
    shutil.copytree(folder, target)
    weights = load_file(target / VAE)
    change(weights)
    save_file(weights, target / VAE, {"format": "pt"})
    return {"path": str(target), "guidance_scale": 3.0, "steps": 3}


def test_a_sound_config_passes_and_leaves_nothing(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    config = tiny_config(student={"steps": 2, "form": "lora", "lora_rank": 4})
    code, found = check(capsys, config, "--store", tmp_path / "new" / "runs")
    assert tuple(found) == CHECKS
    assert (code, {mark for mark, _ in found.values()}) == (0, {"ok"}), found
    assert not (tmp_path / "new").exists()
    assert "14 to train on, 6 to evaluate" in found["prompts"][1]
    assert "lab-conv" in found["images"][1] and "lab-mixer" in found["images"][1]
    assert "updates take" in found["joint"][1]
    assert re.match(r"the run will write about 0.0 GiB.*, and .* has [\d.]+ GiB free", found["disk"][1])
    assert found["export"][1].startswith("pipeline, lora: plain diffusers draws the same latents")


def test_three_faults_are_three_lines_and_the_others_go_on(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    """A store that nobody may write, a reward without weights, and prompts that the metric cannot judge."""
    path = tiny_config(
        joint={
            "updates": 2,
            "batch_size": 2,
            "fake_updates": 2,
            "student": {"learning_rate": 1e-4},
            "fake_score": {"learning_rate": 2e-4},
            "rl": {"algorithm": "refl", "weight": 0.5, "rewards": {"pickscore": 1.0}},
        },
        weights={"pickscore": str(tmp_path / "none")},
        evaluate={"metrics": ["lab-checker"], "batch_size": 4},
    )
    (tmp_path / "held-out.txt").write_text("a photo of an apple\n", encoding="utf-8")
    code, found = check(capsys, path, "--store", "/proc/nobody/runs")
    assert code == 74
    assert {name for name, (mark, _) in found.items() if mark == "fix"} == {"store", "training", "metrics"}
    assert found["store"][1].startswith("cannot write in /proc/nobody")
    assert f"weights.pickscore {tmp_path}/none does not exist" in found["training"][1]
    assert "lab-checker" in found["metrics"][1]
    assert {name for name, (mark, _) in found.items() if mark == "--"} == {
        "rewards",
        "disk",
        "images",
        "joint",
        "export",
    }
    assert found["joint"][1] == "not checked, because it needs: rewards"
    assert found["cold_start"][0] == "ok"


def test_a_damaged_teacher_is_named(
    tiny_config: Callable[..., Path], tiny_sd3_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    shutil.copytree(tiny_sd3_folder, tmp_path / "teacher")
    file = tmp_path / "teacher" / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    path = tiny_config(teacher={"path": str(tmp_path / "teacher"), "guidance_scale": 3.0, "steps": 3})
    code, found = check(capsys, path, "--store", tmp_path / "runs")
    assert code == 65
    assert [name for name, (mark, _) in found.items() if mark == "fix"] == ["teacher"]
    assert f"{file} is damaged" in found["teacher"][1]
    assert found["export"] == ("--", "not checked, because it needs: joint")


def test_a_batch_too_large_for_memory_is_refused_by_its_plan(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    code, found = check(capsys, tiny_config(), "--store", tmp_path / "runs", "--set", "joint.batch_size=20000")
    assert code == 64
    assert re.match(r"joint needs [\d,.]+ GiB by its plan, and this machine has ", found["memory"][1])
    assert "execution.micro_batch_size: 1" in found["memory"][1] or "precision: bfloat16" in found["memory"][1]
    assert found["teacher"] == ("--", "not checked, because it needs: memory")


def overflow_in_half(weights: dict[str, torch.Tensor]) -> None:
    """Activations of a hundred thousand behind the first layer, which a norm brings back: float32 holds them."""
    weights["decoder.conv_in.weight"] *= 1e5
    weights["decoder.conv_in.bias"] *= 1e5


def test_a_decoder_that_overflows_in_the_exported_dtype_is_named(
    tiny_config: Callable[..., Path], tiny_sd3_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    teacher = copy_teacher(tiny_sd3_folder, tmp_path / "teacher", overflow_in_half)
    code, found = check(capsys, tiny_config(teacher=teacher, export={"dtype": "float16"}), "--store", tmp_path / "runs")
    assert code == 65
    assert found["images"][0] == "fix"
    assert (
        "decoded in float16, export.dtype, the teacher's images show nothing (4 of 4 not a number)"
        in found["images"][1]
    )


def blacken(weights: dict[str, torch.Tensor]) -> None:
    """Every image is black."""
    weights["decoder.conv_out.weight"].zero_()
    weights["decoder.conv_out.bias"].fill_(-5.0)


def break_numbers(weights: dict[str, torch.Tensor]) -> None:
    """No image is a number."""
    weights["decoder.conv_out.bias"].fill_(float("nan"))


@pytest.mark.parametrize(
    ("change", "where", "words"),
    [
        (blacken, "images", "the teacher's images show nothing (4 of 4 black)"),
        (break_numbers, "teacher", "the teacher's own pipeline draws images that are not numbers"),
    ],
)
def test_a_teacher_that_draws_nothing_is_named(
    change: Callable[[dict[str, torch.Tensor]], None],
    where: str,
    words: str,
    tiny_config: Callable[..., Path],
    tiny_sd3_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    path = tiny_config(teacher=copy_teacher(tiny_sd3_folder, tmp_path / "teacher", change))
    code, found = check(capsys, path, "--store", tmp_path / "runs")
    assert code == 65
    assert found[where][0] == "fix" and found[where][1].startswith(words), found


def test_a_run_of_that_name_is_looked_at_and_not_touched(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Only the cheap checks: with a teacher that is not there, nothing is loaded."""
    sealed = tmp_path / "runs" / "tiny" / "prompts"
    sealed.mkdir(parents=True)
    (sealed / "mine.txt").write_text("not of DMDR")
    before = sorted(tmp_path.joinpath("runs").rglob("*"))
    teacher = {"path": str(tmp_path / "gone"), "guidance_scale": 3.0}
    code, found = check(capsys, tiny_config(teacher=teacher), "--store", tmp_path / "runs")
    assert code == 66
    assert found["files"][0] == "fix" and "no such folder" in found["files"][1]
    assert sorted(tmp_path.joinpath("runs").rglob("*")) == before


def test_a_wrong_config_is_the_only_line(tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture):
    code, found = check(capsys, tiny_config(), "--set", "joint.updates=0")
    assert code == 64
    assert list(found) == ["config"] and "joint.updates" in found["config"][1]
