"""The flow of `dmdr evaluate`: the stages of a run, copied where they are sealed, then an evaluation of its own."""

from __future__ import annotations

from prefect import flow

from dmdr.config.load import load_config
from dmdr.config.stages import list_needed
from flows.distil import run_stage
from flows.prefect_support import artifacts
from stages.store.artifacts import Artifact


@flow(name="evaluate", persist_result=False, result_serializer="json")
def with_pipeline(config: str, run: str, of: str, store: str) -> None:
    """Evaluate under the name `run` what `of` has made, with the pipelines of the config beside it.

    Raises:
        StageFailed: a stage ended without its seal.
    """
    for name in list_needed("evaluate", load_config(config).evaluate.models):
        run_stage(name, config, run, store, adopt=of if Artifact(store, of, name).record() is not None else None)
    run_stage("evaluate", config, run, store)
    artifacts.publish_scorecard(run, store)
