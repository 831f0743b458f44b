"""Adoption: one run takes over what another run made, as the same artifact or not at all."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dmdr.errors import ConfigError, DataError
from tests.support.store_bench import IDENTITY, INPUTS, Bench, check, contents, harmed, sealed


def test_an_adopted_artifact_is_the_same_artifact(bench: Bench, tmp_path: Path, rng: random.Random) -> None:
    files = contents(rng)
    theirs = sealed(bench.artifact("maker"), tmp_path / "out", files)
    ours = bench.artifact("r").adopt(bench.artifact("maker"), IDENTITY, INPUTS)
    assert ours == bench.artifact("r").record()
    check(bench.artifact("r"), tmp_path / "cache", files)
    adopted = theirs.provenance.model_copy(update={"adopted_from": "maker"})
    expected = theirs.model_copy(update={"run": "r", "provenance": adopted}).with_checksum()
    assert ours == expected, "the same fingerprint, facts and cost"
    assert bench.artifact("r").claim(IDENTITY, INPUTS) == ours, "a sealed stage is skipped"
    again = bench.artifact("third").adopt(bench.artifact("r"), IDENTITY, INPUTS)
    assert (again.fingerprint, again.provenance.adopted_from) == (theirs.fingerprint, "maker")
    bench.put("maker/cold_start/metrics.jsonl", b"changed later")
    check(bench.artifact("r"), tmp_path / "cache-2", files)  # a copy, not a link


def test_another_result_is_not_adopted(bench: Bench, tmp_path: Path, rng: random.Random) -> None:
    maker = bench.artifact("maker")
    assert bench.artifact().adopt(maker, IDENTITY, INPUTS) is None, "nothing is there"
    assert maker.claim(IDENTITY, INPUTS) is None
    assert bench.artifact().adopt(maker, IDENTITY, INPUTS) is None, "not sealed"
    sealed(maker, tmp_path / "out", contents(rng))
    assert bench.artifact().adopt(maker, {**IDENTITY, "seed": 1}, INPUTS) is None
    assert bench.artifact().adopt(maker, IDENTITY, {"teacher": "cd" * 32}) is None
    assert bench.artifact(stage="joint").adopt(maker, IDENTITY, INPUTS) is None
    assert {name.split("/")[0] for name in bench.names()} == {"maker"}, "nothing was written"
    bench.artifact().claim({**IDENTITY, "seed": 1}, INPUTS)
    bench.put("r/cold_start/checkpoints/step-00000001/state.json", b"{}")  # something came of that claim
    with pytest.raises(ConfigError, match="seed is 1 there, 0 here"):
        bench.artifact().adopt(maker, IDENTITY, INPUTS)


def test_a_damaged_artifact_is_not_adopted(bench: Bench, tmp_path: Path, rng: random.Random) -> None:
    files = contents(rng)
    sealed(bench.artifact("maker"), tmp_path / "out", files)
    name = rng.choice(sorted(files))
    harmed(bench, f"maker/cold_start/{name}", rng.choice(["bit", "truncated", "missing"]), rng)
    with pytest.raises(DataError, match=f"maker/cold_start/{name} is (damaged|missing)"):
        bench.artifact().adopt(bench.artifact("maker"), IDENTITY, INPUTS)
    assert bench.artifact().record() is None
