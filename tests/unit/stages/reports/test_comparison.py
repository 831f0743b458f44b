"""`dmdr compare` on sealed evaluations: figures and differences by hand, one whole page, one line where it cannot."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from dmdr.config.load import load_config
from dmdr.metrics.scorecard import Model
from flows import cli
from stages.store.artifacts import Artifact
from stages.store.runs import promote_run
from tests.support.evaluated import GENEVAL, Evaluation, seal_evaluation
from tests.support.html import EVIL, Reader
from tests.support.s3_server import BUCKET
from tests.support.sealing import PROVENANCE
from tests.support.trained_run import run_stage, seal_stage, trained_run

PROMPTS = [EVIL, *(f"prompt {n}" for n in range(29))]
TAGS = [GENEVAL[n % 6] for n in range(30)]


def draw(
    seed: int, lead: float, figures: tuple[str, ...] = ("strict", "lab-mixer")
) -> dict[str, dict[str, np.ndarray]]:
    """Scores of which the teacher's do not depend on the run's own seed."""
    own, shared = np.random.default_rng(seed), np.random.default_rng(99)
    teacher = {figure: shared.random(30) for figure in figures}
    return {f: {"student": t + lead + 0.1 * own.random(30), "teacher": t} for f, t in teacher.items()}


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A folder; one test below asks the same of S3."""
    return str(tmp_path / "runs")


@pytest.fixture
def two(store: str, tmp_path: Path) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Two runs of one teacher, on the same prompts: run -> figure -> model -> scores."""
    return seal_two(store, tmp_path / "scratch")


def seal_two(store: str, scratch: Path) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    found = {"first": draw(1, 0.3), "second": draw(2, 0.0)}
    found["second"]["strict"]["student"][4] = np.nan
    for run, scores in found.items():
        seal_evaluation(
            store,
            run,
            scratch,
            Evaluation(
                scores,
                PROMPTS,
                tags=TAGS,
                trained_on=("lab-mixer",) if run == "first" else (),
                device=f"GPU of <{run}>",
            ),
        )
    return found


def compared(store: str, page: Path, *runs: str) -> tuple[int, str]:
    """Exit code and the page."""
    code = cli.main(["compare", *runs, "--store", store, "--out", str(page)])
    return code, page.read_text(encoding="utf-8") if page.exists() else ""


def test_two_runs_stand_side_by_side(store, two, tmp_path, capsys):
    code, html = compared(store, tmp_path / "deep" / "page.html", "first", "second")
    assert code == 0
    assert ET.fromstring(html).tag == "html"
    reader, printed = Reader(html), capsys.readouterr().out
    assert reader.links == [] and not re.search(r"https?:|url\(|@import", html)
    assert reader.tags.count("script") == 1 and EVIL not in html  # the page's own
    assert EVIL in reader.text
    rows = [["|".join(c.itertext()) for c in row] for row in next(ET.fromstring(html).iter("table")).iter("tr")]
    assert [row[0].split("|")[0] for row in rows] == ["model", "first", "second", "teacher"]  # the teacher once
    for figure in ("strict", "lab-mixer"):
        for run in two:
            mean = two[run][figure]["student"].mean()
            told = "not a number" if np.isnan(mean) else f"{mean:.3f}"
            assert told in reader.text and told in printed
        lead = (two["first"][figure]["student"] - two["second"][figure]["student"]).mean()
        told = "not a number" if np.isnan(lead) else f"{lead:+.3f}"
        assert told in reader.text and told in printed
    for text in (
        "lab-mixer was trained on by first.",
        "GPU of <first>",
        "GPU of <second>",
        "reward/lab-conv",
        "joint.up",
    ):
        assert text in reader.text
    assert "all were judged on the same 30 prompts" in reader.text
    assert f"page: {tmp_path / 'deep' / 'page.html'}" in printed
    assert all(image["alt"] for image in reader.images)
    assert len(reader.images) == 3 * 3 + 1  # kept prompts; two students and the teacher; the enlarged one


def test_a_store_on_s3_gives_the_same_page(s3, store, two, tmp_path):
    there = f"s3://{BUCKET}/{tmp_path.name}/runs"
    seal_two(there, tmp_path / "elsewhere")
    pages = [compared(at, tmp_path / f"{n}.html", "first", "second") for n, at in enumerate((store, there))]
    assert pages[0] == pages[1]
    assert pages[0][0] == 0


def test_differences_have_the_interval_of_the_pairs(store, two, tmp_path, capsys):
    """The lead is far above the noise of the pairs, though far below the spread of the prompts."""
    _, html = compared(store, tmp_path / "page.html", "second", "first")
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| second - first | lab-mixer"))
    mean, low, high = map(float, re.findall(r"[+-]\d\.\d{3}", row))
    difference = two["second"]["lab-mixer"]["student"] - two["first"]["lab-mixer"]["student"]
    assert mean == pytest.approx(difference.mean(), abs=5e-4)
    half = 1.96 * difference.std() / 30**0.5
    assert (low, high) == pytest.approx((difference.mean() - half, difference.mean() + half), abs=0.01)
    assert "worse" in Reader(html).text
    shown = re.findall(r"([+-]\d\.\d{3}) strict", Reader(html).text)
    assert shown == sorted(shown, key=float, reverse=True)


def test_the_prompts_that_runs_share_are_paired(store, two, tmp_path, capsys):
    """In another order, among other prompts: each pair is of one text, and the page says how many there are."""
    there = [*"abcdefghij", *reversed(PROMPTS[:20])]
    scores = draw(3, 0.1)
    seal_evaluation(store, "third", tmp_path / "scratch", Evaluation(scores, there))
    code, html = compared(store, tmp_path / "page.html", "first", "third")
    assert code == 0
    printed, text = capsys.readouterr().out, Reader(html).text
    for said in (
        "first and third were judged on different prompts (30 and 30): their differences are of the 20 prompts that",
        "first and third drew from other noise: the pairs share their prompts only.",
    ):
        assert said in text and said in printed
    ours, theirs = two["first"]["strict"]["student"], scores["strict"]["student"]
    lead = np.mean([ours[n] - theirs[there.index(PROMPTS[n])] for n in range(20)])
    assert f"| first - third | strict    | {lead:+.3f} [" in printed
    assert f"{lead:+.3f}" in text and "] on 20 prompts" in text
    assert "teacher 1 is that of first." in printed and "teacher 2 is that of third." in printed


def test_runs_without_a_common_prompt_give_no_differences(store, two, tmp_path, capsys):
    seal_evaluation(store, "third", tmp_path / "scratch", Evaluation(draw(3, 0.1), [f"other {n}" for n in range(30)]))
    code, html = compared(store, tmp_path / "page.html", "first", "third")
    assert code == 0
    said = "first and third have no prompt in common: no paired differences"
    printed = capsys.readouterr().out
    assert said in Reader(html).text and said in printed
    assert "prompt by prompt" not in html
    assert compared(store, tmp_path / "three.html", "first", "second", "third")[0] == 0
    assert "first - second" in (printed := capsys.readouterr().out)
    assert "first - third" not in printed


def test_runs_may_differ_in_metrics_teachers_and_noise(store, two, tmp_path, capsys):
    scores = draw(4, 0.1, ("strict", "geneval"))
    seal_evaluation(
        store,
        "third",
        tmp_path / "scratch",
        Evaluation(
            scores,
            PROMPTS,
            teacher="f" * 64,
            seed=7,
            conditions={"missing": {"hpsv2.1": "no weights"}, "about": {"strict": {"weights": "another"}}},
        ),
    )
    code, html = compared(store, tmp_path / "page.html", "first", "third")
    text, printed = Reader(html).text, capsys.readouterr().out
    assert code == 0
    assert f"{scores['geneval']['student'].mean():.3f}" in text
    assert "| first - third | strict" in printed
    assert "| geneval " in printed and "first - third | geneval" not in printed
    assert "first and third drew from other noise" in text
    assert "Not measured: hpsv2.1 in third. no weights" in text
    assert "sha256 " + "f" * 64 in text


def test_a_figure_that_means_two_things_has_no_differences(store, tmp_path, capsys):
    about = {"first": {"strict": {"weights": "one"}}, "second": {"strict": {"weights": "another"}}}
    for run, facts in about.items():
        seal_evaluation(store, run, tmp_path / "scratch", Evaluation(draw(1, 0), PROMPTS, conditions={"about": facts}))
    code, html = compared(store, tmp_path / "page.html", "first", "second")
    printed = capsys.readouterr().out
    assert code == 0
    assert "| first - second | lab-mixer" in printed and "| first - second | strict" not in printed
    assert "strict of first is another metric than in second: no paired differences of it." in printed
    assert "strict in first" in Reader(html).text and "weights another" in Reader(html).text


def test_a_run_without_a_student_stands_by_its_first_model(store, two, tmp_path):
    cold = {"strict": {"cold start": np.linspace(0, 1, 30)}}
    models = [Model("cold start", 2, 1.0)]
    seal_evaluation(store, "cold", tmp_path / "scratch", Evaluation(cold, PROMPTS, models=models))
    code, html = compared(store, tmp_path / "page.html", "cold", "first")
    assert code == 0
    assert "cold: cold start" in Reader(html).text


def test_a_promoted_name_is_a_run(store, two, tmp_path):
    folder = tmp_path / "export"
    (folder / "pipeline").mkdir(parents=True)
    (folder / "pipeline" / "model_index.json").write_text("{}")
    artifact = Artifact(store, "second", "export")
    artifact.claim({}, {"teacher": "0"})
    artifact.seal(folder, facts={}, provenance=PROVENANCE)
    promote_run(store, "second", "production")
    assert compared(store, tmp_path / "page.html", "first", "production")[0] == 0
    assert compared(store, tmp_path / "page.html", "second", "production")[0] == 64


def test_what_cannot_be_compared_is_said_in_one_line(store, two, tmp_path, capsys):
    Artifact(store, "open", "evaluate").claim({"seed": 1}, {})
    page = tmp_path / "none.html"
    for runs, code, said in (
        (["first", "nobody"], 66, "evaluate of run nobody is not sealed"),
        (["open", "first"], 66, "evaluate of run open is not sealed"),
        (["first", "first"], 64, "first more than once; name each run once"),
        (["first"], 64, "only first to compare; name two runs or more"),
        (["first", "No Name"], 64, "run name 'No Name' must be"),
    ):
        assert compared(store, page, *runs)[0] == code
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert not page.exists()


def test_an_old_scorecard_and_a_damaged_file_are_refused(tmp_path, capsys):
    store, page = str(tmp_path / "runs"), tmp_path / "none.html"
    for run in ("first", "old"):
        seal_evaluation(store, run, tmp_path / "scratch", Evaluation(draw(1, 0), PROMPTS))
    scores = tmp_path / "runs" / "old" / "evaluate" / "scores.jsonl"
    whole = scores.read_bytes()
    scores.write_bytes(whole[:-9])
    assert compared(store, page, "first", "old")[0] == 65
    assert "scores.jsonl is damaged" in capsys.readouterr().err
    scores.write_bytes(whole)
    scratch = tmp_path / "scratch" / "again"
    scratch.mkdir()
    card = json.loads((tmp_path / "runs" / "old" / "evaluate" / "scorecard.json").read_text())
    (scratch / "scorecard.json").write_text(json.dumps({**card, "schema": 1}))
    (scratch / "scores.jsonl").write_bytes(whole)
    (scratch / "speed.json").write_text("{}")
    artifact = Artifact(store, "older", "evaluate")
    artifact.claim({}, {"teacher": "0"})
    artifact.seal(scratch, facts={}, provenance=PROVENANCE)
    assert compared(store, page, "first", "older")[0] == 65
    (line,) = capsys.readouterr().err.splitlines()
    assert "has schema 1, this DMDR reads 2" in line and "evaluate again" in line
    assert not page.exists()


def test_runs_that_were_really_evaluated(tiny_config, tmp_path, capsys):
    """Two students of one teacher: the figures on the page are those of the sealed cards."""
    store, cards = tmp_path / "runs", {}
    for run, steps in (("two-steps", 2), ("one-step", 1)):
        metrics = {"metrics": ["lab-mixer", "lab-conv"], "batch_size": 4}
        config = load_config(tiny_config(run=run, student={"steps": steps}, evaluate=metrics))
        trained_run(config, store)
        seal_stage(config, store, "export")
        cards[run] = json.loads((run_stage(config, store, "evaluate") / "scorecard.json").read_text())
    code, html = compared(str(store), tmp_path / "page.html", *cards)
    text, printed = Reader(html).text, capsys.readouterr().out
    assert code == 0
    assert ET.fromstring(html).tag == "html"
    for card in cards.values():
        for each in card["metrics"]:
            if each["model"] in ("student", "teacher"):
                assert f"{each['mean']:.3f}{each['low']:.3f} to {each['high']:.3f}" in text
                assert f"{each['mean']:.3f} [{each['low']:.3f}, {each['high']:.3f}]" in printed
    assert "teacher 1" not in text  # both have the same
    assert "lab-conv was trained on by two-steps and one-step." in text
    assert "student.steps21" in text  # among the settings that differ
    assert len(Reader(html).images) == 6 * 3 + 1
