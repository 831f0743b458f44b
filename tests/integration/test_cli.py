"""The command `dmdr`: what it refuses before anything starts, and what it tells about a store."""

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
import yaml

from dmdr.config.stages import STAGES
from dmdr.errors import ConfigError
from dmdr.metrics.scorecard import Figures, MetricRow, ModelOnCard, PairedDifference
from flows import cli
from flows.launch import process
from flows.prefect_support import embedded_server
from stages.reports.scorecard_text import format_scorecard
from stages.runtime.preloaded import start_host
from stages.store.artifacts import Artifact
from tests.support.sealing import PROVENANCE

ROOT = Path(__file__).parents[2]
FIGURES = Figures(
    models=(
        ModelOnCard(name="student", steps=4, guidance_scale=1.0, nfe=4),
        ModelOnCard(name="teacher", steps=25, guidance_scale=3.0, nfe=50),
    ),
    metrics=(
        MetricRow(name="strict", model="student", mean=0.5, low=0.4, high=0.6, n=9, broken=0, trained_on=False),
        MetricRow(name="strict", model="teacher", mean=0.25, low=0.2, high=0.3, n=9, broken=0, trained_on=False),
        MetricRow(name="lab-conv", model="student", mean=0.7, low=0.6, high=0.8, n=9, broken=0, trained_on=True),
    ),
    paired=(PairedDifference(metric="strict", a="student", b="teacher", difference=0.25, low=0.1, high=0.4),),
)


def sealed(store: Path, stage: str, tmp_path: Path) -> Artifact:
    """A sealed artifact of run "one" with the file words/greeting.txt in it."""
    folder = tmp_path / f"made-{stage}"
    (folder / "words").mkdir(parents=True)
    (folder / "words" / "greeting.txt").write_text("hello")
    artifact = Artifact(str(store), "one", stage)
    artifact.claim({"seed": 1}, {})
    artifact.seal(folder, facts={}, provenance=PROVENANCE.model_copy(update={"duration_s": 65.0}))
    return artifact


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], "Missing command"),
        (["rum"], "'rum'"),
        (["run"], "'CONFIG'"),
        (["run", "a.yaml", "--sore", "x"], "--sore"),
        (["run", "a.yaml", "b.yaml"], "b.yaml"),
        (["pull", "r", "joints", "x"], "'joints'"),
        (["pull", "r", "export", "x", "--form", "zip"], "'zip'"),
        (["render", "a.yaml", "--store", "s3://b", "--stage", "joints"], "'joints'"),
        (["render", "a.yaml", "--store", "s3://b", "--stage", "joint", "--attempt", "0"], "--attempt"),
        (["evaluate", "a.yaml", "--pipeline", "p", "--steps", "0"], "--steps"),
        (["evaluate", "a.yaml", "--pipeline", "p", "--steps", "4", "--guidance", "much"], "--guidance"),
        (["plan", "a.yaml", "--gpu", "abacus"], "h100-80"),
        (["tables"], "'SPEC'"),
        (["tables", "t.yaml", "--seeds"], "--seeds"),
        (["tables", "t.yaml", "--seeds", "-1"], "'-1'"),
        (["tables", "t.yaml", "--seeds", "0", "one"], "'one'"),
        (["teachers", "publish", "lab:flow", "--as", "flow"], "--to"),
        (["lab", "bulid"], "dmdr lab build"),
        (["lab", "build", "flow"], "--out"),
        (["lab", "build", "flwo", "--out", "x"], "'flwo' is not one of 'flow'"),
        (["lab", "build", "flow", "--uot", "x"], "--uot"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exits_with_64(
    arguments: list[str], names: str, capsys: pytest.CaptureFixture
):
    assert cli.main(arguments) == 64
    error = capsys.readouterr().err
    assert error.startswith("dmdr") and names in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "shows"),
    [
        (["--help"], "exit codes: 0 sealed, 64 config"),
        (["run", "--help"], "exit codes: 0 sealed, 64 config"),
        (["teachers", "publish", "-h"], "--revision REV"),
        (["stage", "--help"], "python -m stages"),
        (["stage", "joint", "--help"], "python -m stages"),
        (["lab", "build", "--help"], "--out"),
    ],
)
def test_help_reaches_the_command_it_asks_about(arguments: list[str], shows: str, capsys: pytest.CaptureFixture):
    assert exit_code(arguments) == 0
    help_text = capsys.readouterr().out
    assert "usage:" in help_text.lower()
    assert shows in help_text


def test_render_prints_the_first_attempt_or_the_one_it_is_asked_for(
    tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture
):
    about = {"image": f"images.example.org/dmdr-train@sha256:{'1' * 64}"}
    config = str(tiny_config(execution={"device": "cpu", "cluster": about}))
    for options, name in [([], "dmdr-tiny-joint-1"), (["--attempt", "12"], "dmdr-tiny-joint-12")]:
        assert cli.main(["render", config, "--stage", "joint", "--store", "s3://b/p", *options]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["metadata"]["name"] == name


def test_a_stage_reads_its_own_arguments(monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr("stages.__main__.main", lambda arguments: calls.append(arguments) or 66)
    lines = [["joint", "--config", "a.yaml", "--run", "r"], ["--config", "a.yaml", "joint"], ["joint", "--", "-x"], []]
    assert [cli.main(["stage", *line]) for line in lines] == [66] * 4
    assert calls == lines


def exit_code(arguments: list[str]) -> int:
    """Of a command line, whether its command returns or leaves."""
    try:
        return cli.main(arguments)
    except SystemExit as leaving:
        return leaving.code


@pytest.mark.parametrize(
    "options",
    [["--seeds", "0", "1", "2"], ["--seeds", "0", "--seeds", "1", "--seeds", "2"], ["--seeds=0", "--seeds", "1", "2"]],
)
@pytest.mark.parametrize("first", [True, False])
def test_seeds_follow_one_option_or_several(options: list[str], first: bool, monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr("flows.commands.run.run_tables", lambda *arguments: calls.append(arguments) or 0)
    rest = ["--store", "s"]
    assert cli.main(["tables", "t.yaml", *(options + rest if first else rest + options)]) == 0
    assert cli.main(["tables", "t.yaml"]) == 0
    assert calls == [("t.yaml", [0, 1, 2], "s", None, None), ("t.yaml", None, "runs", None, None)]


@pytest.mark.process
def test_a_shell_completes_commands_options_and_choices():
    command = [sys.executable, "-c", "import sys; from flows.cli import main; sys.exit(main())"]
    for words, offers in [
        ("dmdr p", ["plan", "promote", "pull"]),
        ("dmdr run a.yaml --st", ["--store"]),
        ("dmdr plan a.yaml --gpu h", ["h100-80", "h200"]),
        ("dmdr render a.yaml --stage e", ["export", "evaluate"]),
    ]:
        asks = {"_DMDR_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run(command, cwd=ROOT, env=os.environ | asks, capture_output=True, text=True, check=True)
        assert done.stdout.split() == offers
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # the shell of the command, not the one we run in
    script = subprocess.run(
        [*command, "--show-completion", "bash"],
        cwd=ROOT,
        env=os.environ | named,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "complete -o default -F _dmdr_completion dmdr" in script.stdout


@pytest.mark.process
def test_help_is_quick():
    """Half a second of CPU is the limit; pydantic, Prefect and the stores would take most of it."""
    code = (
        "import flows.cli; flows.cli.main(['--help']); import resource as r, sys; u = r.getrusage(r.RUSAGE_SELF); "
        "print(u.ru_utime + u.ru_stime, *{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, *modules = done.stdout.splitlines()[-1].split()
    assert float(seconds) < 0.5
    assert not {"pydantic", "prefect", "rich", "fsspec", "yaml"} & set(modules)


@pytest.mark.parametrize(
    ("changes", "code", "told"),
    [
        ({"studnet": {"steps": 2}}, 64, "did you mean student?"),
        ({"student": {"steps": 0}}, 64, "student.steps"),
        ({"student": {"steps": 2, "lora_rank": 4}}, 64, "form: lora"),
        ({"teacher": {"path": "lab:flow", "guidance_scale": 0.5}}, 64, "guidance_scale"),
        ({"teacher": {"path": "/no/such/folder", "guidance_scale": 3.0}}, 66, "/no/such/folder"),
        ({"teacher": {"path": "/no/such.safetensors", "guidance_scale": 3.0}}, 64, "teacher.parts is missing"),
        (
            {"teacher": {"path": "/no/such.safetensors", "parts": "lab:flow", "guidance_scale": 3.0}},
            66,
            "/no/such.safetensors",
        ),
        ({"export": {"forms": ["pipeline", "lora"]}}, 64, "take lora out, or set form: lora"),
        ({"prompts": {"sources": ["/no/such/prompts.txt"]}}, 66, "/no/such/prompts.txt"),
    ],
)
def test_run_refuses_bad_input_in_one_line(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture, changes: dict, code: int, told: str
):
    assert cli.main(["run", str(tiny_config(**changes)), "--store", str(tmp_path / "store")]) == code
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "store").exists()


def test_tables_refuses_bad_input_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    spec = tmp_path / "t.yaml"
    spec.write_text("tabel: T\n")
    for arguments, code in (([str(spec)], 64), (["no-such.yaml"], 66)):
        assert cli.main(["tables", *arguments, "--store", str(tmp_path / "store")]) == code
        error = capsys.readouterr().err
        assert error.startswith("dmdr: table ")
        assert error.count("\n") == 1
    assert not (tmp_path / "store").exists()


def test_run_of_a_config_that_is_not_there_exits_with_66(capsys: pytest.CaptureFixture):
    assert cli.main(["run", "no-such.yaml"]) == 66
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.process
def test_run_ends_with_the_exit_code_of_the_stage(tiny_config: Callable[..., Path], tmp_path: Path):
    """The whole command, without a server: the stage's own line, and nothing of Prefect's."""
    config = tiny_config()
    (tmp_path / "train.txt").write_text("")
    command = [sys.executable, "-m", "flows.cli", "run", str(config), "--store", str(tmp_path / "store")]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    home = {"PREFECT_HOME": str(tmp_path / "prefect")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=clean | home)
    assert done.returncode == 65
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["prompts"]
    assert not (tmp_path / "prefect" / "prefect.db").exists()


def test_status_tells_sealed_open_and_not_started(tmp_path: Path, capsys: pytest.CaptureFixture):
    import torch

    store = tmp_path / "store"
    sealed(store, "prompts", tmp_path)
    open_stage = Artifact(str(store), "one", "cold_start")
    open_stage.claim({}, {})
    for step in (50, 100):
        open_stage.checkpoints(2).save(step, {"weight": torch.zeros(1)}, {})
    assert cli.main(["status", "one", "--store", str(store)]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == list(STAGES)
    assert [line.split("|")[2].strip() for line in lines] == ["sealed", "open, step-00000100", *["not started"] * 3]
    assert "0:01:05" in lines[0]


def test_pull_gives_the_sealed_files_and_nothing_else(tmp_path: Path):
    sealed(tmp_path / "store", "export", tmp_path)
    target = tmp_path / "new" / "pulled"
    assert cli.main(["pull", "one", "export", str(target), "--store", str(tmp_path / "store")]) == 0
    assert [path.relative_to(target).as_posix() for path in target.rglob("*.*")] == ["words/greeting.txt"]
    assert [path.name for path in target.parent.iterdir()] == ["pulled"]


def test_pull_refuses_what_is_not_sealed_is_damaged_or_would_be_mixed(tmp_path: Path, capsys: pytest.CaptureFixture):
    store, target = tmp_path / "store", tmp_path / "pulled"
    pull = ["pull", "one", "export", str(target), "--store", str(store)]
    assert cli.main(pull) == 66
    artifact = sealed(store, "export", tmp_path)
    Path(artifact.address, "words", "greeting.txt").write_text("hullo")
    assert cli.main(pull) == 65
    assert not target.exists()
    shutil.rmtree(store)
    sealed(store, "export", tmp_path / "again")
    target.mkdir()
    (target / "mine").touch()
    assert cli.main(pull) == 64
    assert capsys.readouterr().err.count("\n") == 3


def test_a_scorecard_lines_up_and_marks_what_was_trained_on():
    text = format_scorecard(FIGURES)
    better, fewer, scores, differences = text.split("\n\n")
    assert "better than its teacher" in better and "NFE" not in fewer
    assert len({len(line) for line in scores.splitlines()}) == 1
    assert "teacher: 25 steps, 50 NFE, CFG 3" in scores
    assert "lab-conv (trained on)" in scores
    assert "strict (trained on)" not in scores
    assert "+0.250 [+0.100, +0.400]" in differences


@pytest.mark.process
@pytest.mark.parametrize("forked", [False, True])
def test_a_process_gives_its_lines_as_they_come_and_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: bool
):
    lines: list[str] = []
    (tmp_path / "ends.py").write_text("import sys; print('out'); print('err', file=sys.stderr); sys.exit(65)")
    (tmp_path / "dies.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    host = start_host(["colorsys"]) if forked else None
    assert process.run_module("ends", [], say=lines.append, host=host) == 65
    assert lines == ["out", "err"]
    assert process.run_module("dies", [], say=None, host=host) == 128 + 9


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent death signal is Linux's own")
@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_the_flow_the_stage_is_asked_to_stop(tmp_path: Path, number: signal.Signals, forked: bool):
    """SIGINT is caught by the flow, which forwards it; after SIGKILL the kernel tells the stage."""
    stage = tmp_path / "stage.py"
    stage.write_text(
        "import pathlib, signal, sys, time\n"
        "here = pathlib.Path(__file__).parent\n"
        "signal.signal(signal.SIGTERM, lambda *_: ((here / 'checkpoint').touch(), sys.exit(75)))\n"
        "(here / 'started').touch()\n"
        "time.sleep(60)\n"
    )
    flow = (
        "import sys; from flows.launch import process; from stages.runtime.preloaded import start_host; "
        f"process.run_module('stage', [], say=None, host={'start_host([])' if forked else None})"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", flow],
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    appears(tmp_path / "started")
    started.send_signal(number)
    assert started.wait(10) != 0
    appears(tmp_path / "checkpoint")


@pytest.mark.process
def test_ctrl_c_stops_the_stage_after_a_checkpoint_and_the_same_command_goes_on(
    tiny_config: Callable[..., Path], tmp_path: Path
):
    """A terminal's Ctrl-C, which goes to the whole foreground group."""
    training = {"batch_size": 2, "fake_updates": 2, "student": {"learning_rate": 1e-4}}
    training |= {"fake_score": {"learning_rate": 2e-4}}
    changes = {"cold_start": {**training, "updates": 4000}, "execution": {"device": "cpu", "checkpoint_every": 1}}
    config, store = tiny_config(**changes), tmp_path / "store"
    command = [sys.executable, "-m", "flows.cli", "run", str(config), "--store", str(store)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    run = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        env=clean | {"PREFECT_HOME": str(tmp_path / "prefect")},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    checkpoints = store / "tiny/cold_start/checkpoints"
    while not list(checkpoints.glob("*/manifest.json")):
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    _, told = run.communicate(timeout=60)
    assert run.returncode == 75
    *_, last = told.splitlines()
    newest = max(path.parent.name for path in checkpoints.glob("*/manifest.json"))
    update = int(newest.removeprefix("step-"))
    assert last == f"cold_start: stopped after update {update} of 4000; repeat the command to go on"
    assert "Traceback" not in told and "stage 1 of 5" in told


@pytest.mark.process
def test_ctrl_c_leaves_prefects_embedded_server_alive_until_the_flow_has_ended(tmp_path: Path):
    """A terminal sends SIGINT to every process of its foreground group, the server among them."""
    flow = (
        "import pathlib, sys, time\n"
        "from flows.commands.run import run_chain\n"
        "def waiting():\n"
        "    from prefect import flow\n"
        "    def wait():\n"
        f"        pathlib.Path({str(tmp_path / 'started')!r}).touch()\n"
        "        time.sleep(60)\n"
        "    flow(wait)()\n"
        "sys.exit(run_chain(None, waiting, on_cluster=True))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    started = subprocess.Popen(
        [sys.executable, "-c", flow],
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        env=environment | {"PREFECT_HOME": str(tmp_path / "prefect")},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    appears(tmp_path / "started", 120)
    os.killpg(started.pid, signal.SIGINT)
    _, told = started.communicate(timeout=60)
    assert (started.returncode, told) == (75, "starting Prefect's embedded server\n")


def test_where_no_server_is_installed_that_is_said(monkeypatch: pytest.MonkeyPatch):
    """As in the image dmdr-flow."""
    monkeypatch.setitem(sys.modules, "prefect.server.api.server", None)
    with pytest.raises(ConfigError, match="is not installed.*; set PREFECT_API_URL to the address of one that runs"):
        embedded_server.prepare_server()


def appears(path: Path, seconds: float = 20) -> None:
    """Wait until a file is there."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)
