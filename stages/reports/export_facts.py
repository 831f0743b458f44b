"""The types of provenance.json, which lies beside the exported forms of a model.

Each is built in one place, stages/export.py, and never changed.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from dmdr.config.forms import Dtype
from dmdr.config.student import Student

SCHEMA: Literal[2] = 2


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True)


class LicenceFacts(_Facts):
    """A licence as a hub's card names it: an identifier, and for `other` its name and where it stands."""

    license: str
    license_name: str | None = None
    license_link: str | None = None


class TeacherFacts(_Facts):
    """The teacher. parts: of a single file, the folder or repository that its other parts come from."""

    name: str
    parts: str | None
    digest: str


class StartFacts(_Facts):
    """What the student started from. name: a hub's address or the last part of a path. digest: of its weights.

    licence: that of its own card; None if it has none.
    """

    name: str
    digest: str
    licence: LicenceFacts | None = None


class PromptFacts(_Facts):
    """The prompt set. counts: of prompts, by what became of them."""

    fingerprint: str
    counts: dict[str, int]


class CallFacts(_Facts):
    """The arguments that a pipeline has to be called with. timesteps, sigmas: only where its scheduler needs them."""

    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    timesteps: tuple[int, ...] | None = None
    sigmas: tuple[float, ...] | None = None

    @model_serializer(mode="wrap")
    def _leave_out(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        """What is not given does not stand in the file."""
        return {name: value for name, value in handler(self).items() if value is not None}

    def list_arguments(self) -> dict[str, int | float | list[int] | list[float]]:
        """Those that are given, by name."""
        given = self.model_dump()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


class ClassFacts(_Facts):
    """The names of the diffusers classes. part: of the pipeline that the network is; absent: parts it does not have."""

    family: str
    pipeline: str
    part: str
    network: str
    scheduler: str
    absent: list[str]


class CostFacts(_Facts):
    """What the last attempt of a stage used."""

    cpu_s: float
    peak_memory_mib: float


class StageFacts(_Facts):
    """One stage in short: which result it is, what made it, on what device, and for how long."""

    fingerprint: str
    code: dict[str, str]
    device: str
    duration_s: float
    cost: CostFacts


class ExportFacts(_Facts):
    """The whole file.

    parity: form -> the largest difference of its latents from those of the training sampler, which has the same rounded
    weights. rounding: the root mean square difference of latents that rounding to `dtype` made. samples: the prompts of
    images/1.png and so on. comfyui: the forms that have a workflow. update: of joint training, whose student it is;
    None: the one that training exports. licence: that of the teacher's card; None if it has none, or the card names
    none.
    """

    schema_version: Literal[2] = Field(SCHEMA, alias="schema")
    run: str
    teacher: TeacherFacts
    prompts: PromptFacts
    student: Student
    start: StartFacts | None = None  # None: the teacher
    nfe: int
    call: CallFacts
    rewards: dict[str, float]
    parity: dict[str, float]
    dtype: Dtype = "float32"  # early files say nothing, and theirs is float32
    rounding: float = 0.0
    samples: tuple[str, ...] = ()
    comfyui: tuple[str, ...] = ()
    update: int | None = None
    licence: LicenceFacts | None = None
    classes: ClassFacts
    stages: dict[str, StageFacts]
    code: dict[str, str]
    settings: dict[str, object]

    def to_json(self) -> dict[str, object]:
        """The content of provenance.json."""
        return self.model_dump(mode="json", by_alias=True)
