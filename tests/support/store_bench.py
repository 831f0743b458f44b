"""A store with a way around the artifact code, and what tests put into it: files, artifacts, checkpoints."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import boto3
import pytest
import torch

from stages.store.artifacts import Artifact
from tests.support.s3_server import BUCKET
from tests.support.sealing import PROVENANCE

SEED = random.SystemRandom().randrange(2**32)
IDENTITY = {"seed": 0, "student.steps": 4, "cold_start.student.betas": (0.0, 0.99)}
INPUTS = {"teacher": "ab" * 32}


@pytest.fixture
def rng() -> random.Random:
    """Random numbers, another sequence in every session; the seed is printed."""
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
    """A store that nobody else writes to: a folder, and a prefix on S3."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return Bench(f"s3://{BUCKET}/{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:10]}/runs", None)
    return Bench(str(tmp_path / "runs"), tmp_path / "runs")


def contents(rng: random.Random, count: int = 4) -> dict[str, bytes]:
    """Names and random bytes of an artifact's files."""
    names = ("metrics.jsonl", "student.safetensors", "pipeline/model_index.json", "pipeline/unet/a b.bin")
    return {name: rng.randbytes(rng.randrange(1, 5000)) for name in names[:count]}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Write the files into a folder, and return it."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def sealed(artifact: Artifact, folder: Path, files: dict[str, bytes]) -> dict:
    """Claim an address and seal the files there; the record."""
    assert artifact.claim(IDENTITY, INPUTS) is None
    return artifact.seal(write(folder, files), facts={"loss": 0.5}, provenance=PROVENANCE)


def check(artifact: Artifact, cache: Path, *possible: dict[str, bytes]) -> None:
    """The artifact is one of the possible contents, entirely."""
    folder, record = artifact.fetch(cache), artifact.record()
    found = {name: (folder / name).read_bytes() for name in record.files}
    assert found in possible
    for name, data in found.items():
        about = record.files[name]
        assert (about.size, about.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def harmed(bench: Bench, name: str, harm: str, rng: random.Random) -> None:
    """Damage a file of the store: "bit", "truncated", "longer" or "missing"."""
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


def state(step: int) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint: several types, an empty one, one that is not contiguous."""
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
    """Save the checkpoints of these steps."""
    artifact.claim(IDENTITY, INPUTS)
    for step in steps:
        artifact.checkpoints(2).save(step, state(step), {"step": step, "phase": "joint"})
