"""A teacher folder with something wrong in it: one clear line, and never a network that is part noise."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmdr.errors import ConfigError, DataError, InputMissing
from dmdr.teacher import digests
from dmdr.teacher.load import digest_teacher, find_teacher, load_teacher

NETWORK = {"sd3": "transformer", "sdxl": "unet", "z_image": "transformer", "flux": "transformer"}


@pytest.fixture(params=NETWORK)
def folder(request, tmp_path) -> Path:
    """A copy of a tiny teacher, to be spoilt."""
    return Path(shutil.copytree(request.getfixturevalue(f"tiny_{request.param}_folder"), tmp_path / request.param))


def weights(folder: Path, part: str) -> Path:
    name = NETWORK[folder.name] if part == "network" else part
    (file,) = (folder / name).glob("*.safetensors")
    return file


def name_in(tensors: dict[str, torch.Tensor]) -> str:
    """A tensor in the middle of the file, on which no other depends."""
    return sorted(name for name in tensors if name.endswith(".weight"))[len(tensors) // 4]


def test_without_weights_it_is_the_same_but_for_the_values_of_its_network(folder):
    """Nothing of them is read: the file is gone."""
    whole = load_teacher(folder)
    weights(folder, "network").unlink()
    bare = load_teacher(folder, weights=False)
    expected = {name: (value.shape, value.dtype) for name, value in whole.network.state_dict().items()}
    assert {name: (value.shape, value.dtype) for name, value in bare.network.state_dict().items()} == expected
    assert all(parameter.is_meta for parameter in bare.network.parameters())
    assert not any(parameter.requires_grad for parameter in bare.network.parameters()) and not bare.network.training
    latents = torch.randn(1, whole.latent_shape[0], 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(bare.decode(latents), whole.decode(latents))
    assert {name for name, _ in bare.network.named_buffers()} == {name for name, _ in whole.network.named_buffers()}


@pytest.mark.parametrize("part", ["network", "vae", "text_encoder"])
def test_a_missing_tensor_is_named(folder, part):
    file = weights(folder, part)
    tensors = load_file(file)
    gone = name_in(tensors)
    del tensors[gone]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(DataError, match=f"{file.parent.name} lacks the tensor {gone}; fetch the teacher again") as said:
        load_teacher(folder, resolution=16)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("part", ["network", "vae", "text_encoder"])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder, part):
    file = weights(folder, part)
    tensors = load_file(file)
    name = name_in(tensors)
    right = tuple(tensors[name].shape)
    tensors[name] = torch.zeros(*right, 2)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(DataError) as said:
        load_teacher(folder, resolution=16)
    line = str(said.value).replace("[", "(").replace("]", ")")
    wanted = [name, f"({', '.join(map(str, right))}", f"({', '.join(map(str, (*right, 2)))})"]
    assert all(each in line for each in wanted), line
    assert "\n" not in line


def test_a_truncated_file_is_named(folder):
    file = weights(folder, "network")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match=f"{file} is damaged .*; fetch the teacher again"):
        load_teacher(folder)


def dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def endless(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def forbidden(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path.chmod(0)


@pytest.mark.parametrize("spoil", [dangling, endless, a_folder, forbidden])
@pytest.mark.parametrize("part", ["network", "vae", "text_encoder"])
def test_a_file_that_cannot_be_read_is_named(folder, part, spoil):
    """Or its folder, if it is another; never left out of what the teacher is known by."""
    file, whole = weights(folder, part), digest_teacher(folder)
    digests.digest.cache_clear()
    spoil(file)
    with pytest.raises((InputMissing, DataError)) as said:
        assert digest_teacher(folder) != whole
        load_teacher(folder, resolution=16)
    assert str(file.parent if spoil is a_folder else file) in str(said.value) and "\n" not in str(said.value)


def test_what_tools_leave_beside_the_files_is_no_part_of_a_teacher(folder):
    """As `hf download --local-dir` writes it, with the time of each fetch, and git and macOS."""
    before = digest_teacher(folder)
    leftovers = [".gitattributes", ".git/config", "vae/._config.json", ".cache/huggingface/download/vae/x.metadata"]
    for number, name in enumerate(leftovers):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{time.time()} {number}")
        digests.digest.cache_clear()
        assert digest_teacher(folder) == before
    (folder / ".git/dangling").symlink_to("nowhere")
    load_teacher(folder, resolution=16)
    (folder / "vae/config.json").write_text((folder / "vae/config.json").read_text() + " ")
    digests.digest.cache_clear()
    assert digest_teacher(folder) != before


def test_a_folder_that_cannot_be_listed_is_named(folder, request):
    for inner in (folder / "vae", folder):
        request.addfinalizer(lambda inner=inner: inner.chmod(0o700))
        forbidden(inner)
        with pytest.raises(InputMissing, match=f"(?i){inner}.*permission"):
            digest_teacher(find_teacher(str(folder)))
        inner.chmod(0o700)


def test_a_family_that_nobody_wrote_is_named(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "KandinskyPipeline"}))
    known = "StableDiffusion3Pipeline, StableDiffusionXLPipeline, ZImagePipeline, FluxPipeline"
    with pytest.raises(DataError, match=f"is a KandinskyPipeline; DMDR knows {known}"):
        load_teacher(folder)


def test_what_is_no_teacher_is_named(tmp_path):
    with pytest.raises(InputMissing, match="nowhere: no such folder"):
        find_teacher(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no model_index.json; save the pipeline there"):
        find_teacher(str(tmp_path))


@pytest.mark.process
def test_a_pinned_commit_comes_from_the_hub_once(tiny_sd3_folder, tmp_path):
    """A small hub over HTTP has files that a pipeline does not need; the second time there is no network."""
    commit, home = "0123456789abcdef0123456789abcdef01234567", tmp_path / "home"
    repository = Path(shutil.copytree(tiny_sd3_folder, tmp_path / "repository"))
    for spare in ("sd3.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors", "README.md"):
        (repository / spare).write_bytes(b"not to be fetched")
    with hub({("small", "teacher", commit): repository}) as (address, asked):
        found = resolved_elsewhere(f"hub:small/teacher@{commit}", home, address)
        assert found.returncode == 0, found.stderr
        folder = Path(found.stdout.strip())
        assert digest_teacher(folder) == digest_teacher(tiny_sd3_folder)
        assert not any("sd3.safetensors" in each or "fp16" in each or "README" in each for each in asked)
        gone = resolved_elsewhere(f"hub:small/teacher@{'f' * 40}", home, address)
    again = resolved_elsewhere(f"hub:small/teacher@{commit}", home, None)
    assert again.stdout == found.stdout
    lost = resolved_elsewhere(f"hub:small/other@{commit}", home, None)
    for failed in (gone, lost):
        assert failed.stderr.strip().splitlines()[-1].startswith("dmdr.errors.InputMissing: teacher.path hub:small/")
        assert "cannot be fetched" in failed.stderr and "set HF_TOKEN" in failed.stderr


@pytest.mark.parametrize("path", ["hub:small/teacher", "hub:small/teacher@main", "hub:teacher@" + "0" * 40])
def test_a_teacher_of_a_hub_must_be_pinned(path):
    with pytest.raises(ConfigError, match="pin the commit, 40 hex digits"):
        find_teacher(path)


def resolved_elsewhere(path: str, home: Path, address: str | None) -> subprocess.CompletedProcess:
    """`teacher.resolve` in a process of its own, for the hub's library reads its settings at import; None: offline."""
    settings = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    if address:
        settings |= {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    code = "import sys; from dmdr.teacher.load import find_teacher; print(find_teacher(sys.argv[1]))"
    command = [sys.executable, "-c", code, path]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120)


@contextmanager
def hub(repositories: dict[tuple[str, str, str], Path]) -> Iterator[tuple[str, list[str]]]:
    """What a model hub answers, for repositories by owner, name and commit; its address and the paths it was asked."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def say(self, code: int, content: bytes, **headers: str) -> None:
            self.send_response(code)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_GET(self) -> None:
            asked.append(self.path)
            parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                owner, name, kind, commit = *parts[2:5], parts[5]
            else:
                owner, name, kind, commit = parts[:4]
            folder = repositories.get((owner, name, commit))
            if folder is None:
                return self.say(404, b"", X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id: " + commit)
            files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
            if kind == "revision":
                siblings = [{"rfilename": file} for file in files]
                content = {"_id": "1", "id": f"{owner}/{name}", "sha": commit, "private": False, "siblings": siblings}
                return self.say(200, json.dumps(content).encode(), Content_Type="application/json")
            if kind == "tree":
                tree = [
                    {"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": oid(folder / file)}
                    for file in files
                ]
                return self.say(200, json.dumps(tree).encode(), Content_Type="application/json")
            file = folder.joinpath(*parts[4:])
            return self.say(200, file.read_bytes(), ETag=f'"{oid(file)}"', X_Repo_Commit=commit)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
