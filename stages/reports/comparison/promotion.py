"""Promote a run under a name if its student is better than that of the run which carries the name now.

1. Both students are compared on the same prompts, seeds and noise, image by image of each prompt: by the scores of both
   sealed evaluations where these agree in that, else by scores of an evaluation that draws both (`draw`).
2. The run is promoted if it is better in at least one of the named metrics and worse in none. Better: the 95 % interval
   of the paired difference, as the scorecard has it, lies above 0. Worse: below 0, or a score of the run is no number.
3. A metric that either run was trained on does not count.
4. A name that moves while a run is judged is judged again, so that every promotion is over the run that carried it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from dmdr.config.reward_weights import FIGURES
from dmdr.errors import ConfigError, InputMissing
from dmdr.metrics.aggregate import finite_or_none
from dmdr.metrics.intervals import bootstrap_differences
from dmdr.metrics.scorecard import Scorecard
from stages.reports.card import read_scorecard
from stages.reports.numbers import format_count
from stages.reports.score_lines import ScoreLine, read_score_lines
from stages.reports.verdict import format_number, outcome_word
from stages.store.artifacts import Artifact
from stages.store.pointers import SCHEMA, read_newest, record_decision
from stages.store.records import Decision, MetricDecision
from stages.store.runs import STAGE, check_promotion, follow_name, move_name

FILES = ("scorecard.json", "scores.jsonl")
REWARDS = "joint.rl.rewards."  # of a record's settings; what follows is the name of a reward


@dataclass(frozen=True)
class JudgedStudent:
    """A student and what an evaluation says of it. model: its name there. trained_on: figures that it was to raise."""

    run: str
    model: str
    card: Scorecard
    lines: list[ScoreLine]
    trained_on: frozenset[str]

    @property
    def metrics(self) -> list[str]:
        """The figures that it has, in the scorecard's order."""
        return [row.name for row in self.card.metrics if row.model == self.model]


Draw = Callable[[str], tuple[JudgedStudent, JudgedStudent]]  # takes the carrier's run; returns (the run, the carrier)


def promote_if_better(store: str, run: str, name: str, metrics: tuple[str, ...], draw: Draw | None = None) -> Decision:
    """Judge `run` against the run that carries `name`, move the name if it is better, and record the decision.

    metrics: the figures that decide. draw: evaluates both students on the run's prompts and noise; None: nobody can.

    Raises:
        ConfigError: a metric is unknown, or none is left that neither run was trained on.
        InputMissing: the run is not exported or not evaluated, the carrier is gone, or the evaluations differ and
            nobody can draw.
        DataError: a file is damaged, or the carrier has another result now.
    """
    record = check_promotion(store, run, name)
    with tempfile.TemporaryDirectory() as folder:
        ours = read_student(store, run, Path(folder) / "ours")
        check_metrics(ours, metrics)
        while True:
            number, carrier = read_newest(store, name)
            if carrier is None:
                text = f"{name} is the export of {run} now; no run carried the name before"
                decision = _decide(name, run, record.fingerprint, text, is_promoted=True)
            elif (carrier.run, carrier.fingerprint) == (run, record.fingerprint):
                already = f"{name} is the export of {run} already"
                decision = _decide(name, run, record.fingerprint, already, is_promoted=True)
                record_decision(store, decision, replaces=False)  # who moved the name may have died before it wrote one
                return decision
            else:
                follow_name(store, name)  # its result is still there
                with tempfile.TemporaryDirectory(dir=folder) as cache:
                    pair = find_pair(store, ours, carrier.run, metrics, Path(cache), draw)
                decision = judge(name, record.fingerprint, *pair, metrics)
            if not decision.is_promoted or move_name(store, run, name, record.fingerprint, after=(number, carrier)):
                record_decision(store, decision)
                return decision


def read_student(store: str, run: str, cache: Path) -> JudgedStudent:
    """The student of a run in its own sealed evaluation.

    Raises:
        InputMissing: the evaluation is not sealed, of another export, or has no student.
        DataError: a file is damaged.
    """
    evaluation, export = Artifact(store, run, "evaluate"), Artifact(store, run, STAGE).sealed()
    record = evaluation.record()
    if record is None:
        raise InputMissing(f"run {run} is not evaluated at {store}; dmdr run goes on with it")
    if record.inputs.get(STAGE, export.fingerprint) != export.fingerprint:
        raise InputMissing(f"{evaluation.address} is of another export than the run's; remove it and evaluate again")
    student = read_model(store, run, evaluation, "student", cache)
    if not student.metrics:
        raise InputMissing(f"{evaluation.address} has no scores of the student; name student in evaluate.models")
    return student


def read_model(store: str, run: str, evaluation: Artifact, model: str, cache: Path) -> JudgedStudent:
    """The student of `run` as an evaluation has it, which may be another run's. model: its name there.

    Raises:
        InputMissing: the evaluation is not sealed.
        DataError: a file is damaged.
    """
    folder = evaluation.fetch(cache, only=lambda file: file in FILES)
    card = read_scorecard(folder, evaluation.address)
    marked = {row.name for row in card.metrics if row.trained_on} if model == "student" else set()
    return JudgedStudent(run, model, card, read_score_lines(folder), frozenset(marked | list_trained_on(store, run)))


def list_trained_on(store: str, run: str) -> set[str]:
    """The figures that the joint training of a run was to raise, as its record names them."""
    joint = Artifact(store, run, "joint").record()
    settings: Iterable[str] = () if joint is None else joint.identity
    rewards = [key.removeprefix(REWARDS) for key in settings if key.startswith(REWARDS)]
    return {figure for reward in rewards for figure in (reward, *FIGURES.get(reward, ()))}


def check_metrics(ours: JudgedStudent, metrics: tuple[str, ...]) -> None:
    """Check that the run was measured in these metrics, and not trained on all of them.

    Raises:
        ConfigError: a metric is unknown, or all were trained on.
        InputMissing: a metric could not be measured.
    """
    missing = {each.metric: each.why for each in ours.card.missing}
    for metric in metrics:
        if metric in missing and metric not in ours.metrics:
            raise InputMissing(f"--if-better {metric}: it was not measured for run {ours.run}: {missing[metric]}")
        if metric not in ours.metrics:
            raise ConfigError(
                f"--if-better {metric} is no metric in the evaluation of run {ours.run}; it has "
                f"{', '.join(ours.metrics)}"
            )
    if not metrics:
        raise ConfigError(f"--if-better names no metric; run {ours.run} has {', '.join(ours.metrics)}")
    _require_held_out(metrics, {ours.run: ours.trained_on})


def find_pair(
    store: str, ours: JudgedStudent, carrier: str, metrics: tuple[str, ...], cache: Path, draw: Draw | None
) -> tuple[JudgedStudent, JudgedStudent]:
    """Both students with scores that compare: of their own evaluations, or else drawn anew.

    Raises:
        InputMissing: their evaluations differ, and nobody can draw.
    """
    try:
        theirs = read_student(store, carrier, cache)
        differences = list_differences(ours, theirs, metrics)
    except InputMissing as error:
        theirs, differences = None, [str(error)]
    if theirs is not None and not differences:
        return ours, theirs
    if draw is None:
        raise InputMissing(
            f"the scores of {ours.run} and {carrier} do not compare: {'; '.join(differences)}; give the config of "
            f"{ours.run} with --config, so that the student of {carrier} is drawn and scored as its own was"
        )
    return draw(carrier)


def list_differences(ours: JudgedStudent, theirs: JudgedStudent, metrics: Iterable[str]) -> list[str]:
    """What two evaluations do not have in common, of what their scores rest on."""
    found = []
    if [(line.index, line.prompt) for line in ours.lines] != [(line.index, line.prompt) for line in theirs.lines]:
        found.append(f"their prompts are not the same ({len(ours.lines):,} and {len(theirs.lines):,})")
    if ours.card.intervals.seed != theirs.card.intervals.seed:
        found.append(f"their noise is of seed {ours.card.intervals.seed} and seed {theirs.card.intervals.seed}")
    if ours.card.images_per_prompt != theirs.card.images_per_prompt:
        found.append(f"a prompt has {ours.card.images_per_prompt} and {theirs.card.images_per_prompt} images")
    for metric in metrics:
        one, other = (student.card.about.get(metric) for student in (ours, theirs))
        if metric not in theirs.metrics:
            found.append(f"{metric} is not in the evaluation of {theirs.run}")
        elif one is not None and other is not None and one != other:
            found.append(f"{metric} is not the same metric in both")
    return found


def judge(
    name: str, fingerprint: str, ours: JudgedStudent, theirs: JudgedStudent, metrics: tuple[str, ...]
) -> Decision:
    """Decide between two students whose scores compare. fingerprint: of our export.

    Raises:
        ConfigError: no metric is left that neither run was trained on.
    """
    trained_on = ours.trained_on | theirs.trained_on
    _require_held_out(metrics, {ours.run: ours.trained_on, theirs.run: theirs.trained_on})
    found = [compare_metric(ours, theirs, metric) for metric in metrics if metric not in trained_on]
    words = {each.metric: _judge_metric(each, ours) for each in found}
    is_better = "better" in words.values() and "worse" not in words.values()
    not_counted = tuple(metric for metric in metrics if metric in trained_on)
    figures = "; ".join(f"{_format_metric(each)}, {words[each.metric]}" for each in found)
    verdict = f"{name} is the export of {ours.run} now, before {theirs.run}"
    if not is_better:
        why = "worse" if "worse" in words.values() else "not shown to be better"
        verdict = f"{ours.run} is not promoted, {name} stays with {theirs.run}: it is {why}"
    apart = f"; not counted, because a run was trained on it: {', '.join(not_counted)}" if not_counted else ""
    text = f"{verdict}: {figures}, on {format_count(len(ours.lines), 'prompt')}{apart}"
    decision = _decide(name, ours.run, fingerprint, text, is_promoted=is_better)
    return decision.model_copy(update={"over": theirs.run, "metrics": tuple(found), "not_counted": not_counted})


def compare_metric(ours: JudgedStudent, theirs: JudgedStudent, metric: str) -> MetricDecision:
    """Our scores less theirs, prompt by prompt, with the interval that a scorecard would have."""
    pairs = [
        (_get_score(one, ours.model, metric), _get_score(other, theirs.model, metric))
        for one, other in zip(ours.lines, theirs.lines, strict=True)
        if metric in one.scores[ours.model]
    ]
    (interval,) = bootstrap_differences(np.array(pairs).T, ours.card.intervals.seed)
    return MetricDecision(
        metric=metric,
        difference=finite_or_none(interval.mean),
        low=finite_or_none(interval.low),
        high=finite_or_none(interval.high),
        n=len(pairs),
    )


def _get_score(line: ScoreLine, model: str, metric: str) -> float:
    score = line.scores[model].get(metric)
    return np.nan if score is None else score


def _judge_metric(found: MetricDecision, ours: JudgedStudent) -> str:
    """Better, worse, no difference shown or undecided. A student that draws no numbers is worse."""
    broken = any(line.scores[ours.model].get(found.metric, 0.0) is None for line in ours.lines)
    return "worse" if broken else outcome_word(found.low, found.high)


def _format_metric(found: MetricDecision) -> str:
    if found.difference is None:
        return f"{found.metric} not a number"
    ends = f"{format_number(found.low, '+')}, {format_number(found.high, '+')}"
    return f"{found.metric} {format_number(found.difference, '+')} [{ends}]"


def _require_held_out(metrics: tuple[str, ...], trained: Mapping[str, frozenset[str]]) -> None:
    if all(any(metric in of_run for of_run in trained.values()) for metric in metrics):
        runs = [run for run, of_run in trained.items() if of_run.intersection(metrics)]
        raise ConfigError(
            f"--if-better {','.join(metrics)}: {' and '.join(runs)} trained on that, and what a run trained on decides "
            "nothing; name a metric that is held out"
        )


def _decide(name: str, run: str, fingerprint: str, text: str, *, is_promoted: bool) -> Decision:
    return Decision(
        schema=SCHEMA,
        name=name,
        run=run,
        fingerprint=fingerprint,
        over=None,
        is_promoted=is_promoted,
        text=text,
        decided_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
    )
