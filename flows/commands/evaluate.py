"""`dmdr evaluate`: the scorecard of a run with somebody else's checkpoint on it, as a run of its own.

1. What the run has sealed is copied, not made again. Models that it has not trained yet are left out.
2. The other run's name and config say what was added, so that the same command finds what it has made.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import yaml

from dmdr.config.load import read_mapping, validate
from dmdr.config.run import Config
from dmdr.config.stages import DRAWN_FROM, MODELS, STAGES, list_needed
from dmdr.errors import ConfigError
from flows.commands.run import show_scorecard, start_flow
from stages.store.artifacts import Artifact

LONGEST = 63  # of a run's name


def evaluate_pipeline(
    config: str, pipeline: str, steps: int, guidance: float, *, name: str | None, run: str | None, store: str
) -> int:
    """Put a pipeline on the card; returns an exit code.

    pipeline: a diffusers folder, hub:OWNER/NAME@COMMIT or lab:NAME. guidance: as its pipeline takes it. name: on the
    card; the folder's or repository's own if not given.

    Raises:
        ConfigError, DataError, InputMissing: before anything has started.
    """
    data = read_mapping(config, "config", "the ones that come with DMDR are in configs/")
    of = run or validate(data, Config, f"config {config}").run
    name = name or pipeline.partition("@")[0].rstrip("/").replace(":", "/").rsplit("/", 1)[-1]
    asked = extend_config(data, of, name, {"path": pipeline, "steps": steps, "guidance_scale": guidance}, store)
    made = validate(asked, Config, f"{config} with {name}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(asked, sort_keys=False, allow_unicode=True), encoding="utf-8")

        def chain() -> None:
            from flows.with_pipeline import with_pipeline

            with_pipeline(str(path), made.run, of, store)

        if Artifact(store, made.run, "evaluate").record() is None and (code := start_flow(chain)):
            return code
    show_scorecard(made.run, store)
    return 0


def extend_config(data: dict, of: str, name: str, pipeline: dict, store: str) -> dict:
    """The config with the pipeline, and with the models that run `of` has sealed.

    Raises:
        ConfigError: the name is no name, or the section evaluate is missing.
    """
    if not isinstance(data.get("evaluate"), dict):
        raise ConfigError("the config has no section evaluate, whose metrics judge the pipeline; add it")
    models = data["evaluate"].get("models") or MODELS
    sealed = {stage for stage in STAGES if Artifact(store, of, stage).record() is not None}
    there = [m for m in models if m not in DRAWN_FROM or sealed.issuperset(list_needed("evaluate", [m]))] or ["teacher"]
    others = {**data["evaluate"].get("pipelines", {}), name: pipeline}
    suffix = re.sub(r"[^a-z0-9]+", "-", f"{name}-{pipeline['steps']}".lower()).strip("-")
    named = f"{of[: LONGEST - len(suffix) - 6]}-with-{suffix}"
    return {**data, "run": named, "evaluate": {**data["evaluate"], "models": there, "pipelines": others}}
