"""Promotes a run under a name if it is better than the run that carries the name, and tells of the decision.

1. Where the scores of both sealed evaluations do not compare, the student of the carrier is drawn as a pipeline beside
   that of the run, on the run's prompts, from its noise, and both are scored by its metrics. That evaluation is a run
   of its own, so the same command finds what it has done. A scheduler that adds noise later draws that itself.
2. A flow judges a result of a run once for each name, however often it is fired: it would otherwise promote again what
   a person has undone.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field

from dmdr.config.identity import identity
from dmdr.config.load import WHERE, load_config, read_mapping, validate
from dmdr.config.names import NAME
from dmdr.config.run import Config
from dmdr.config.stages import StageName
from dmdr.errors import ConfigError, DataError, InputMissing
from flows.chain import RunStage
from stages.reports.comparison.promotion import JudgedStudent, promote_if_better, read_model
from stages.reports.export_facts import ExportFacts
from stages.runtime.events import announce, build_promotion
from stages.store.artifacts import Artifact
from stages.store.pointers import find_decision
from stages.store.records import Decision

CARRIER = "carrier"  # the name of the other student on the scorecard
COPIED: tuple[StageName, ...] = ("prompts", "export")
PIPELINE, FACTS = "pipeline/", "provenance.json"  # of an export


class Rule(BaseModel):
    """When a run gets a name: if it is better, in one of these metrics and worse in none, than the run that has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=NAME)]  # such as production
    if_better: Annotated[str, Field(min_length=1)]  # metrics, with commas

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.strip() for name in self.if_better.split(",") if name.strip()))


def build_rule(promote_as: str, if_better: str) -> Rule | None:
    """The rule of a flow; None if it is given none.

    Raises:
        ConfigError: it is given a name without metrics, or the reverse.
    """
    if bool(promote_as) != bool(if_better):
        raise ConfigError(
            f"promote_as is {promote_as!r} and if_better is {if_better!r}; give both, such as production and strict, "
            "or neither: a flow promotes nothing unjudged"
        )
    return Rule(name=promote_as, if_better=if_better) if promote_as else None


def promote(
    run_stage: RunStage, rule: Rule, run: str, store: str, config: str | None, teacher: str | None = None
) -> Decision:
    """Judge a run, move the name if it is better, and tell the receivers of `execution.notify`.

    run_stage: runs an evaluation where one is needed. config: path of the run's config; None: nothing can be drawn, and
    nobody is told. teacher: replaces the config's.

    Raises:
        ConfigError, DataError, InputMissing: as `promote_if_better`, or the config is not the run's.
        StageFailed: the evaluation of both failed.
    """
    if config is None:
        return promote_if_better(store, run, rule.name, rule.metrics)
    checked = load_config(config)
    draw = partial(evaluate_both, run_stage, config, run, store=store, teacher=teacher)
    decision = promote_if_better(store, run, rule.name, rule.metrics, draw)
    announce(checked, lambda: build_promotion(store, decision), partial(print, file=sys.stderr, flush=True))
    return decision


def promote_once(
    run_stage: RunStage, rule: Rule, run: str, store: str, config: str, teacher: str | None = None
) -> Decision:
    """`promote`, unless this result of the run was judged for the name before: then what was decided."""
    before = find_decision(store, rule.name, run, Artifact(store, run, "export").sealed().fingerprint)
    return before or promote(run_stage, rule, run, store, config, teacher)


def evaluate_both(
    run_stage: RunStage, config: str, run: str, carrier: str, *, store: str, teacher: str | None
) -> tuple[JudgedStudent, JudgedStudent]:
    """Draw and score the students of both runs as the config evaluates `run`. Returns that of `run` and the other.

    Raises:
        ConfigError: the config is not that of the run.
        InputMissing, DataError: the carrier has no pipeline that can be drawn.
        StageFailed: the evaluation failed.
    """
    source, checked = read_mapping(config, "config", WHERE), load_config(config)
    sealed = Artifact(store, run, "evaluate")
    sealed.claim(identity(checked, "evaluate"), sealed.sealed().inputs)  # it is sealed, so this only compares
    if checked.execution.cluster is not None:
        raise InputMissing(
            f"the evaluations of {run} and {carrier} do not compare, and a Job cannot draw the student of {carrier}; "
            "run dmdr promote with a config without execution.cluster where there is a GPU"
        )
    name = name_evaluation(store, run, carrier)
    for stage in COPIED:
        other = Artifact(store, run, stage)
        record = other.sealed()
        Artifact(store, name, stage).adopt(other, record.identity, record.inputs)
    with tempfile.TemporaryDirectory(prefix="dmdr-") as folder:
        section = source["evaluate"]
        assert isinstance(section, dict), "the config is valid"
        pipelines = {CARRIER: find_pipeline(store, carrier, Path(folder) / "export")}
        evaluate = {**section, "models": ["student"], "pipelines": pipelines}
        extended = {**source, "run": name, "evaluate": evaluate}
        validate(extended, Config, f"{config} with the student of {carrier}")
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(extended, sort_keys=False, allow_unicode=True), encoding="utf-8")
        run_stage("evaluate", str(path), name, store, teacher)
        made = Artifact(store, name, "evaluate")
        ours = read_model(store, run, made, "student", Path(folder) / "ours")
        return ours, read_model(store, carrier, made, CARRIER, Path(folder) / "theirs")


def name_evaluation(store: str, run: str, carrier: str) -> str:
    """The name of the run that holds the evaluation of both: the same for the same two exports."""
    results = [Artifact(store, each, "export").sealed().fingerprint for each in (run, carrier)]
    digest = hashlib.sha256(" ".join(results).encode()).hexdigest()[:8]
    return f"{run[:22]}-over-{carrier[:22]}-{digest}"


def find_pipeline(store: str, run: str, cache: Path) -> dict[str, object]:
    """The exported pipeline of a run, as an entry of `evaluate.pipelines`. cache: a remote store is copied there.

    Raises:
        InputMissing: the run exported none, or its call needs more than a number of steps.
        DataError: a file is damaged.
    """
    export = Artifact(store, run, "export")
    if not any(file.startswith(PIPELINE) for file in export.sealed().files):
        raise InputMissing(f"{export.address} has no pipeline to draw with; evaluate {run} on the same prompts instead")
    folder = export.fetch(cache, only=lambda file: file.startswith(PIPELINE) or file == FACTS)
    try:
        call = ExportFacts.model_validate_json((folder / FACTS).read_bytes()).call
    except (OSError, ValueError) as error:
        raise DataError(f"{export.address}/{FACTS} was not written by this DMDR; export again") from error
    if call.timesteps is not None or call.sigmas is not None:
        raise InputMissing(
            f"the student of {run} has its own times (student.timesteps), which no pipeline on a scorecard gets; "
            f"evaluate {run} on the same prompts instead"
        )
    return {
        "path": str((folder / PIPELINE).absolute()),
        "steps": call.num_inference_steps,
        "guidance_scale": call.guidance_scale,
    }
