"""`dmdr run` with changes, a last stage, another run's cold start or only as a question; then `dmdr rm` and `export`.

The stages run in this process: `run_stage` of the tests stands where a process would be started.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from dmdr.config.changes import apply_changes, parse_changes
from dmdr.config.load import load_config, parse_yaml
from dmdr.config.stages import STAGES, StageName
from dmdr.errors import ConfigError
from flows import chain, cli
from flows.commands.config_file import change_config, find_config
from flows.launch import process
from flows.launch.failure import StageFailed
from stages.__main__ import main as run_stage_main
from stages.export import list_checksums
from stages.store.artifacts import Artifact
from tests.support.trained_run import seal_stage, trained_run


def in_process(
    name: StageName, config: str, run: str, store: str, teacher: str | None = None, adopt: str | None = None
) -> None:
    """A stage, in this process."""
    arguments = [name, "--config", config, "--run", run, "--store", store]
    assert run_stage_main([*arguments, *(["--adopt", adopt] if adopt else [])]) == 0


@pytest.fixture
def dmdr(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """`dmdr COMMAND ... --store STORE`, without another process."""
    monkeypatch.setattr("flows.commands.run.run_stage_with_retries", in_process)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr("flows.commands.run.prepare_prefect", lambda **about: False)
    return lambda *arguments: cli.main([*map(str, arguments), "--store", str(tmp_path / "store")])


def sealed(store: Path, run: str) -> list[str]:
    return [stage for stage in STAGES if Artifact(str(store), run, stage).record() is not None]


def test_set_until_and_a_cold_start_of_another_run(
    dmdr: Callable[..., int], tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    config, store = tiny_config(), tmp_path / "store"
    assert dmdr("run", config, "--set", "joint.updates=1", "--until", "cold_start", "--run", "first") == 0
    assert "stopped after cold_start" in capsys.readouterr().out
    assert sealed(store, "first") == ["prompts", "cold_start"]

    other = (
        "run",
        config,
        "--run",
        "second",
        "--from-cold-start",
        "first",
        "--set",
        "joint.student.learning_rate=3e-4",
    )
    assert dmdr(*other, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert shown.count("be copied") == 2 and shown.count("| run ") == 3
    assert not (store / "second").exists(), "it writes nothing"
    assert dmdr(*other, "--until", "joint") == 0
    records = {stage: Artifact(str(store), "second", stage).sealed() for stage in ("prompts", "cold_start", "joint")}
    assert records["cold_start"].provenance.adopted_from == records["prompts"].provenance.adopted_from == "first"
    assert records["joint"].identity["joint.student.learning_rate"] == 3e-4

    capsys.readouterr()
    assert dmdr("run", config, "--run", "second", "--dry-run") == 64, "the joint stage there has another rate"
    rows = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines()[2:]}
    assert "be skipped" in rows["cold_start"] and "be refused" in rows["joint"]
    assert "learning_rate is 0.0003 there, 0.0001 here" in rows["joint"] and "dmdr rm second joint" in rows["joint"]


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--set", "joint.updates"], 64, "is not KEY=VALUE"),
        (["--set", "joint.updaets=3"], 64, "did you mean updates?"),
        (["--set", "seed.x=3"], 64, "--set changes seed.x, but seed is 3"),
        (["--set", "joint: {=3"], 64, "unknown key joint: {"),
        (["--set", "seed=[1"], 64, "--set seed is not YAML"),
        (["--from-cold-start", "tiny"], 64, "which is this run itself"),
        (["--from-cold-start", "nobody"], 66, "there is no run nobody"),
        (["--until", "joints"], 64, "'joints'"),
        (["--run", "My Run"], 64, "must be small letters, digits.*for example my-run"),
        (["--set", "run=My_Run"], 64, "run 'My_Run' must be small letters.*for example my_run"),
    ],
)
def test_wrong_options_are_one_line(
    dmdr: Callable[..., int],
    tiny_config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    options: list[str],
    code: int,
    told: str,
):
    assert dmdr("run", tiny_config(), *options) == code
    error = capsys.readouterr().err
    assert re.search(told, error) and error.count("\n") == 1
    assert not (tmp_path / "store").exists()


def test_a_dry_run_says_what_would_be_refused(
    dmdr: Callable[..., int], tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture
):
    assert dmdr("run", tiny_config(evaluate={"metrics": ["lab-checker"]}), "--dry-run") == 64
    assert "refused: evaluate.metrics asks for lab-checker" in capsys.readouterr().err


def test_settings_of_an_unsealed_stage_can_change_under_the_same_name(
    dmdr: Callable[..., int], tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    """An evaluation that was refused leaves a claim; the same run goes on with other metrics."""
    store = tmp_path / "store"
    trained_run(load_config(tiny_config()), store)
    seal_stage(load_config(tiny_config()), store, "export")
    refused = Artifact(str(store), "tiny", "evaluate")
    refused.claim({"evaluate.metrics": ["lab-checker"]}, {})
    del refused
    assert dmdr("run", tiny_config(), "--dry-run") == 0
    assert "nothing came of it yet" in capsys.readouterr().out
    assert run_stage_main(["evaluate", "--config", str(tiny_config()), "--store", str(store)]) == 0


def test_rm_tells_what_depends_on_it_and_asks(
    dmdr: Callable[..., int],
    tiny_config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    store, config = tmp_path / "store", load_config(tiny_config())
    trained_run(config, store)
    seal_stage(config, store, "export")
    copy = Artifact(str(store), "copy", "joint")
    joint = Artifact(str(store), "tiny", "joint").sealed()
    assert copy.adopt(Artifact(str(store), "tiny", "joint"), joint.identity, joint.inputs) is not None
    assert dmdr("promote", "tiny", "--as", "production") == 0
    capsys.readouterr()

    assert dmdr("rm", "tiny", "joint") == 64, "nobody can answer"
    assert "give --yes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, left in (("", STAGES[:4]), ("y", STAGES[:2])):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        assert dmdr("rm", "tiny", "joint") == 0
        shown = capsys.readouterr().out
        assert "joint, export" in shown and "production is promoted" in shown and "copied by copy" in shown
        assert sealed(store, "tiny") == list(left)
    assert dmdr("pull", "production", "export", tmp_path / "x") == 66
    assert dmdr("rm", "tiny", "joint", "--yes") == 66
    assert "nothing of joint is at" in capsys.readouterr().err
    assert dmdr("rm", "tiny", "--yes") == 0
    assert not (store / "tiny").exists() and sealed(store, "copy") == ["joint"]


def test_rm_leaves_alone_what_is_running(dmdr: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture):
    works = Artifact(str(tmp_path / "store"), "tiny", "joint")
    works.claim({"a": 1}, {})
    assert dmdr("rm", "tiny", "--yes") == 64
    assert "joint of run tiny is running" in capsys.readouterr().err
    assert works.read_claim() is not None


def test_a_run_that_is_not_there(dmdr: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture):
    Artifact(str(tmp_path / "store"), "my-sdxl-2", "joint").claim({"a": 1}, {})
    for name, told in (("My-SDXL", "did you mean my-sdxl-2?"), ("other", "dmdr runs --store")):
        for command in (["status", name], ["rm", name, "--yes"], ["export", name, "--form", "lora", "--out", "x"]):
            assert dmdr(*command) == 66
            error = capsys.readouterr().err
            assert told in error and error.count("\n") == 1


def test_a_finished_run_is_exported_in_another_form(
    dmdr: Callable[..., int],
    tiny_config: Callable[..., Path],
    tiny_sd3_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    store, config = tmp_path / "store", load_config(tiny_config())
    trained_run(config, store)
    seal_stage(config, store, "export")
    before = Artifact(str(store), "tiny", "export").sealed()
    command = partial(dmdr, "export", "tiny", "--form", "single-file", "--out", tmp_path / "mine")
    assert command() == 66, "the teacher is a folder"
    assert "name it with --teacher PATH" in capsys.readouterr().err
    assert command("--teacher", "lab:flow") == 64
    assert "is not the one that the run was made with " in capsys.readouterr().err
    assert command("--teacher", tiny_sd3_folder) == 0
    facts = json.loads((tmp_path / "mine" / "provenance.json").read_text())
    assert set(facts["parity"]) == {"pipeline", "single-file"} and max(facts["parity"].values()) < 1e-4
    assert facts["rewards"] == {"lab-conv": 1.0} and facts["teacher"]["digest"] == before.inputs["teacher"]
    sums = (tmp_path / "mine" / "SHA256SUMS").read_text().splitlines()
    assert set(sums) < set(list_checksums(tmp_path / "mine").splitlines())
    assert Artifact(str(store), "tiny", "export").sealed() == before
    assert dmdr("export", "tiny", "--form", "lora", "--out", tmp_path / "lora", "--teacher", tiny_sd3_folder) == 64
    assert "student.form is full" in capsys.readouterr().err
    assert dmdr("export", "tiny", "--form", "pipeline", "--out", tmp_path / "copied") == 0, "it is sealed, so copied"
    assert (tmp_path / "copied" / "pipeline" / "model_index.json").is_file()


def test_numbers_and_words_of_a_config():
    read = parse_yaml("{a: 2e-4, b: 1E3, c: off, d: [5e-5], e: 007}", "text")
    assert read == {"a": 2e-4, "b": 1000.0, "c": "off", "d": [5e-5], "e": 7}
    assert parse_changes(["joint.rl.rewards.hpsv2.1=2e-1", "x=a=b"]) == {"joint.rl.rewards.hpsv2.1": 0.2, "x": "a=b"}
    changed = apply_changes({"joint": {"rl": {"rewards": {}}}}, {"joint.rl.rewards.hpsv2.1": 0.2}, "--set")
    assert changed == {"joint": {"rl": {"rewards": {"hpsv2.1": 0.2}}}}


def test_a_word_for_a_switch_is_refused_with_what_to_write(tiny_config: Callable[..., Path]):
    with (
        pytest.raises(ConfigError, match="execution.compile is 'yes'; write true or false"),
        change_config(str(tiny_config()), ["execution.compile=yes"]),
    ):
        pass


def test_a_config_that_comes_with_dmdr_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(find_config("quickstart")).run == "quickstart"
    (tmp_path / "quickstart").write_text("")
    assert find_config("quickstart") == "quickstart", "a file goes first"
    assert find_config("no-such") == "no-such"


def test_a_model_of_the_hub_is_resolved(capsys: pytest.CaptureFixture):
    """Without a network it is one line; HF_HUB_OFFLINE of the tests makes sure of that."""
    assert cli.main(["teachers", "resolve", "owner/model"]) == 66
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the hub does not say what owner/model is" in error
    assert cli.main(["teachers", "resolve", "a b"]) == 64


def test_stop_after_runs_nothing_later(tiny_config: Callable[..., Path]):
    ran: list[str] = []

    def note(name: StageName, config: str, run: str, store: str, teacher: object = None, adopt: object = None) -> None:
        ran.append(f"{name} {adopt}")

    chain.distil(note, str(tiny_config()), "r", "s", cold_start_of="other", until="joint")
    assert ran == ["prompts other", "cold_start other", "joint None"]


def test_a_stage_that_fails_every_time_ends_with_its_own_failure(monkeypatch: pytest.MonkeyPatch):
    tries: list[str] = []

    def fail(name: StageName, *rest: object) -> None:
        tries.append(name)
        raise StageFailed(name, 70, "exit code 70", says_more=False)

    monkeypatch.setattr("flows.launch.process.run_stage", fail)
    monkeypatch.setattr("flows.launch.process.RETRY_DELAYS", (0.0, 0.0, 0.0))
    with pytest.raises(StageFailed):
        process.run_stage_with_retries("joint", "c", "r", "s")
    assert len(tries) == 4
