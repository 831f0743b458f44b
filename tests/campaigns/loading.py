"""python -m pytest -s tests/campaigns/loading.py: the memory that each rank needs to load a teacher that is split.

Not part of `make test`: a minute, 8 GiB. WIDTH=16 is the network's, in heads of 64; 8 layers of it are 0.3 billion
parameters. RANKS=4. Each test loads twice: as a training stage does, and with the weights read by each rank.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from dmdr.assembly.networks import assemble
from dmdr.assembly.stage_config import select_stage
from dmdr.config.load import load_config
from dmdr.teacher.load import find_teacher_of, load_teacher

pytestmark = [pytest.mark.process, pytest.mark.timeout(0)]
WIDTH, RANKS = int(os.environ.get("WIDTH", "16")), int(os.environ.get("RANKS", "4"))
GB = 1e9


FORK = multiprocessing.get_context("fork")  # whatever a process builds, it takes its memory with it


@pytest.fixture
def large_teacher(tiny_sd3_folder: Path, tmp_path: Path) -> Path:
    """The tiny SD3 with a network that is large."""
    process = FORK.Process(target=write_large, args=(tiny_sd3_folder, tmp_path / "large"))
    process.start()
    process.join()
    assert process.exitcode == 0
    return tmp_path / "large"


def write_large(tiny: Path, folder: Path) -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny)
    settings = {**pipe.transformer.config, "num_layers": 8, "num_attention_heads": WIDTH, "attention_head_dim": 64}
    pipe.transformer = SD3Transformer2DModel.from_config({**settings, "caption_projection_dim": 64 * WIDTH})
    pipe.save_pretrained(folder)


def read_memory(name: str) -> int:
    """A line of /proc/self/status, in bytes: VmRSS is resident now, VmHWM was at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024


def load_rank(rank: int, path: Path, out: Path, everyone: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out / 'group'}", rank=rank, world_size=RANKS)
    config = load_config(path)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, began = read_memory("VmRSS"), time.monotonic()
    backbone = load_teacher(find_teacher_of(config.teacher), text=False, weights=everyone or rank == 0)
    assembly = assemble(config, select_stage(config, "cold_start"), backbone, device="cpu")
    assert not any(parameter.is_meta for parameter in assembly.base.backbone.network.parameters())
    took, most, now = time.monotonic() - began, read_memory("VmHWM"), read_memory("VmRSS")
    (out / f"{rank}.json").write_text(json.dumps([most - before, now - before, took]))
    dist.barrier()
    dist.destroy_process_group()


def load(path: Path, out: Path, *, everyone: bool) -> list[tuple[int, int, float]]:
    """For each rank the bytes that it gained at most, the bytes that it kept, and seconds."""
    out.mkdir()
    ranks = [FORK.Process(target=load_rank, args=(rank, path, out, everyone)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert not any(process.exitcode for process in ranks)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize(("form", "precision"), [("lora", "bfloat16"), ("full", "float32")])
def test_one_rank_alone_holds_all_of_a_split_teacher(
    form: str, precision: str, large_teacher: Path, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = tiny_config(
        execution={"device": "cpu", "processes": RANKS, "sharding": "fsdp"},
        precision=precision,
        student={"steps": 2, "form": form, **({"lora_rank": 4} if form == "lora" else {})},
        teacher={"path": str(large_teacher), "guidance_scale": 3.0, "steps": 3},
    )
    size = sum(file.stat().st_size for file in (large_teacher / "transformer").glob("*.safetensors"))
    print(f"\n{form}, {precision}: a network of {size / GB:.2f} GB on {RANKS} ranks")
    for everyone in (True, False):
        found = load(config, tmp_path / f"{everyone}", everyone=everyone)
        most, kept = (", ".join(f"{each[place] / GB:.2f}" for each in found) for place in (0, 1))
        took = max(each[2] for each in found)
        print(f"{'each rank' if everyone else 'one rank'} reads it: at most {most} GB, kept {kept} GB, {took:.1f} s")
    assert all(each[0] < found[0][0] / 2 for each in found[1:]), "another rank holds the network, too"
