"""Checkpoints on a folder and on S3: they come back bit for bit, and a damaged one is named and passed over."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.store_bench import Bench, contents, harmed, same, save, sealed


def test_checkpoints_come_back_bit_for_bit_and_rotate(bench: Bench) -> None:
    artifact = bench.artifact()
    assert artifact.checkpoints(2).newest() is None
    for step in (5, 10, 15, 20):
        save(artifact, step)
        assert same(artifact.checkpoints(2).newest(), step)
    kept = {name.split("/")[3] for name in bench.names() if "/checkpoints/" in name}
    assert kept == {"step-00000015", "step-00000020"}


@pytest.mark.parametrize("harm", ["bit", "truncated", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    bench: Bench, rng: random.Random, capfd: pytest.CaptureFixture, harm: str
) -> None:
    artifact, file = bench.artifact(), rng.choice(["state.safetensors", "state.json"])
    save(artifact, 10, 20)
    harmed(bench, f"r/cold_start/checkpoints/step-00000020/{file}", harm, rng)
    assert same(bench.artifact().checkpoints(2).newest(), 10)
    told = capfd.readouterr().err
    assert "step-00000020 is DAMAGED" in told
    assert file in told
    save(artifact, 15)  # the run goes on from 10, and the damaged 20 must not push out the good 10
    assert same(bench.artifact().checkpoints(2).newest(), 15)
    assert "DAMAGED" not in capfd.readouterr().err
    for step in (10, 15):
        harmed(bench, f"r/cold_start/checkpoints/step-{step:08d}/{file}", harm, rng)
    assert bench.artifact().checkpoints(2).newest() is None
    assert "no whole checkpoint is left" in capfd.readouterr().err


def test_a_broken_manifest_is_damage(bench: Bench, capfd: pytest.CaptureFixture) -> None:
    save(bench.artifact(), 1, 2)
    for data in (b"", b"{}", b"[1]", b'{"state.json": 1, "state.safetensors": 2}'):
        bench.put("r/cold_start/checkpoints/step-00000002/manifest.json", data)
        assert same(bench.artifact().checkpoints(2).newest(), 1)
        assert "DAMAGED" in capfd.readouterr().err


def test_sealing_clears_the_checkpoints(bench: Bench, tmp_path: Path, rng: random.Random) -> None:
    artifact = bench.artifact()
    save(artifact, 1, 2)
    sealed(artifact, tmp_path / "out", contents(rng))
    assert not [name for name in bench.names() if "/checkpoints/" in name]
