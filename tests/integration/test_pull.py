"""`dmdr pull` of an export from a folder and from S3: whole or not there, and what is here is not fetched again."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows import cli
from flows.commands.pull import WITH_EACH
from stages.store.artifacts import Artifact
from stages.store.download import CHUNK, download
from tests.support.s3_server import BUCKET, spoil
from tests.support.sealing import PROVENANCE

ROOT = Path(__file__).parents[2]
FILES = {
    "SHA256SUMS": 200,
    "lora/pytorch_lora_weights.safetensors": 5000,
    "pipeline/model_index.json": 300,
    "pipeline/unet/a b.safetensors": 70_000,
    "pipeline/vae/empty.txt": 0,
    "provenance.json": 400,
}
PIPELINE = {name for name in FILES if name.startswith("pipeline/")} | set(WITH_EACH)


def sealed(store: str, folder: Path, sizes: dict[str, int] = FILES, stage: str = "export") -> dict[str, bytes]:
    """Seal an artifact of run "one" with files of these sizes; returns them."""
    contents = {name: random.Random(name).randbytes(size) for name, size in sizes.items()}
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    artifact = Artifact(store, "one", stage)
    artifact.claim({"seed": 1}, {})
    artifact.seal(folder, facts={}, provenance=PROVENANCE)
    return contents


def found(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def partial(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


def test_a_form_comes_alone_and_whole(store, tmp_path):
    contents = sealed(store, tmp_path / "made")
    target = tmp_path / "new" / "pulled"
    assert cli.main(["pull", "one", "export", "--form", "pipeline", str(target), "--store", store]) == 0
    assert found(target) == {name: contents[name] for name in PIPELINE}
    assert [path.name for path in target.parent.iterdir()] == ["pulled"]
    everything = tmp_path / "everything"
    everything.mkdir()
    assert cli.main(["pull", "one", "export", str(everything), "--store", store]) == 0
    assert found(everything) == contents


def test_what_is_here_is_kept_and_what_is_begun_is_continued(store, tmp_path):
    contents = sealed(store, tmp_path / "made")
    here, name = tmp_path / "here", "pipeline/unet/a b.safetensors"
    (here / name).parent.mkdir(parents=True)
    (here / name).write_bytes(contents[name][:50_000])
    (here / "provenance.json").write_bytes(contents["provenance.json"])
    kept = (here / "provenance.json").stat()
    told: list[int] = []
    download(Artifact(store, "one", "export"), sorted(PIPELINE), here, told.append)
    assert found(here) == {each: contents[each] for each in PIPELINE}
    assert (here / "provenance.json").stat().st_mtime_ns == kept.st_mtime_ns
    before = FILES["SHA256SUMS"] + FILES["pipeline/model_index.json"]
    assert told == sorted(told)
    assert before + 50_000 in told, "it went on from there"
    assert before not in told[told.index(before + 50_000) :]
    assert told[-1] == sum(FILES[each] for each in PIPELINE)


@pytest.mark.parametrize("begun", [b"x" * 50_000, b"x" * 70_000, b"x" * 90_000])
def test_what_began_as_another_file_is_fetched_anew(begun, store, tmp_path):
    contents = sealed(store, tmp_path / "made")
    target, name = tmp_path / "pulled", "pipeline/unet/a b.safetensors"
    for each in (name, "weights/of another pull"):
        (partial(target) / each).parent.mkdir(parents=True)
        (partial(target) / each).write_bytes(begun)
    assert cli.main(["pull", "one", "export", "--form", "pipeline", str(target), "--store", store]) == 0
    assert found(target) == {each: contents[each] for each in PIPELINE}
    assert {path.name for path in target.iterdir()} == {"pipeline", *WITH_EACH}


def test_refusals(store, tmp_path, capsys):
    """Each in one line, with its exit code, and the folder does not appear."""
    target = tmp_path / "pulled"

    def told(code: int, *words: str, arguments: tuple[str, ...] = ("one", "export", "--form", "pipeline")) -> None:
        assert cli.main(["pull", *arguments, str(target), "--store", store]) == code
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert all(word in line for word in words), line

    told(66, "export of run one is not sealed at")
    assert list(tmp_path.glob(".*")) == [], "nothing is left of a refusal"
    sealed(store, tmp_path / "made")
    told(66, "has no weights, it was exported as pipeline, lora", arguments=("one", "export", "--form", "weights"))
    told(64, "--form is for the stage export, and the stage is joint", arguments=("one", "joint", "--form", "lora"))
    spoil(store, "one/export/pipeline/unet/a b.safetensors", b"x" * 60_000)
    told(65, "a b.safetensors is damaged: its sha256 is not", "lacks pipeline/unet/a b.safetensors and 2 more of 5")
    spoil(store, "one/export/pipeline/unet/a b.safetensors", None)
    told(65, "a b.safetensors is missing", "lacks pipeline/unet/a b.safetensors")
    spoil(store, "one/export/record.json", b"not a record")
    told(65, "record.json is not JSON")
    assert not target.exists()
    target.mkdir()
    (target / "mine").touch()
    told(64, "exists and is not an empty folder; name a new one", arguments=("one", "export"))
    assert [path.name for path in target.iterdir()] == ["mine"]


def test_a_record_that_was_copied_from_another_run_is_refused(store, tmp_path, capsys):
    sealed(store, tmp_path / "made")
    record = Artifact(store, "one", "export").place.read("record.json")
    Artifact(store, "two", "export").place.create("record.json", record)
    assert cli.main(["pull", "two", "export", str(tmp_path / "pulled"), "--store", store]) == 65
    line = capsys.readouterr().err
    assert "has the record of export of run one: it was copied there" in line
    assert line.count("\n") == 1


def test_a_pull_into_a_folder_that_is_being_pulled_waits_for_nobody(tmp_path, capsys):
    store, target = str(tmp_path / "runs"), tmp_path / "pulled"
    contents = sealed(store, tmp_path / "made")
    partial(target).mkdir()
    handle = os.open(partial(target), os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    pull = ["pull", "one", "export", str(target), "--store", store]
    assert cli.main(pull) == 74
    assert "another pull is writing to" in capsys.readouterr().err
    os.close(handle)
    assert cli.main(pull) == 0
    assert found(target) == contents


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_while_it_downloads_from_s3(number, s3, tmp_path):
    """For real, in the middle of a large file; the next pull keeps what there is and ends with the same bytes."""
    store, target = f"s3://{BUCKET}/killed-{number.name}", tmp_path / "pulled"
    large = "pipeline/unet/large.safetensors"
    contents = sealed(store, tmp_path / "made", {"pipeline/a.json": 100_000, large: 24 * CHUNK})
    command = [sys.executable, "-m", "flows.cli", "pull", "one", "export", "--form", "pipeline", str(target)]
    file = partial(target) / large
    with subprocess.Popen(
        [*command, "--store", store],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    ) as child:
        deadline = time.monotonic() + 60
        while not (file.is_file() and file.stat().st_size):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        child.send_signal(number)
        said = child.communicate(timeout=60)[1]
    assert child.returncode == (-9 if number == signal.SIGKILL else 75)
    assert not target.exists()
    size, kept = file.stat().st_size, (partial(target) / "pipeline/a.json").stat()
    assert 0 < size < 24 * CHUNK
    if number == signal.SIGINT:
        assert f"lacks {large} of 2 files; repeat the command to go on" in said
        assert "Traceback" not in said
    done = subprocess.run([*command, "--store", store], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pulled megabytes 202/202" in done.stderr
    assert found(target) == contents
    assert (target / "pipeline/a.json").stat().st_mtime_ns == kept.st_mtime_ns
    assert not partial(target).exists()
