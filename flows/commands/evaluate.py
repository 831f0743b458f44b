"""`dmdr evaluate`: a checkpoint of somebody else on the scorecard of a run. The result is a run of its own.

1. What the run has sealed is copied, not made again. Models that it has not trained yet are left out.
2. The name and the config of the new run say what was added, so the same command finds what it has already done.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import yaml

from dmdr.config.load import WHERE, read_mapping, validate
from dmdr.config.run import Config
from dmdr.config.stages import DRAWN_FROM, STAGES, list_compared, list_needed, list_stages
from dmdr.errors import ConfigError
from flows import chain
from flows.commands.run import run_chain, show_scorecard
from flows.launch.process import run_stage_with_retries
from stages.store.artifacts import Artifact

LONGEST = 63  # characters of a run's name
ConfigFile = dict[str, object]  # a config, or a section of one, before it is validated


def evaluate_pipeline(
    config: str, pipeline: str, steps: int, guidance: float, *, name: str | None, run: str | None, store: str
) -> int:
    """Put a pipeline on the scorecard of a run; returns an exit code.

    config: of the run that gives prompts, noise and metrics. pipeline: a diffusers folder, hub:OWNER/NAME@COMMIT or
    lab:NAME. guidance: the guidance scale, as this pipeline takes it. name: on the scorecard; if None, the folder's or
    repository's own. run: the name of the run; if None, the config's.

    Raises:
        ConfigError, DataError, InputMissing: before anything has started.
    """
    source = read_mapping(config, "config", WHERE)
    source_run = run or validate(source, Config, f"config {config}").run
    name = name or pipeline.partition("@")[0].rstrip("/").replace(":", "/").rsplit("/", 1)[-1]
    addition: ConfigFile = {"path": pipeline, "steps": steps, "guidance_scale": guidance}
    extended = extend_config(source, source_run, name, addition, store)
    checked = validate(extended, Config, f"{config} with {name}")
    run = checked.run
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(extended, sort_keys=False, allow_unicode=True), encoding="utf-8")

        def flow() -> None:
            from flows.distil import evaluate_with_pipelines

            evaluate_with_pipelines(str(path), run, source_run, store)

        if Artifact(store, run, "evaluate").record() is None:
            exit_code = run_chain(
                lambda: chain.evaluate_with_pipelines(run_stage_with_retries, str(path), run, source_run, store),
                flow,
                on_cluster=checked.execution.cluster is not None,
            )
            if exit_code:
                return exit_code
    show_scorecard(run, store)
    return 0


def extend_config(source: ConfigFile, source_run: str, name: str, pipeline: ConfigFile, store: str) -> ConfigFile:
    """The config `source` with one more pipeline, and of its models those that `source_run` has sealed.

    Raises:
        ConfigError: the section evaluate is missing.
    """
    section = source.get("evaluate")
    if not isinstance(section, dict):
        raise ConfigError("the config has no section evaluate, whose metrics judge the pipeline; add it")
    sealed = {stage for stage in STAGES if Artifact(store, source_run, stage).record() is not None}
    has_cold_start = source.get("cold_start", {}) is not None
    stages = list_stages(cold_start=has_cold_start)
    models = [
        model
        for model in section.get("models") or list_compared(cold_start=has_cold_start)
        if model not in DRAWN_FROM or sealed.issuperset(list_needed("evaluate", [model], stages))
    ]
    pipelines = {**section.get("pipelines", {}), name: pipeline}
    suffix = re.sub(r"[^a-z0-9]+", "-", f"{name}-{pipeline['steps']}".lower()).strip("-")
    run = f"{source_run[: LONGEST - len(suffix) - 6]}-with-{suffix}"
    return {**source, "run": run, "evaluate": {**section, "models": models or ["teacher"], "pipelines": pipelines}}
