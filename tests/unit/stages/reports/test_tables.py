"""The paper's tables: strict specs, real configs, judgements against brute force, and one page that is whole."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dmdr.config.load import load_config
from dmdr.errors import ConfigError, InputMissing
from dmdr.lab.prompts import lab_prompts
from dmdr.metrics.intervals import Interval
from dmdr.metrics.load import load_metrics
from stages.reports.charts import Point
from stages.reports.tables.claims import format_judgement
from stages.reports.tables.judgement import (
    FAILS,
    HOLDS,
    NOT_RUN,
    UNDECIDED,
    describe_difference,
    judge_claims,
    mean_over_seeds,
)
from stages.reports.tables.page import render_page
from stages.reports.tables.plan import Run, apply_changes, list_figures, plan_runs
from stages.reports.tables.results import FinishedRun
from stages.reports.tables.spec import Spec, load_spec
from stages.store.records import Record
from tests.support.html import EVIL, Reader
from tests.support.sealing import PROVENANCE

ROOT = Path(__file__).parents[4]
CLAIM = {"claim": "RL helps", "figures": ["lab-mixer"]}
TABLES = sorted((ROOT / "configs" / "tables").glob("*.yaml"))


@pytest.fixture
def spec_file(tmp_path: Path, tiny_config: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a table of two rows over the tiny config and returns its path; keywords replace top-level keys."""

    def write(**changes: object) -> Path:
        spec = {
            "table": "Table 5",
            "title": "tiny",
            "runs": "tiny-5",
            "base": str(tiny_config(evaluate={"metrics": ["lab-conv", "lab-mixer"], "batch_size": 4})),
            "seeds": [0, 1],
            "columns": [{"metric": "lab-mixer", "label": "held out"}, {"metric": "lab-conv"}],
            "paper_columns": ["CLIP Score"],
            "rows": [
                {"name": "init", "label": EVIL, "model": "cold start", "paper": {"CLIP Score": 33.6432}},
                {"name": "refl", "label": "w/ RL", "model": "student", "paper": {"CLIP Score": 34.6249}},
                {"name": "gan", "label": "DMD2", "model": "none"},
            ],
            "claims": [{**CLAIM, "higher": "refl", "lower": "init", "paper": ["CLIP Score"]}],
            "curves": {"stage": "joint", "columns": ["reward/lab-conv"]},
            **changes,
        }
        path = tmp_path / "tiny-5.yaml"
        path.write_text(yaml.safe_dump(spec), encoding="utf-8")
        return path

    return write


# Specs


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_tables_that_come_with_dmdr_are_whole(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every run is a config that `dmdr run` reads, and three seeds are the least."""
    monkeypatch.chdir(ROOT)
    spec = load_spec(path)
    runs = plan_runs(spec, tmp_path)
    assert len({run.seed for run in runs}) >= 3
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        assert load_config(run.path) == run.config
        assert (run.config.run, run.config.seed) == (run.name, run.seed)
        assert run.config.evaluate.models == (run.row.model,)


def test_tables_that_share_runs_mean_the_same_by_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    by_name: dict[str, list[object]] = {}
    for path in TABLES:
        for run in plan_runs(load_spec(path), tmp_path):
            by_name.setdefault(run.name, []).append(run.config)
    assert all(config == configs[0] for configs in by_name.values() for config in configs)
    assert max(map(len, by_name.values())) == 3  # table 5, its excerpt and figure 10


def test_rows_differ_as_the_paper_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    runs = {
        run.row.name: run.config
        for run in plan_runs(load_spec(ROOT / "configs/tables/table-5.yaml"), tmp_path, seeds=[0])
    }
    assert (runs["distil"].joint.rl, runs["distil"].joint.distribution_matching) == (None, True)
    for algorithm in ("refl", "dpo", "grpo"):
        alone, together = runs[f"{algorithm}-only"].joint, runs[algorithm].joint
        assert (alone.rl.algorithm, together.rl.algorithm) == (algorithm, algorithm)
        assert (alone.distribution_matching, together.distribution_matching) == (False, True)
        assert alone.rl.needs_reference()  # its usual regulariser
    assert all(config.cold_start == runs["init"].cold_start for config in runs.values())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rovs": []}, "unknown key rovs; did you mean rows?"),
        ({"rows": [{"name": "a", "label": "A", "modle": "student"}]}, "unknown key rows.0.modle; did you mean model?"),
        ({"rows": [{"name": "a", "label": "A", "model": "student"}] * 2, "claims": []}, "a row is there twice"),
        ({"seeds": [1, 1]}, "a seed is there twice"),
        ({"seeds": []}, "seeds"),
        ({"claims": [{**CLAIM, "higher": "reflx", "lower": "init"}]}, "did you mean refl?"),
        ({"claims": [{**CLAIM, "higher": "refl", "lower": "gan"}]}, "rows that run"),
        ({"claims": [{**CLAIM, "higher": "refl", "lower": "init", "figures": ["strict"]}]}, "among the columns"),
        ({"paper_columns": ["HP Score"]}, "paper of row init names CLIP Score"),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(spec_file: Callable[..., Path], changes: dict, told: str):
    with pytest.raises(ConfigError) as caught:
        load_spec(spec_file(**changes))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"changes": {"joint.updatse": 3}}, "unknown key joint.updatse; did you mean updates?"),
        ({"changes": {"student.steps.more": 1}}, "student.steps is 2"),
        ({"changes": {"seed": 1}}, "which the table sets itself"),
        ({"columns": [{"metric": "strict"}], "claims": []}, "does not measure; it has lab-conv, lab-mixer"),
        ({"columns": [{"metric": "diversity/pixels"}], "claims": []}, "does not measure"),
        (
            {
                "runs": "a-very-long-name",
                "rows": [{"name": "r" * 20, "label": "r", "model": "student"}],
                "claims": [],
                "variants": [{"name": "v" * 20, "label": "v"}],
            },
            "at most 63 of them",
        ),
    ],
)
def test_a_row_that_cannot_run_is_refused_before_anything_starts(
    spec_file: Callable[..., Path], tmp_path: Path, changes: dict, told: str
):
    with pytest.raises(ConfigError) as caught:
        plan_runs(load_spec(spec_file(**changes)), tmp_path / "configs")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_that_is_not_there(tmp_path: Path, spec_file: Callable[..., Path]):
    with pytest.raises(InputMissing, match="configs/tables"):
        load_spec(tmp_path / "no.yaml")
    with pytest.raises(InputMissing, match="--base"):
        plan_runs(load_spec(spec_file()), tmp_path, base="no.yaml")


def test_a_change_takes_the_place_of_what_stood_there():
    data = {"a": {"b": {"c": 1, "d": 2}, "e": None}, "f": 3}
    new = apply_changes(data, {"a.b": {"x": 9}, "a.e.g": 4, "h.i": 5}, "row")
    assert new == {"a": {"b": {"x": 9}, "e": {"g": 4}}, "f": 3, "h": {"i": 5}}
    assert data == {"a": {"b": {"c": 1, "d": 2}, "e": None}, "f": 3}
    assert apply_changes(data, {"a.b.c": 7}, "row")["a"]["b"] == {"c": 7, "d": 2}


def test_seeds_and_base_of_the_command_line(spec_file: Callable[..., Path], tmp_path: Path):
    spec = load_spec(spec_file())
    assert [run.name for run in plan_runs(spec, tmp_path)] == [
        f"tiny-5-{row}-seed{n}" for n in (0, 1) for row in ("init", "refl")
    ]
    other = tmp_path / "other.yaml"
    other.write_text(Path(spec.base).read_text().replace("run: tiny", "run: other"))
    names = [run.name for run in plan_runs(spec, tmp_path, seeds=[5], base=str(other))]
    assert names == ["tiny-5-other-init-seed5", "tiny-5-other-refl-seed5"]


def test_a_variant_is_a_second_set_of_changes(spec_file: Callable[..., Path], tmp_path: Path):
    variants = [{"name": n, "label": n, "changes": {"cold_start.updates": u}} for n, u in (("short", 3), ("long", 6))]
    rows = [{"name": "init", "label": "init", "model": "cold start", "paper": {"long": {"CLIP Score": 1.0}}}]
    spec = load_spec(spec_file(variants=variants, rows=rows, claims=[], curves=None))
    assert [(run.name, run.config.cold_start.updates) for run in plan_runs(spec, tmp_path, seeds=[0])] == [
        ("tiny-5-init-short-seed0", 3),
        ("tiny-5-init-long-seed0", 6),
    ]


def test_planned_figures_are_those_that_the_metrics_give(tiny_config: Callable[..., Path]):
    records = list(lab_prompts("held-out")[:2])
    metrics = ["lab-checker", "lab-conv", "lab-mixer"]
    config = load_config(tiny_config(evaluate={"metrics": metrics}))
    assert list_figures(config) == [
        f for metric in load_metrics(tuple(metrics), records).metrics for f in metric.figures
    ]


# Judgements and the page


def record_of(run: str, stage: str, adopted_from: str | None) -> Record:
    return Record(
        schema=1,
        run=run,
        stage=stage,
        identity={},
        inputs={},
        files={},
        fingerprint="ab" * 32,
        facts={},
        provenance=PROVENANCE.model_copy(update={"duration_s": 2.0, "adopted_from": adopted_from}),
    )


def found_for(
    spec: Spec, runs: list[Run], leads: dict[str, float], seeds: tuple[int, ...] = (0, 1)
) -> list[FinishedRun]:
    """Made-up results: a row's scores are the prompts' difficulty plus its lead, in both figures."""
    found = []
    for run in runs:
        if run.seed not in seeds:
            continue
        rng = np.random.default_rng(run.seed)
        difficulty = rng.random(40)
        noise = 0.01 * np.random.default_rng([run.seed, len(run.row.name)]).standard_normal(40)
        scores = difficulty + leads[run.row.name] + noise
        records = {stage: record_of(run.name, stage, "x" if stage == "prompts" else None) for stage in run.row.stages}
        picture = np.full((16, 16, 3), 10 * run.seed + len(run.row.name), dtype=np.uint8)
        points = [Point(1.0, 0.1), Point(2.0, None), Point(3.0, 0.4)]
        curve = {"reward/lab-conv": points} if run.row.name == "refl" else {}
        found.append(
            FinishedRun(
                run,
                {"lab-mixer": scores, "lab-conv": scores.copy()},
                {"lab-conv"} if run.row.name == "refl" else set(),
                {EVIL: [picture], "two": [picture]},
                curve,
                records,
            )
        )
    return found


def test_a_claim_is_judged_by_paired_differences(spec_file: Callable[..., Path], tmp_path: Path):
    """Leads far below the spread of the prompts are seen, because both rows met the same prompts."""
    spec = load_spec(spec_file())
    runs = plan_runs(spec, tmp_path)
    for lead, expected in ((0.05, HOLDS), (-0.05, FAILS), (0.0, UNDECIDED)):
        found = found_for(spec, runs, {"init": 0.0, "refl": lead})
        (judged,) = judge_claims(spec, found)
        by_hand = [
            np.mean(b.scores["lab-mixer"] - a.scores["lab-mixer"])
            for a, b in ((found[0], found[1]), (found[2], found[3]))
        ]
        assert judged.difference.mean == pytest.approx(np.mean(by_hand))
        assert (judged.word, judged.seeds, judged.prompts) == (expected, 2, 40)
        assert judged.paper == {"CLIP Score": pytest.approx(0.9817)}
        text = format_judgement(judged)
        assert text.startswith(f"On lab-mixer: {expected}; w/ RL 0.")
        assert f"{judged.difference.mean:+.3f}" in text
        assert "over 2 seeds and 40 prompts. In the paper: CLIP Score +0.9817." in text


def test_only_seeds_that_both_rows_have_are_compared(spec_file: Callable[..., Path], tmp_path: Path):
    spec = load_spec(spec_file())
    runs = plan_runs(spec, tmp_path)
    found = found_for(spec, runs, {"init": 0.0, "refl": 0.5})
    (judged,) = judge_claims(spec, found[:3])
    assert judged.seeds == 1
    (judged,) = judge_claims(spec, found[:1])
    assert (judged.word, judged.difference) == (NOT_RUN, None)
    assert "no result yet" in format_judgement(judged)


def test_a_claim_about_a_curve_counts_seeds(spec_file: Callable[..., Path], tmp_path: Path):
    claim = {"claim": "varies more", "higher": "refl", "lower": "init", "figures": ["reward/lab-conv"], "of": "curve"}
    spec = load_spec(spec_file(claims=[claim], seeds=[0, 1, 2]))
    runs = plan_runs(spec, tmp_path)
    found = found_for(spec, runs, {"init": 0.0, "refl": 0.0}, seeds=(0, 1, 2))
    for each in found:
        level = 0.1 if each.run.row.name == "init" else 0.5 + 0.01 * each.run.seed
        each.curves["reward/lab-conv"] = [Point(1.0, level - 0.1), Point(2.0, level + 0.1)]
    (judged,) = judge_claims(spec, found)
    assert (judged.word, judged.seeds) == (HOLDS, 3)
    assert judged.difference.mean == pytest.approx(0.41)
    assert judged.difference.high - judged.difference.mean == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-3)
    (judged,) = judge_claims(spec, found[:2])
    assert judged.word == UNDECIDED
    assert "one seed has no interval" in format_judgement(judged)


def test_a_word_follows_the_interval():
    ends = {(0.1, 1): HOLDS, (-1, -0.1): FAILS, (-1, 1): UNDECIDED, (0, 1): UNDECIDED, (np.nan, np.nan): UNDECIDED}
    assert [describe_difference(Interval(0, *each)) for each in ends] == list(ends.values())


def test_the_page_is_whole_and_escaped(spec_file: Callable[..., Path], tmp_path: Path):
    spec = load_spec(spec_file(note="a <b> note", curves={"stage": "joint", "columns": ["reward/lab-conv", "no such"]}))
    runs = plan_runs(spec, tmp_path)
    found = found_for(spec, runs, {"init": 0.0, "refl": 0.05})
    found[1].scores["lab-conv"][3] = np.nan
    reader = Reader(render_page(spec, runs, found, judge_claims(spec, found), command="dmdr tables 'a <b>.yaml'"))
    assert reader.links == []
    assert "script" not in reader.tags
    assert EVIL in reader.text
    for row in ("init", "refl"):
        mean, low, high = mean_over_seeds(found, row, None, "lab-mixer")
        assert f"{mean:.3f}{low:.3f} to {high:.3f}2 seeds" in reader.text
    shown = [
        "no suchin no run yet",
        "33.6432",
        "34.6249",
        "DMD2",
        "not run here",
        "holds",
        "not a number",
        "a <b> note",
        "trained on",
    ]
    shown += ["tiny-5-refl-seed1", "joint 2 s", "prompts from x", "4 of 4 runs finished", "dmdr tables 'a <b>.yaml'"]
    for text in shown:
        assert text in reader.text, text
    assert reader.tags.count("svg") == 1
    assert len(reader.images) == 2 * 2  # prompts, rows of the first seed
    first = np.asarray(Image.open(io.BytesIO(base64.b64decode(reader.images[0]["src"].split(",")[1]))))
    assert (first == found[0].images[EVIL][0][0, 0]).all()


def test_a_page_of_nothing_yet(spec_file: Callable[..., Path], tmp_path: Path):
    spec = load_spec(spec_file())
    runs = plan_runs(spec, tmp_path)
    reader = Reader(render_page(spec, runs, [], judge_claims(spec, []), command="dmdr tables x"))
    assert "0 of 4 runs finished" in reader.text
    assert "no result yet" in reader.text
