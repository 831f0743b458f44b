"""A teacher is known by the files that its index names, in the form that is read; nothing else counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from dmdr.errors import DataError
from dmdr.rewards.weights import digest_weights
from dmdr.teacher import digests, hub
from dmdr.teacher.load import digest_teacher, digest_teacher_as_before, find_diffusers_folder, is_teacher
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


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the hub's client takes for a repository, copying what it is asked for."""
    theirs, cache = tmp_path / "repository", tmp_path / "cache"

    def snapshot_download(repo: str, *, allow_patterns: list, ignore_patterns: list, **options: object) -> str:
        names = [path.relative_to(theirs).as_posix() for path in theirs.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            put(cache / name, (theirs / name).read_bytes())
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub, "find_problem", lambda *of: None)
    return theirs


@pytest.mark.parametrize("is_half", [False, True])
def test_of_a_repository_the_plain_weights_are_fetched_or_else_the_variant(
    tiny_sd3_folder: Path, repository: Path, is_half: bool
) -> None:
    shutil.copytree(tiny_sd3_folder, repository)
    for file in list(repository.rglob("*.safetensors")):
        shutil.copy(file, file.with_name(f"{file.stem}.fp16.safetensors"))
        shutil.copy(file, file.with_name(f"{file.stem}.fp16-00001-of-00002.safetensors"))
        if is_half:
            file.unlink()
    put(repository / "README.md", b"hello")
    folder = find_diffusers_folder("teacher.path", f"hub:owner/name@{'a' * 40}")
    fetched = {file.name for file in folder.rglob("*") if file.is_file()}
    assert any("fp16" in name for name in fetched) == is_half
    assert "README.md" not in fetched
    if is_half:
        assert any("fp16" in file.name for file in list_pipeline_files(folder))
    else:
        assert digest_teacher(folder) == digest_teacher(tiny_sd3_folder), "wherever it was fetched from"
