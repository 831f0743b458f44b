"""The types of scorecard.json, and of speed.json beside it. aggregate.py builds a scorecard from scores.

They need neither numpy nor scipy, so that a command that only shows a scorecard starts fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA: Final = 2
KEYS = (  # of scorecard.json, in the file's order
    "schema",
    "run",
    "prompts",
    "images_per_prompt",
    "intervals",
    "models",
    "metrics",
    "paired",
    "tags",
    "missing",
    "about",
    "truncated",
)

MetricFacts = dict[str, str | int | float | None]  # the description of a figure: model, weights, scale, prefix


@dataclass(frozen=True)
class Model:
    """A model that evaluation compares. guidance_is_input: guidance is an input of the network, as of FLUX.1."""

    name: str
    steps: int
    guidance_scale: float
    guidance_is_input: bool = False

    @property
    def nfe(self) -> int:
        """Forwards of the network for one image. Guidance doubles them, unless it is an input of the network."""
        return self.steps * (2 if self.guidance_scale > 1 and not self.guidance_is_input else 1)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class ModelOnCard(_Part):
    """A model as the scorecard lists it. label: how pages call it. nfe: forwards of the network for one image."""

    name: str
    steps: int
    guidance_scale: float
    guidance_is_input: bool = False
    label: str = Field(default_factory=lambda fields: fields["name"])  # schema 1 has none
    nfe: int


class MetricRow(_Part):
    """The mean score of one model in one figure, with the ends of its 95 % interval; None where one is not a number.

    n: prompts that the figure judges. broken: how many of their scores are not a number. trained_on: whether a
    compared model was trained to raise this figure.
    """

    name: str
    model: str
    mean: float | None
    low: float | None
    high: float | None
    n: int
    broken: int
    trained_on: bool


class PairedDifference(_Part):
    """Model a less model b in one metric, prompt by prompt, with the ends of its 95 % interval.

    n: prompts that both have a score of; earlier cards do not say.
    """

    metric: str
    a: str
    b: str
    difference: float | None
    low: float | None
    high: float | None
    n: int | None = None


class TagMean(_Part):
    """The mean over the n prompts of one tag; None where a score is not a number."""

    mean: float | None
    n: int


class TagMeans(_Part):
    """One model's means by tag, and the overall mean as the benchmark defines it."""

    tags: dict[str, TagMean]
    overall: float | None


class MissingMetric(_Part):
    """A metric of the config that could not be measured."""

    metric: str
    why: str


class IntervalMethod(_Part):
    """The method that computed the intervals. seed: of the resamples."""

    method: str
    resamples: int
    seed: int


class Figures(_Part):
    """The numbers that tables and charts show, from one run or from several runs that are compared.

    The first model is compared with the others. metrics: one row for each figure and model. tags: figure -> model ->
    its means by tag. about: figure -> its description.
    """

    models: tuple[ModelOnCard, ...]
    metrics: tuple[MetricRow, ...]
    paired: tuple[PairedDifference, ...]
    tags: dict[str, dict[str, TagMeans]] = {}
    missing: tuple[MissingMetric, ...] = ()
    about: dict[str, MetricFacts] = {}


class Scorecard(Figures):
    """scorecard.json: the figures of one run and the conditions under which they were measured.

    prompts: number of prompts, with `images_per_prompt` images each. truncated: evaluation prompts that are longer
    than the text encoder reads.
    """

    schema_version: Literal[2] = Field(SCHEMA, alias="schema")
    run: str
    prompts: int
    images_per_prompt: int
    intervals: IntervalMethod
    truncated: int

    def to_json(self) -> dict[str, object]:
        """The content of scorecard.json, its keys in the file's order."""
        content = self.model_dump(mode="json", by_alias=True)
        return {key: content[key] for key in KEYS}


class Spread(_Part):
    """How much the time of an image differs between batches: the least, the greatest, and how many were timed."""

    least: float
    greatest: float
    batches: int


class Speed(_Part):
    """speed.json: how fast the models drew, in a file of its own because time is no part of the result.

    seconds_per_image: by model, the median of warmed-up batches of `batch_size` images on `device`. spread: by
    model, of the same batches; earlier files have none.
    """

    device: str
    batch_size: int
    seconds_per_image: dict[str, float | None]
    spread: dict[str, Spread] = {}
