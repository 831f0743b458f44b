"""The settings of evaluation: the models and the metrics of the scorecard. No torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from dmdr.config.reward_weights import OF_JUDGE
from dmdr.config.section import Address, Positive, Section
from dmdr.config.stages import MODELS, ModelName, list_compared

JUDGES = ("lab-checker", "fashion-judge", *OF_JUDGE)  # metrics that are not rewards
MODEL = r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,39}$"  # the name of another model on the scorecard


class Pipeline(Section):
    """Another checkpoint for the scorecard. Its own diffusers pipeline samples it."""

    path: Address  # a diffusers folder, hub:OWNER/NAME@COMMIT, or lab:NAME
    steps: Positive
    guidance_scale: float = Field(1.0, ge=0.0)  # the argument of its pipeline


class Evaluate(Section):
    """The scorecard: models compared on held-out prompts. Student, teacher and naive teacher get the same noise."""

    # names from JUDGES or names of rewards; may be empty where seeds is 2 or more: then only diversity is measured
    metrics: tuple[str, ...] = Field(strict=False)
    limit: Positive | None = None  # largest number of prompts; None: all
    batch_size: Positive = 64
    # the models to compare. A run without a cold start compares its student's start in the place of the cold start.
    models: tuple[ModelName, ...] = Field(list_compared(cold_start=True), min_length=1, strict=False)
    seeds: Positive = 1  # images of each prompt; with 2 or more, diversity is reported
    pipelines: dict[Annotated[str, Field(pattern=MODEL)], Pipeline] = Field({})  # name on the scorecard -> checkpoint

    @model_validator(mode="after")
    def _check_lpips(self) -> Evaluate:
        if "lpips" in self.metrics and self.seeds == 1:
            raise ValueError(
                "evaluate.metrics has lpips, a distance between images of one prompt, but seeds is 1; set 4"
            )
        if not self.metrics and self.seeds == 1:
            raise ValueError(
                "evaluate.metrics is empty; name a metric, or set evaluate.seeds to 2 to measure diversity"
            )
        if self.metrics == ("lpips",):
            raise ValueError(
                "evaluate.metrics has only lpips, which measures diversity but not quality; add another metric"
            )
        return self

    @model_validator(mode="after")
    def _check_pipeline_names(self) -> Evaluate:
        if taken := sorted(set(self.pipelines).intersection(MODELS)):
            raise ValueError(
                f"evaluate.pipelines.{taken[0]} has the name of one of evaluate.models; choose another name"
            )
        return self

    @model_validator(mode="after")
    def _check_models(self) -> Evaluate:
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"evaluate.models names a model twice: {', '.join(self.models)}; name it once")
        return self
