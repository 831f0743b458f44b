"""PROMPTS=10000,1000000 python -m pytest -s tests/campaigns/prompts.py: many prompts, really encoded.

Not part of `make test`. For each number of prompts the stage is killed by SIGKILL twice, and started again by the same
command. What was whole in the store stays as it is to the end, and the memory does not grow with the prompts. The
teacher is a Stable Diffusion XL of random weights, tiny, with both of its text encoders.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.stage_process import command, prepare_host, start

pytestmark = [pytest.mark.process, pytest.mark.timeout(0)]  # it takes as long as it takes
COUNTS = [int(count) for count in os.environ.get("PROMPTS", "10000,100000").split(",")]
SEED = int(os.environ.get("SEED", random.SystemRandom().randrange(2**32)))
WORDS = ("red", "blue", "circle", "square", "a photo of", "two", "an owl", "at night", "glass", "made of", "snow")
SHARD = 1024  # prompts
GROWTH = 1.1  # of the memory, from the fewest prompts to the most, beside 24 bytes a prompt (docs/prompts.md)


def write_prompts(path: Path, count: int, rng: random.Random) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(f"{' '.join(rng.choices(WORDS, k=rng.randint(3, 12)))} {number}\n")


def list_whole(folder: Path) -> dict[str, tuple[int, int]]:
    """The files of all shards that an open stage has finished, with what changes when one is written again."""
    shards = [manifest.stem for manifest in folder.glob("checkpoints/train-*.json")]
    files = [file for shard in shards for file in folder.glob(f"{shard}.*")]
    return {file.name: _identify(file) for file in files}


def _identify(file: Path) -> tuple[int, int]:
    return file.stat().st_ino, file.stat().st_mtime_ns


def run_stage(arguments: list[str], folder: Path, shards: int | None) -> int:
    """Run a stage to its end, or kill it when so many shards are whole. Returns the most KiB that it held."""
    peak, process = 0, start(arguments)
    status, manifests = Path(f"/proc/{process.pid}/status"), folder / "checkpoints"
    while process.poll() is None:
        try:
            held = re.search(r"VmHWM:\s+(\d+)", status.read_text())
        except OSError:  # it has just ended
            held = None
        peak = max(peak, int(held[1]) if held else 0)
        if shards is not None and len([*manifests.glob("train-*.json")]) >= shards:
            process.kill()
            break
        time.sleep(0.05)
    _, err = process.communicate()
    assert process.returncode == (0 if shards is None else -9), err
    return peak


def test_many_prompts(tiny_config: Callable[..., Path], tiny_sdxl_folder: Path, tmp_path: Path) -> None:
    prepare_host()
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    peaks: dict[int, int] = {}
    for count in COUNTS:
        write_prompts(tmp_path / "many.txt", count, rng)
        sources = {"sources": [str(tmp_path / "many.txt")], "evaluation": str(tmp_path / "held-out.txt")}
        config = tiny_config(
            teacher={"path": str(tiny_sdxl_folder), "guidance_scale": 3.0, "steps": 4},
            prompts={**sources, "encode": "stage", "dtype": "bfloat16", "shard_size": SHARD},
            execution={"device": "cpu"},
        )
        store, began = tmp_path / f"store{count}", time.monotonic()
        arguments, folder = command("prompts", config, store), store / "tiny" / "prompts"
        kills = [max(1, int(count / SHARD * rng.uniform(third, third + 0.3))) for third in (0.05, 0.45)]
        whole: dict[str, tuple[int, int]] = {}
        for shards in (*kills, None):
            peaks[count] = max(peaks.get(count, 0), run_stage(arguments, folder, shards))
            now = list_whole(folder) if shards else {file.name: _identify(file) for file in folder.glob("train-*")}
            assert whole.items() <= now.items(), "a shard that was whole was written again"
            whole = now
        assert len([*folder.glob("train-*.jsonl")]) == -(-count // SHARD)
        assert sum(text.read_bytes().count(b"\n") for text in folder.glob("train-*.jsonl")) == count
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(
            f"{count:,} prompts: {time.monotonic() - began:.0f} s, at most {peaks[count] / 1024:,.0f} MiB, "
            f"{size / count / 1e3:.1f} kB each; killed after {kills[0]} and {kills[1]} shards of {SHARD}",
            flush=True,
        )
    few, many = min(peaks), max(peaks)
    assert peaks[many] <= GROWTH * peaks[few] + 24 * many / 1024
