"""Artifacts and checkpoints on a folder and on S3 (a moto server process): whole or invisible, whatever happens."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
import torch

from dmdr.errors import ConfigError, DataError, InputMissing, StoreError
from stages.store.artifacts import Artifact
from stages.store.folder import ATTEMPT
from tests.support.s3_server import BUCKET

SEED = random.SystemRandom().randrange(2**32)
IDENTITY = {"seed": 0, "student.steps": 4, "cold_start.student.betas": (0.0, 0.99)}
INPUTS = {"teacher": "ab" * 32}
ROOT = Path(__file__).parents[4]


@pytest.fixture(autouse=True)
def rng() -> random.Random:
    print(f"seed {SEED}")
    return random.Random(SEED)


class Bench:
    """A store with a way around the artifact code: what others could do to the bytes."""

    def __init__(self, url: str, root: Path | None) -> None:
        self.url, self.root = url, root

    def artifact(self, run: str = "r", stage: str = "cold_start") -> Artifact:
        return Artifact(self.url, run, stage)

    def _key(self, name: str) -> str:
        return f"{self.url.removeprefix(f's3://{BUCKET}/')}/{name}"

    def get(self, name: str) -> bytes:
        if self.root:
            return (self.root / name).read_bytes()
        return boto3.client("s3").get_object(Bucket=BUCKET, Key=self._key(name))["Body"].read()

    def put(self, name: str, data: bytes) -> None:
        if self.root:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_bytes(data)
        else:
            boto3.client("s3").put_object(Bucket=BUCKET, Key=self._key(name), Body=data)

    def delete(self, name: str) -> None:
        if self.root:
            (self.root / name).unlink()
        else:
            boto3.client("s3").delete_object(Bucket=BUCKET, Key=self._key(name))

    def names(self) -> set[str]:
        if self.root:
            return {path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file()}
        found = boto3.client("s3").list_objects_v2(Bucket=BUCKET, Prefix=self._key(""))
        return {each["Key"].removeprefix(self._key("")) for each in found.get("Contents", ())}


@pytest.fixture(params=["folder", "s3"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    if request.param == "s3":
        request.getfixturevalue("s3")
        return Bench(f"s3://{BUCKET}/{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:10]}/runs", None)
    return Bench(str(tmp_path / "runs"), tmp_path / "runs")


def contents(rng: random.Random, count: int = 4) -> dict[str, bytes]:
    names = ("metrics.jsonl", "student.safetensors", "pipeline/model_index.json", "pipeline/unet/a b.bin")
    return {name: rng.randbytes(rng.randrange(1, 5000)) for name in names[:count]}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def sealed(artifact: Artifact, folder: Path, files: dict[str, bytes]) -> dict:
    assert artifact.claim(IDENTITY, INPUTS) is None
    return artifact.seal(write(folder, files), facts={"loss": 0.5}, made={"duration_s": 1.0})


def check(artifact: Artifact, cache: Path, *possible: dict[str, bytes]) -> None:
    """The artifact is one of the possible contents, entirely."""
    folder, record = artifact.fetch(cache), artifact.record()
    found = {name: (folder / name).read_bytes() for name in record["files"]}
    assert found in possible
    for name, data in found.items():
        about = record["files"][name]
        assert (about["size"], about["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_what_is_sealed_is_what_is_fetched(bench: Bench, tmp_path: Path, rng: random.Random) -> None:
    files, artifact = contents(rng), bench.artifact()
    record = sealed(artifact, tmp_path / "out", files)
    check(bench.artifact(), tmp_path / "cache", files)
    assert record == bench.artifact().record() == json.loads(bench.get("r/cold_start/record.json"))
    assert record["facts"] == {"loss": 0.5}
    assert record["inputs"] == INPUTS
    assert bench.names() == {f"r/cold_start/{name}" for name in (*files, "record.json", "claim.json")} | {
        name for name in bench.names() if ATTEMPT in name
    }
    again = bench.artifact().claim(IDENTITY, INPUTS)
    assert again == record, "a sealed stage is skipped"


def test_equal_results_have_equal_fingerprints_in_any_store(s3: str, tmp_path: Path, rng: random.Random) -> None:
    files = contents(rng)
    stores = (str(tmp_path / "runs"), f"s3://{BUCKET}/parity", f"file://{tmp_path}/other")
    records = [sealed(Artifact(url, "a", "joint"), tmp_path / f"o{i}", files) for i, url in enumerate(stores)]
    assert len({record["fingerprint"] for record in records}) == 1
    assert records[0] == records[1] == records[2]
    changed = {**files, "metrics.jsonl": b"other"}
    other = sealed(Artifact(stores[0], "b", "joint"), tmp_path / "o3", changed)
    assert other["fingerprint"] != records[0]["fingerprint"]


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
        ):
            assert part in told
        assert "seed" not in told
        assert "\n" not in told


@pytest.mark.parametrize("harm", ["bit", "truncated", "longer", "missing"])
def test_damage_is_found_and_named(bench: Bench, tmp_path: Path, rng: random.Random, harm: str) -> None:
    files = contents(rng)
    sealed(bench.artifact(), tmp_path / "out", files)
    name = rng.choice(sorted(files))
    harmed(bench, f"r/cold_start/{name}", harm, rng)
    with pytest.raises(DataError, match=f"{name} is (damaged|missing)"):
        bench.artifact().fetch(tmp_path / "cache")


def harmed(bench: Bench, name: str, harm: str, rng: random.Random) -> None:
    data = bytearray(bench.get(name))
    if harm == "bit":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif harm == "truncated":
        del data[rng.randrange(len(data)) :]
    elif harm == "longer":
        data += b"\0"
    if harm == "missing":
        bench.delete(name)
    else:
        bench.put(name, bytes(data))


def test_a_record_cannot_name_a_file_outside(bench: Bench, tmp_path: Path, rng: random.Random) -> None:
    record = sealed(bench.artifact(), tmp_path / "out", contents(rng))
    for name in ("../../claim.json", "/etc/hostname", "a/../../x"):
        record["files"] = {name: {"size": 1, "sha256": "0"}}
        bench.put("r/cold_start/record.json", json.dumps(record).encode())
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

        def race(which: int, trial: int = trial, both: list = both, barrier: threading.Barrier = barrier) -> dict:
            artifact = bench.artifact(run=f"t{trial}")
            artifact.claim(IDENTITY, INPUTS)
            out = write(tmp_path / f"out-{trial}-{which}", both[which])
            barrier.wait()
            return artifact.seal(out, facts={})

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
    assert late.seal(write(tmp_path / "b", contents(rng)), facts={}) == record
    check(bench.artifact(), tmp_path / "cache", first)


def test_on_s3_no_upload_replaces_a_sealed_object(s3: str, tmp_path: Path, rng: random.Random) -> None:
    """The worst order: the late copy saw no record, then the first one sealed, then the late one uploads and seals."""
    bench = Bench(f"s3://{BUCKET}/late", None)
    late, first = bench.artifact(), contents(rng)
    late.claim(IDENTITY, INPUTS)
    claim = json.loads(bench.get("r/cold_start/claim.json"))
    record = sealed(bench.artifact(), tmp_path / "a", first)
    assert late._seal(write(tmp_path / "b", contents(rng)), claim, {"facts": {}}) == record
    check(bench.artifact(), tmp_path / "cache", first)


# kill -9


def state(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "network/a": torch.randn(3, 5, generator=generator),
        "network/b": torch.randn(7, generator=generator).bfloat16(),
        "steps": torch.tensor(step),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(4, 2, generator=generator).T,
    }


def same(found: tuple[int, dict[str, torch.Tensor], dict] | None, step: int) -> bool:
    """Whether it is the checkpoint of `step`, bit for bit."""
    if found is None or found[0] != step or found[2] != {"step": step, "phase": "joint"}:
        return False
    wanted = state(step)
    return wanted.keys() == found[1].keys() and all(
        (wanted[k].dtype, wanted[k].shape) == (found[1][k].dtype, found[1][k].shape)
        and wanted[k].contiguous().numpy(force=True).tobytes() == found[1][k].numpy(force=True).tobytes()
        if wanted[k].dtype != torch.bfloat16
        else torch.equal(wanted[k], found[1][k])
        for k in wanted
    )


def save(artifact: Artifact, *steps: int) -> None:
    for step in steps:
        artifact.checkpoints(2).save(step, state(step), {"step": step, "phase": "joint"})


KILLED_ON_S3 = """
import sys
from pathlib import Path
from stages.store.artifacts import Artifact
artifact = Artifact(sys.argv[1], "r", "joint")
artifact.claim({"a": 1}, {})
print("go", flush=True)
artifact.seal(Path(sys.argv[2]), facts={})
"""


def test_kill_while_sealing_on_s3(s3: str, tmp_path: Path, rng: random.Random) -> None:
    files = {f"f{n}": rng.randbytes(1000) for n in range(12)}
    out = write(tmp_path / "out", files)
    for trial in range(2):
        store = f"s3://{BUCKET}/killed{trial}"
        command = [sys.executable, "-c", KILLED_ON_S3, store, str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as child:
            assert child.stdout.readline() == b"go\n"
            time.sleep(rng.uniform(0.0, 0.12))
            child.kill()
        artifact = Artifact(store, "r", "joint")
        if artifact.record() is None:
            with pytest.raises(InputMissing):
                artifact.fetch(tmp_path / "no")
            artifact.seal(out, facts={})
        check(artifact, tmp_path / f"cache{trial}", files)


# Adoption: one run takes over what another made


def test_an_adopted_artifact_is_the_same_artifact(bench: Bench, tmp_path: Path, rng: random.Random) -> None:
    files = contents(rng)
    theirs = sealed(bench.artifact("maker"), tmp_path / "out", files)
    ours = bench.artifact("r").adopt(bench.artifact("maker"), IDENTITY, INPUTS)
    assert ours == bench.artifact("r").record()
    check(bench.artifact("r"), tmp_path / "cache", files)
    assert ours == {**theirs, "run": "r", "adopted_from": "maker"}, "the same fingerprint, facts and cost"
    assert bench.artifact("r").claim(IDENTITY, INPUTS) == ours, "a sealed stage is skipped"
    again = bench.artifact("third").adopt(bench.artifact("r"), IDENTITY, INPUTS)
    assert (again["fingerprint"], again["adopted_from"]) == (theirs["fingerprint"], "maker")
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


ADOPTS = """
import json, sys
from stages.store.artifacts import Artifact
url, identity, inputs = sys.argv[1], *map(json.loads, sys.argv[2:])
print("go", flush=True)
Artifact(url, "r", "cold_start").adopt(Artifact(url, "maker", "cold_start"), identity, inputs)
"""


def test_kill_while_adopting(bench: Bench, tmp_path: Path, rng: random.Random) -> None:
    """Nothing, or all of it; and the same command again makes it whole."""
    files = {f"f{n}": rng.randbytes(20_000) for n in range(12)}
    theirs = sealed(bench.artifact("maker"), tmp_path / "out", files)
    command = [sys.executable, "-c", ADOPTS, bench.url, json.dumps(IDENTITY), json.dumps(INPUTS)]
    for trial in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as child:
            assert child.stdout.readline() == b"go\n"
            time.sleep(rng.uniform(0.0, 0.3))
            child.kill()
        if bench.artifact().record() is not None:
            check(bench.artifact(), tmp_path / f"cache-{trial}", files)
    ours = bench.artifact().adopt(bench.artifact("maker"), IDENTITY, INPUTS)
    assert ours["fingerprint"] == theirs["fingerprint"]
    check(bench.artifact(), tmp_path / "cache", files)


def test_only_the_wanted_files_are_fetched(bench: Bench, tmp_path: Path, rng: random.Random) -> None:
    sealed(bench.artifact(), tmp_path / "out", contents(rng))
    bench.put("r/cold_start/student.safetensors", b"damaged, but nobody asked")
    folder = bench.artifact().fetch(tmp_path / "cache", only=lambda name: name.endswith(".jsonl"))
    assert (folder / "metrics.jsonl").is_file()
    if not bench.root:
        assert [path.name for path in folder.rglob("*.*")] == ["metrics.jsonl"]
    with pytest.raises(DataError, match="student.safetensors is damaged"):
        bench.artifact().fetch(tmp_path / "all")


# Checkpoints


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
    began = time.monotonic()
    with pytest.raises(StoreError) as caught:
        Artifact("s3://any/runs", "r", "joint").record()
    one_line(caught, "cannot read s3://any/runs/r/joint/record.json", "repeat the command")
    assert time.monotonic() - began < 60


def test_kills_full_disks_and_memory() -> None:
    """tests/support/forked.py in a process of its own, which has no threads that a fork would leave behind."""
    memory = "/dev/shm" if os.path.ismount("/dev/shm") else None  # a kill does not care how fast the disk is
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        options = ["-q", "-p", "no:cacheprovider", "--basetemp", f"{folder}/t"]
        command = [sys.executable, "-m", "pytest", *options, "tests/support/forked.py"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
