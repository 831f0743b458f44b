"""python -m stages: exit codes, one line for a user's error, a sealed stage is skipped, SIGTERM at any time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dmdr.errors import DataError, NonFinite, StoreError
from tests.support.stage_process import ROOT, refused, run_stages, stages

pytestmark = pytest.mark.process


def test_seal_once_skip_afterwards_and_guard_the_address(tmp_path: Path, tiny_config: Callable[..., Path]) -> None:
    config = str(tiny_config())
    first = stages("prompts", "--config", config, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "prompts: sealed at runs/tiny/prompts after" in first.stdout
    assert "prompts 20/20" in first.stderr
    address = tmp_path / "runs/tiny/prompts"
    before = {path: path.stat().st_mtime_ns for path in address.rglob("*")}
    assert not [path for path in before if path.name.startswith(".")], "no scratch folder is left"

    again = stages("prompts", "--config", config, cwd=tmp_path)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout == "prompts: sealed already at runs/tiny/prompts\n"
    assert {path: path.stat().st_mtime_ns for path in address.rglob("*")} == before

    (tmp_path / "train.txt").write_text("another prompt\n")
    done = stages("prompts", "--config", config, cwd=tmp_path)
    refused(done, 64, "input source:0 is", "--run", "runs/tiny/prompts")


def test_a_sealed_stage_never_imports_torch() -> None:
    heavy = "import sys, stages.__main__; sys.exit('torch' in sys.modules or 's3fs' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", heavy], cwd=ROOT).returncode == 0


def test_user_errors(tmp_path: Path, tiny_config: Callable[..., Path]) -> None:
    """One of them from a new interpreter."""
    config = str(tiny_config())
    for arguments in (["prompts"], [], ["nope", "--config", config], ["prompts", "--config", config, "--stor", "x"]):
        refused(run_stages(*arguments, cwd=tmp_path), 64, "--help")
    refused(stages("prompts", "--config", "gone.yaml", cwd=tmp_path), 66, "gone.yaml does not exist")
    refused(run_stages("prompts", "--config", config, "--run", "../x", cwd=tmp_path), 64, "run name '../x'")
    refused(run_stages("prompts", "--config", config, "--store", "", cwd=tmp_path), 64, "--store is empty")
    refused(run_stages("cold_start", "--config", config, cwd=tmp_path), 66, "needs prompts", "python -m stages prompts")
    (tmp_path / "file").write_text("")
    refused(run_stages("prompts", "--config", config, "--store", "file", cwd=tmp_path), 74, "file/tiny/prompts")
    (tmp_path / "tiny.yaml").write_text("run: tiny\nrun: tiny\n")
    refused(run_stages("prompts", "--config", config, cwd=tmp_path), 64, "given twice")
    assert not (tmp_path / "runs").exists(), "a refusal leaves nothing behind"


def test_a_teacher_that_cannot_be_read(tmp_path: Path, tiny_config: Callable[..., Path], tiny_sd3_folder: Path) -> None:
    copy = Path(shutil.copytree(tiny_sd3_folder, tmp_path / "copy"))
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    file.symlink_to("nowhere")
    config = str(tiny_config())
    refused(run_stages("prompts", "--config", config, "--teacher", str(copy), cwd=tmp_path), 66, str(file), "nowhere")
    (copy / "model_index.json").unlink()
    (copy / "model_index.json").mkdir()
    refused(run_stages("prompts", "--config", config, "--teacher", str(copy), cwd=tmp_path), 65, "no model_index.json")


def test_help_says_what_to_do(tmp_path: Path) -> None:
    done = stages("--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("cold_start", "--config", "--run", "--store", "example", "exit codes"):
        assert word in done.stdout


def test_sigterm_before_the_stage_began(tmp_path: Path, tiny_config: Callable[..., Path]) -> None:
    """As soon as the handler stands, and somewhat later, in the middle of the imports."""
    for delay in (0.0, 1.0):
        command = [sys.executable, "-m", "stages", "prompts", "--config", str(tiny_config())]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as child:
            while not catches(child.pid, signal.SIGTERM):
                time.sleep(0.002)
            time.sleep(delay)
            child.send_signal(signal.SIGTERM)
            said = child.communicate(timeout=60)[1]
        assert child.returncode == 75, said
        assert "Traceback" not in said
        assert not (tmp_path / "runs/tiny/prompts/record.json").exists()


def catches(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    caught = Path(f"/proc/{process}/status").read_text().split("SigCgt:")[1].split()[0]
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
    ("raised", "code", "lines"),
    [
        (DataError("two\nlines"), 65, ["prompts: two lines"]),
        (NonFinite("loss_dm is nan"), 70, ["prompts: loss_dm is nan"]),
        (StoreError("cannot write"), 74, ["prompts: cannot write"]),
        (OSError(28, "No space left on device"), 74, ["prompts: cannot write", "No space left"]),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 74, ["prompts: cannot write"]),
        (RuntimeError("a bug"), 70, ["prompts: a fault of DMDR: RuntimeError: a bug", "its stack is in"]),
        (FileNotFoundError(2, "a bug"), 70, ["a bug", "its stack is in"]),
    ],
)
def test_what_a_stage_raises(
    raised: Exception,
    code: int,
    lines: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    import stages.__main__ as entry

    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers, (
        "an import catches none"
    )

    def prepare(*given: object) -> None:
        raise raised

    monkeypatch.setattr(entry, "prepare", prepare)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert entry.main(["prompts", "--config", "any"]) == code
    told = capsys.readouterr().err
    for line in lines:
        assert line in told
    assert told.count("\n") == 1
