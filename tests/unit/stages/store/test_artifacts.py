"""Artifacts and checkpoints on a folder and on S3 (a moto server process): whole or invisible, whatever happens."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dmdr.errors import ConfigError, DataError, InputMissing, StoreError
from stages.store import s3_errors
from stages.store.artifacts import Artifact
from stages.store.folder import ATTEMPT
from stages.store.records import Record, StoredFile
from stages.store.shards import Shards
from tests.support.s3_server import BUCKET
from tests.support.sealing import PROVENANCE
from tests.support.store_bench import IDENTITY, INPUTS, Bench, check, contents, harmed, sealed, write


def test_what_is_sealed_is_what_is_fetched(bench: Bench, tmp_path: Path, rng: random.Random) -> None:
    files, artifact = contents(rng), bench.artifact()
    record = sealed(artifact, tmp_path / "out", files)
    check(bench.artifact(), tmp_path / "cache", files)
    assert record == bench.artifact().record()
    assert record.to_json() == bench.get("r/cold_start/record.json")
    assert record.facts == {"loss": 0.5}
    assert record.inputs == INPUTS
    assert bench.names() == {f"r/cold_start/{name}" for name in (*files, "record.json", "claim.json")} | {
        name for name in bench.names() if ATTEMPT in name
    }
    again = bench.artifact().claim(IDENTITY, INPUTS)
    assert again == record, "a sealed stage is skipped"


def test_equal_results_have_equal_fingerprints_in_any_store(s3: str, tmp_path: Path, rng: random.Random) -> None:
    files = contents(rng)
    stores = (str(tmp_path / "runs"), f"s3://{BUCKET}/parity", f"file://{tmp_path}/other")
    records = [sealed(Artifact(url, "a", "joint"), tmp_path / f"o{i}", files) for i, url in enumerate(stores)]
    assert len({record.fingerprint for record in records}) == 1
    assert records[0] == records[1] == records[2]
    changed = {**files, "metrics.jsonl": b"other"}
    other = sealed(Artifact(stores[0], "b", "joint"), tmp_path / "o3", changed)
    assert other.fingerprint != records[0].fingerprint


def test_nothing_is_readable_before_the_seal(bench: Bench, tmp_path: Path, rng: random.Random) -> None:
    artifact = bench.artifact()
    artifact.claim(IDENTITY, INPUTS)
    for name, data in contents(rng).items():
        bench.put(f"r/cold_start/{name}", data)
    assert artifact.record() is None
    with pytest.raises(InputMissing, match=r"cold_start of run r is not sealed at .*; run that stage first"):
        artifact.fetch(tmp_path / "cache")


def test_an_address_belongs_to_one_identity(bench: Bench, tmp_path: Path, rng: random.Random) -> None:
    artifact = bench.artifact()
    assert artifact.claim(IDENTITY, INPUTS) is None
    assert artifact.claim(dict(reversed(IDENTITY.items())), INPUTS) is None, "the same command again"
    bench.put("r/cold_start/checkpoints/step-00000001/state.json", b"{}")
    for seal in (False, True):
        if seal:
            sealed(bench.artifact(), tmp_path / "out", contents(rng))
        with pytest.raises(ConfigError) as caught:
            artifact.claim({**IDENTITY, "student.steps": 2, "more": 1}, {"teacher": "cd" * 32})
        told = str(caught.value)
        for part in (
            "student.steps is 4 there, 2 here",
            "more is not set there, 1 here",
            "input teacher is abab",
            "--run",
            artifact.address,
            "dmdr rm r cold_start --store",
            "another cold_start" if seal else "an unfinished cold_start",
        ):
            assert part in told
        assert "seed" not in told
        assert "\n" not in told


def test_a_claim_without_results_yields(bench: Bench, tmp_path: Path, rng: random.Random) -> None:
    """The settings of a stage can change as long as nothing came of it; who began it before can store nothing more."""
    first, other = bench.artifact(), {**IDENTITY, "seed": 5}
    assert first.claim(IDENTITY, INPUTS) is None
    if bench.root:
        with pytest.raises(ConfigError, match="an unfinished cold_start.* seed is 0 there, 5 here"):
            bench.artifact().claim(other, INPUTS)  # the first still works on it
        first.place._scratch.cleanup()  # it was killed, as far as the folder can tell
    assert bench.artifact().claim(other, INPUTS) is None
    assert bench.artifact().read_claim().identity["seed"] == 5
    for store in (
        lambda: first.seal(write(tmp_path / "out", contents(rng)), facts={}, provenance=PROVENANCE),
        lambda: first.checkpoints(2).save(1, {}, {}),
        lambda: Shards(first, tmp_path / "parts").keep("images-00000.tar", b"1"),
    ):
        with pytest.raises(ConfigError, match="another process has begun cold_start"):
            store()
    assert bench.artifact().record() is None
    assert {name for name in bench.names() if not name.startswith("r/cold_start/.")} == {"r/cold_start/claim.json"}


@pytest.mark.parametrize("harm", ["bit", "truncated", "longer", "missing"])
def test_damage_is_found_and_named(bench: Bench, tmp_path: Path, rng: random.Random, harm: str) -> None:
    files = contents(rng)
    sealed(bench.artifact(), tmp_path / "out", files)
    name = rng.choice(sorted(files))
    harmed(bench, f"r/cold_start/{name}", harm, rng)
    with pytest.raises(DataError, match=f"{name} is (damaged|missing)"):
        bench.artifact().fetch(tmp_path / "cache")


def test_a_record_cannot_name_a_file_outside(bench: Bench, tmp_path: Path, rng: random.Random) -> None:
    record = sealed(bench.artifact(), tmp_path / "out", contents(rng))
    for name in ("../../claim.json", "/etc/hostname", "a/../../x"):
        harmful = record.model_copy(update={"files": {name: StoredFile(size=1, sha256="0" * 64)}})
        bench.put("r/cold_start/record.json", harmful.to_json())
        with pytest.raises(DataError, match="outside"):
            bench.artifact().fetch(tmp_path / "cache")
    bench.put("r/cold_start/record.json", b'{"schema": 1, "fi')
    with pytest.raises(DataError, match="is not JSON"):
        bench.artifact().record()


@pytest.mark.parametrize("store", ["", "foo://x"])
def test_a_store_of_no_known_kind(store: str) -> None:
    with pytest.raises(ConfigError, match="s3://"):
        Artifact(store, "r", "joint")


@pytest.mark.parametrize("run", ["..", "../x", "A", "a/b", "", "a" * 64, ".a", "a\n", "%2e%2e", "a b", "ä"])
def test_a_run_name_cannot_leave_the_store(run: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run name"):
        Artifact(str(tmp_path), run, "joint")


# Two live copies


def test_two_live_copies_make_one_whole_artifact(bench: Bench, tmp_path: Path, rng: random.Random) -> None:
    for trial in range(12 if bench.root else 3):
        both = [contents(rng), contents(rng, count=rng.randrange(1, 5))]
        barrier = threading.Barrier(2, timeout=60)

        def race(which: int, trial: int = trial, both: list = both, barrier: threading.Barrier = barrier) -> Record:
            artifact = bench.artifact(run=f"t{trial}")
            artifact.claim(IDENTITY, INPUTS)
            out = write(tmp_path / f"out-{trial}-{which}", both[which])
            barrier.wait()
            return artifact.seal(out, facts={}, provenance=PROVENANCE)

        with ThreadPoolExecutor(2) as pool:
            records = list(pool.map(race, (0, 1)))
        assert records[0] == records[1] == bench.artifact(run=f"t{trial}").record()
        check(bench.artifact(run=f"t{trial}"), tmp_path / f"cache-{trial}", *both)


def test_copies_that_start_at_once_all_claim_and_keep_their_folders(bench: Bench) -> None:
    def start(_: int) -> bool:
        artifact = bench.artifact()
        artifact.claim(IDENTITY, INPUTS)
        return artifact.workspace().exists()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(start, range(200 if bench.root else 12)))


def test_a_copy_that_comes_late_changes_nothing(bench: Bench, tmp_path: Path, rng: random.Random) -> None:
    late, first = bench.artifact(), contents(rng)
    late.claim(IDENTITY, INPUTS)
    record = sealed(bench.artifact(), tmp_path / "a", first)
    assert late.seal(write(tmp_path / "b", contents(rng)), facts={}, provenance=PROVENANCE) == record
    check(bench.artifact(), tmp_path / "cache", first)


def test_on_s3_no_upload_replaces_a_sealed_object(s3: str, tmp_path: Path, rng: random.Random) -> None:
    """The worst order: the late copy saw no record, then the first one sealed, then the late one uploads and seals."""
    bench = Bench(f"s3://{BUCKET}/late", None)
    late, first = bench.artifact(), contents(rng)
    late.claim(IDENTITY, INPUTS)
    claim = late.read_claim()
    record = sealed(bench.artifact(), tmp_path / "a", first)
    assert late._seal(write(tmp_path / "b", contents(rng)), claim, {}, PROVENANCE) == record
    check(bench.artifact(), tmp_path / "cache", first)


def test_only_the_wanted_files_are_fetched(bench: Bench, tmp_path: Path, rng: random.Random) -> None:
    sealed(bench.artifact(), tmp_path / "out", contents(rng))
    bench.put("r/cold_start/student.safetensors", b"damaged, but nobody asked")
    folder = bench.artifact().fetch(tmp_path / "cache", only=lambda name: name.endswith(".jsonl"))
    assert (folder / "metrics.jsonl").is_file()
    if not bench.root:
        assert [path.name for path in folder.rglob("*.*")] == ["metrics.jsonl"]
    with pytest.raises(DataError, match="student.safetensors is damaged"):
        bench.artifact().fetch(tmp_path / "all")


# Stores that refuse


def one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_a_bucket_that_does_not_exist(s3: str, tmp_path: Path) -> None:
    artifact = Artifact("s3://no-such-bucket/runs", "r", "joint")
    with pytest.raises(InputMissing) as caught:
        artifact.record()
    one_line(caught, "no-such-bucket", "create it")
    with pytest.raises(InputMissing) as caught:
        artifact.place.add("a", write(tmp_path, {"a": b"a"}) / "a", "0")
    one_line(caught, "no-such-bucket", "create it")


def test_a_store_that_does_not_answer_is_given_up(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(s3_errors, "_answering", threading.Event())
    monkeypatch.setattr(s3_errors, "FIRST_PATIENCE", 3.0)
    began = time.monotonic()
    with pytest.raises(StoreError) as caught:
        Artifact("s3://any/runs", "r", "joint").record()
    one_line(caught, "cannot read s3://any/runs/r/joint/record.json", "repeat the command")
    assert 3.0 < time.monotonic() - began < 60
