"""A teacher is known by the files that its index names, in the form that is read; nothing else counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dmdr.errors import DataError
from dmdr.rewards.weights import digest_weights
from dmdr.teacher import digests
from dmdr.teacher.load import digest_teacher, digest_teacher_as_before, is_teacher
from dmdr.teacher.pipeline_files import list_pipeline_files

BESIDE = (
    "README.md",
    "LICENSE",
    ".gitattributes",
    "sd3_medium.safetensors",
    "comfy_example.png",
    "scores.json",
    "unnamed/model.safetensors",
    "transformer/README.md",
    "transformer/diffusion_pytorch_model.bin",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.fp16.json",
    "text_encoder/model.onnx",
    "text_encoder/flax_model.msgpack",
)


@pytest.fixture
def folder(tiny_sd3_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_sd3_folder, tmp_path / "teacher")


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    digests.digest.cache_clear()


@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_beside_the_pipeline_is_no_part_of_it(folder: Path, name: str) -> None:
    before = digest_teacher(folder)
    put(folder / name, b"other bytes")
    assert digest_teacher(folder) == before
    assert is_teacher(folder, before)
    assert is_teacher(folder, digest_teacher_as_before(folder)), "a run of DMDR 0.1 knows its teacher again"


def test_every_file_that_is_read_counts(folder: Path) -> None:
    files = list_pipeline_files(folder)
    assert files == sorted(path for path in folder.rglob("*") if path.is_file()), "a saved pipeline has no other"
    before = digest_teacher(folder)
    for file in files:
        data = file.read_bytes()
        put(file, data + b" ")
        if file.name == "model_index.json":
            put(file, data.replace(b"{", b"{ ", 1))
        assert digest_teacher(folder) != before, file
        put(file, data)
    assert digest_teacher(folder) == before


def test_where_only_a_variant_lies_it_counts(folder: Path) -> None:
    plain = folder / "vae/diffusion_pytorch_model.safetensors"
    variant = plain.with_name("diffusion_pytorch_model.fp16.safetensors")
    variant.write_bytes(plain.read_bytes())
    plain.unlink()
    assert variant in list_pipeline_files(folder)
    before = digest_teacher(folder)
    put(variant, b"other")
    assert digest_teacher(folder) != before


@pytest.mark.parametrize("part", ["../outside", "/etc", "a/b", "."])
def test_an_index_cannot_name_a_part_outside(folder: Path, part: str) -> None:
    put(folder.parent / "outside/config.json", b"{}")
    index = json.loads((folder / "model_index.json").read_text())
    put(folder / "model_index.json", json.dumps({**index, part: ["diffusers", "X"]}).encode())
    assert all(file.resolve().is_relative_to(folder.resolve()) for file in list_pipeline_files(folder))
    assert len(list_pipeline_files(folder)) == sum(path.is_file() for path in folder.rglob("*"))


@pytest.mark.parametrize("data", [b"", b"[]", b"[" * 100_000, b"\xff"])
def test_an_index_that_does_not_read_is_named(folder: Path, data: bytes) -> None:
    put(folder / "model_index.json", data)
    with pytest.raises(DataError, match=r"model_index\.json"):
        digest_teacher(folder)


def test_of_reward_weights_what_is_read_counts(tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"w", "vocab.txt": b"a"}
    for name, data in files.items():
        put(tmp_path / name, data)
    addresses = {"pickscore": str(tmp_path)}
    before = digest_weights({"pickscore"}, addresses)
    put(tmp_path / "README.md", b"hello")
    earlier = {"weights:pickscore": digests.digest(tmp_path)}
    assert digest_weights({"pickscore"}, addresses) == before != earlier
    assert digest_weights({"pickscore"}, addresses, earlier) == earlier, "a stage that DMDR 0.1 began keeps its digest"
    assert digest_weights({"pickscore"}, addresses, {"weights:pickscore": "ab" * 32}) == before
    put(tmp_path / "vocab.txt", b"b")
    assert digest_weights({"pickscore"}, addresses) != before
