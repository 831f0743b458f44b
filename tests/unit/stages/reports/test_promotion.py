"""Gated promotion, on evaluations made by hand whose paired differences are known: who gets a name, and who not."""

from __future__ import annotations

import json
import math
import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dmdr.config.load import load_config
from dmdr.errors import ConfigError, InputMissing
from flows import cli
from flows.promotion import Rule, build_rule, promote_once
from stages.reports.comparison.promotion import promote_if_better
from stages.store.artifacts import Artifact
from stages.store.pointers import list_decisions
from stages.store.runs import follow_name, list_history, promote_run, undo_promotion
from tests.support.evaluated import Evaluation, seal_evaluation
from tests.support.sealing import PROVENANCE

PROMPTS = [f"prompt {n}" for n in range(64)]
BASE = np.linspace(0.2, 0.7, len(PROMPTS))
ALTERNATING = np.where(np.arange(len(PROMPTS)) % 2, 0.1, -0.1)


def seal_run(store: str, run: str, scratch: Path, scores: dict[str, np.ndarray], **evaluation: object) -> None:
    """A run with an export and an evaluation in which its student has these scores."""
    folder = scratch / f"{run}-export"
    folder.mkdir(parents=True)
    (folder / "weights").write_text(run)
    artifact = Artifact(store, run, "export")
    artifact.claim({}, {"teacher": "0"})
    artifact.seal(folder, facts={}, provenance=PROVENANCE)
    by_model = {figure: {"student": each, "teacher": np.resize(BASE, len(each))} for figure, each in scores.items()}
    prompts = evaluation.pop("prompts", PROMPTS)
    seal_evaluation(store, run, scratch, Evaluation(by_model, prompts, **evaluation))


@pytest.fixture
def runs(tmp_path: Path) -> Callable[..., str]:
    """Seals runs in a folder, named with their scores of the metrics strict and, if given, soft."""

    def seal(**of_runs: np.ndarray | tuple[np.ndarray, np.ndarray]) -> str:
        for run, scores in of_runs.items():
            both = scores if isinstance(scores, tuple) else (scores,)
            seal_run(
                str(tmp_path / "runs"), run, tmp_path / "scratch", dict(zip(("strict", "soft"), both, strict=False))
            )
        return str(tmp_path / "runs")

    return seal


def carried(store: str, name: str = "production") -> list[str]:
    return [pointer.run for pointer in list_history(store, name)]


SCORES = {
    "better": BASE + 0.1,
    "same": BASE,
    "even": BASE + ALTERNATING,
    "worse": BASE - 0.1,
    "broken": np.where(np.arange(len(PROMPTS)) == 3, np.nan, BASE + 0.5),
}


@pytest.mark.parametrize(
    ("strict", "soft", "is_promoted", "says"),
    [
        ("better", "same", True, "strict +0.100 [+0.100, +0.100], better; soft +0.000 [+0.000, +0.000], no difference"),
        ("better", "worse", False, "it is worse: strict +0.100 [+0.100, +0.100], better; soft -0.100"),
        ("same", "same", False, "stays with base: it is not shown to be better: strict +0.000"),
        ("even", "same", False, "[-0.025, +0.025], no difference shown; soft"),
        ("worse", "worse", False, "it is worse"),
        ("better", "broken", False, "soft not a number, worse"),
    ],
)
def test_the_intervals_decide(runs, capsys, strict, soft, is_promoted, says):
    store = runs(base=(BASE, BASE), new=(SCORES[strict], SCORES[soft]))
    promote_run(store, "base", "production")
    code = cli.main(["promote", "new", "--as", "production", "--if-better", "strict,soft", "--store", store])
    said = capsys.readouterr()
    (line,) = (said.out if is_promoted else said.err).splitlines()
    assert code == (0 if is_promoted else 77)
    assert says in line and "on 64 prompts" in line
    assert follow_name(store, "production") == ("new" if is_promoted else "base")
    assert cli.main(["runs", "--store", store]) == 0
    assert line.removeprefix("dmdr: ") in capsys.readouterr().out


def test_an_interval_is_that_of_the_differences(tmp_path):
    """Paired differences of known mean and spread: the ends are mean +- 1.96 sd / sqrt(n), whatever both scores are."""
    store, count = str(tmp_path / "runs"), 900
    prompts = [f"prompt {n}" for n in range(count)]
    base = np.random.default_rng(3).normal(0, 50, count)  # prompts differ far more than students
    differences = np.where(np.arange(count) % 3 == 0, 0.5, -0.1)  # mean 0.1, standard deviation 0.2828
    for run, scores in (("base", base), ("new", base + differences)):
        seal_run(store, run, tmp_path / "scratch", {"strict": scores}, prompts=prompts)
    promote_run(store, "base", "production")
    (found,) = promote_if_better(store, "new", "production", ("strict",)).metrics
    half = 1.96 * math.sqrt(0.08) / math.sqrt(count)
    assert found.difference == pytest.approx(0.1) and found.n == count
    assert found.low == pytest.approx(0.1 - half, abs=0.1 * half)
    assert found.high == pytest.approx(0.1 + half, abs=0.1 * half)


def test_three_in_turn_move_the_name_once(runs):
    store = runs(base=BASE, better=BASE + 0.1, equal=BASE + 0.1 + ALTERNATING, worse=BASE - 0.1)
    promote_run(store, "base", "production")
    decided = [
        promote_if_better(store, run, "production", ("strict",)).is_promoted for run in ("better", "equal", "worse")
    ]
    assert decided == [True, False, False]
    assert carried(store) == ["base", "better"]
    assert [(each.run, each.over, each.is_promoted) for each in list_decisions(store)] == [
        ("better", "base", True),
        ("equal", "better", False),
        ("worse", "better", False),
    ]


def test_twenty_at_once_move_the_name_as_one_after_the_other_would(runs):
    """Runs that differ by 0.1 each: every move is upwards and over the one before it, and the best run ends on top."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    store = runs(**{f"run-{n}": BASE + 0.1 * n for n in range(4)})
    promote_run(store, "run-0", "production")
    asked = [f"run-{n % 3 + 1}" for n in range(20)]
    random.Random(seed).shuffle(asked)
    failed: list[BaseException] = []

    def judge(run: str) -> None:
        try:
            promote_if_better(store, run, "production", ("strict",))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=judge, args=(run,)) for run in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    history = list_history(store, "production")
    runs_in_turn = [pointer.run for pointer in history]
    assert runs_in_turn[0] == "run-0" and runs_in_turn[-1] == "run-3"
    assert runs_in_turn == sorted(set(runs_in_turn)), "upwards, and no run twice"
    assert [pointer.before.run for pointer in history[1:]] == runs_in_turn[:-1], "each over the one before"


def test_plain_promotions_at_once_lose_no_history(store, tmp_path):
    for run in ("one", "two"):
        seal_run(store, run, tmp_path, {"strict": BASE})
    threads = [threading.Thread(target=promote_run, args=(store, run, "production")) for run in ("one", "two") * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    moved = carried(store)
    assert all(a != b for a, b in zip(moved, moved[1:], strict=False)), "a run that has the name keeps it"
    assert moved[-1] == follow_name(store, "production")


def test_undo_goes_back_step_by_step(store, tmp_path, capsys):
    for n, run in enumerate(("one", "two", "three")):
        seal_run(store, run, tmp_path, {"strict": BASE + 0.1 * n})
    dmdr = [["promote", run, "--as", "production", "--if-better", "strict", "--store", store] for run in ("one", "two")]
    undo = ["promote", "--as", "production", "--undo", "--store", store]
    assert [cli.main(each) for each in dmdr] == [0, 0]
    said = capsys.readouterr().out
    assert "no run carried the name before" in said and "before one: strict +0.100" in said
    promote_run(store, "three", "production")
    for run in ("two", "one"):
        assert cli.main(undo) == 0
        assert f"production is the export of {run} again" in capsys.readouterr().out
        assert follow_name(store, "production") == run
    assert cli.main(undo) == 64
    assert "there is nothing to undo" in capsys.readouterr().err
    assert cli.main(["promote", "--as", "production", "--store", store]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1].rstrip(",") for line in lines] == ["one", "two", "three", "two", "one"]
    assert lines[3].endswith("back from three")
    assert cli.main(dmdr[1]) == 0, "a person who asks again is answered again"
    assert carried(store)[-1] == "two"


def test_a_name_of_the_first_version_is_read_moved_and_undone(runs):
    store = runs(old=BASE, older=BASE, new=BASE + 0.1)
    digest = {run: Artifact(store, run, "export").sealed().fingerprint for run in ("old", "older")}
    before = {"run": "older", "fingerprint": digest["older"], "promoted_at": "2026-01-01T00:00:00+00:00"}
    pointer = {"schema": 1, "stage": "export", **before, "run": "old", "fingerprint": digest["old"], "before": before}
    Path(store, "_promoted").mkdir()
    Path(store, "_promoted", "production.json").write_text(json.dumps(pointer))
    assert promote_if_better(store, "new", "production", ("strict",)).over == "old"
    assert carried(store) == ["old", "new"]
    assert undo_promotion(store, "production").run == "old"
    assert undo_promotion(store, "production").run == "older"
    with pytest.raises(ConfigError, match="nothing to undo"):
        undo_promotion(store, "production")


def test_a_metric_that_a_run_trained_on_does_not_count(tmp_path):
    store, scratch = str(tmp_path / "runs"), tmp_path / "scratch"
    seal_run(store, "base", scratch, {"strict": BASE, "soft": BASE}, trained_on=("soft",))
    seal_run(store, "worse", scratch, {"strict": BASE, "soft": BASE + 0.5})
    seal_run(store, "good", scratch, {"strict": BASE + 0.1, "soft": BASE - 0.5})
    promote_run(store, "base", "production")
    kept = promote_if_better(store, "worse", "production", ("strict", "soft"))
    assert not kept.is_promoted and kept.not_counted == ("soft",)
    assert kept.text.endswith("; not counted, because a run was trained on it: soft")
    with pytest.raises(ConfigError, match=r"--if-better soft: base trained on that"):
        promote_if_better(store, "worse", "production", ("soft",))
    assert promote_if_better(store, "good", "production", ("strict", "soft")).is_promoted


def test_what_cannot_be_judged_is_one_line(tmp_path, capsys):
    store, scratch = str(tmp_path / "runs"), tmp_path / "scratch"
    seal_run(store, "base", scratch, {"strict": BASE})
    seal_run(store, "new", scratch, {"strict": BASE + 0.1, "soft": BASE}, conditions={"missing": {"ocr": "no weights"}})
    seal_run(store, "seed", scratch, {"strict": BASE + 0.1}, seed=4)
    seal_run(store, "short", scratch, {"strict": BASE[:9] + 0.1}, prompts=PROMPTS[:9])
    seal_run(store, "gone", scratch, {"strict": BASE})
    blank = scratch / "blank"
    blank.mkdir()
    (blank / "weights").write_text("blank")
    unjudged = Artifact(store, "unjudged", "export")
    unjudged.claim({}, {"teacher": "0"})
    unjudged.seal(blank, facts={}, provenance=PROVENANCE)
    promote_run(store, "base", "production")
    promote_run(store, "gone", "lost")
    Artifact(store, "gone", "export").delete()
    for arguments, code, said in (
        (
            ["new", "--if-better", "stric"],
            64,
            "--if-better stric is no metric in the evaluation of run new; it has strict",
        ),
        (["new", "--if-better", ","], 64, "names no metric"),
        (["new", "--if-better", "ocr"], 66, "it was not measured for run new: no weights"),
        (["new", "--if-better", "strict,soft"], 66, "soft is not in the evaluation of base; give the config of new"),
        (["unjudged", "--if-better", "strict"], 66, "run unjudged is not evaluated"),
        (["nobody", "--if-better", "strict"], 66, "export of run nobody is not sealed"),
        (["seed", "--if-better", "strict"], 66, "their noise is of seed 4 and seed 0"),
        (["short", "--if-better", "strict"], 66, "their prompts are not the same (9 and 64)"),
        (["new", "--as", "lost", "--if-better", "strict"], 66, "lost points at the export of run gone, which is gone"),
        (["--undo"], 64, "nothing to undo"),
        (["--as", "producton", "--undo"], 66, "was ever promoted as producton; did you mean production?"),
        (["--as", "producton"], 66, "was ever promoted as producton; did you mean production?"),
        (["new", "--undo"], 64, "give neither RUN nor --if-better"),
        (["--if-better", "strict"], 64, "--if-better judges a run; name it"),
        (["new", "--config", "x.yaml"], 64, "--config is read with --if-better only"),
    ):
        named = [] if "--as" in arguments else ["--as", "production"]
        assert cli.main(["promote", *arguments, *named, "--store", store]) == code, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert carried(store) == ["base"]


def test_an_undo_that_comes_too_late_undoes_nothing(runs, monkeypatch):
    """Another process moves the name between the look and the move of an undo."""
    from stages.store import runs as module

    store = runs(one=BASE, two=BASE, three=BASE)
    promote_run(store, "one", "production")
    promote_run(store, "two", "production")
    look = module.read_newest

    def look_then_move(store: str, name: str) -> object:
        seen = look(store, name)
        monkeypatch.setattr(module, "read_newest", look)
        promote_run(store, "three", name)
        return seen

    monkeypatch.setattr(module, "read_newest", look_then_move)
    with pytest.raises(ConfigError, match="was moved to three by another process"):
        undo_promotion(store, "production")
    assert carried(store) == ["one", "two", "three"]


@pytest.mark.process
def test_a_flow_judges_a_result_once_and_tells_once(runs, tiny_config, tmp_path):
    """What a person has undone stays undone, however often the flow is fired; receivers hear of it once."""
    store, heard = runs(base=BASE, new=BASE + 0.1, equal=BASE), tmp_path / "heard"
    tee = {"command": ["sh", "-c", f"cat >> {heard}"], "events": ["promoted", "kept"]}
    config = str(tiny_config(execution={"device": "cpu", "live": None, "notify": [tee]}))
    load_config(config)
    promote_run(store, "base", "production")
    rule = Rule(name="production", if_better="strict")

    def run_stage(*_: object, **__: object) -> None:
        raise AssertionError("nothing is to be drawn")

    assert promote_once(run_stage, rule, "new", store, config).is_promoted
    undo_promotion(store, "production")
    assert promote_once(run_stage, rule, "new", store, config).is_promoted, "as it was decided"
    assert not promote_once(run_stage, rule, "equal", store, config).is_promoted
    assert carried(store) == ["base", "new", "base"]
    told = heard.read_text().replace("}{", "}\n{").splitlines()
    assert [json.loads(each)["event"] for each in told] == ["promoted", "kept"]
    assert "strict +0.100 [+0.100, +0.100], better" in json.loads(told[0])["text"]


def test_a_flow_gets_a_name_with_its_rule_or_neither():
    assert build_rule("", "") is None
    assert build_rule("production", "strict, soft,strict").metrics == ("strict", "soft")
    for promote_as, if_better in (("production", ""), ("", "strict")):
        with pytest.raises(ConfigError, match="give both, such as production and strict"):
            build_rule(promote_as, if_better)


def test_nobody_is_promoted_over_a_run_whose_scores_differ(tmp_path):
    """Other images of a prompt, or another metric of the same name, do not compare."""
    store, scratch = str(tmp_path / "runs"), tmp_path / "scratch"
    about = [{"strict": {"model": model}} for model in ("checker 1", "checker 2")]
    seal_run(store, "base", scratch, {"strict": BASE}, conditions={"about": about[0]})
    seal_run(store, "other", scratch, {"strict": BASE + 1}, conditions={"about": about[1]})
    seal_run(store, "more", scratch, {"strict": BASE + 1}, conditions={"about": about[0], "images_per_prompt": 4})
    promote_run(store, "base", "production")
    for run, said in (("other", "strict is not the same metric in both"), ("more", "a prompt has 4 and 1 images")):
        with pytest.raises(InputMissing, match=said):
            promote_if_better(store, run, "production", ("strict",))
