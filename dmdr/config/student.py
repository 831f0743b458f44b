"""The settings of the two networks that are trained: the few-step student and the fake score. No torch."""

from __future__ import annotations

import itertools
from typing import Literal

from pydantic import Field, model_validator

from dmdr.config.few_steps import FewSteps
from dmdr.config.lora import Init, LoraForm, Targets
from dmdr.config.section import Positive, Rate, Section
from dmdr.config.start import Start


class Student(Section):
    """The few-step model."""

    steps: Literal[1, 2, 4, 8]
    form: Literal["full", "lora"] = "full"
    lora_rank: Positive | None = None
    lora_alpha: Rate | None = None  # the LoRA counts lora_alpha / lora_rank times; None: the rank, so once
    # The modules that the LoRA adapts. attention: the projections of all attentions. wide: all linear layers of the
    # blocks; of SDXL the authors' list, which has its convolutions too. Or names, or endings of names.
    lora_targets: Targets = "attention"
    # How the LoRA's A begins; B is zero. gaussian: standard deviation 1 / lora_rank (the authors' code, t2i), whose
    # first steps are longer than those of kaiming at the same learning rate.
    lora_init: Init = "kaiming"
    # highest decay of the averaged weights (EMA) that are exported; 0 exports the last weights
    ema: float = Field(0.99, ge=0.0, lt=1.0)
    start: Start | None = None  # what the student starts from; None: the teacher
    # share of fresh noise in each renoising step. 1: all of it. 0: none, the deterministic (Euler) step of the same
    # path. Between them only the rollouts of training mix, and the exported student is deterministic.
    eta: float = Field(1.0, ge=0.0, le=1.0)
    # the times at which the student is called, as its network is told them: 1000 is noise. [399] lets a 1-step SDXL
    # student predict from an easier level. None: the family's own, from the teacher's scheduler
    timesteps: tuple[float, ...] | None = Field(None, strict=False)
    shift: Rate | None = None  # of a flow model's times; None: that of the teacher's scheduler

    @property
    def few_steps(self) -> FewSteps:
        """How the student samples."""
        return FewSteps(self.steps, self.eta, self.timesteps, self.shift)

    @model_validator(mode="after")
    def _check_times(self) -> Student:
        if self.timesteps is not None and self.shift is not None:
            raise ValueError("student.timesteps and student.shift both set the student's times; drop one")
        if self.eta < 1 and self.steps == 1:
            raise ValueError("student.eta does nothing with student.steps 1, which never renoises; drop it")
        if self.timesteps is None:
            return self
        if len(self.timesteps) != self.steps:
            raise ValueError(
                f"student.timesteps has {len(self.timesteps)} of them and student.steps is {self.steps}; give one for "
                "each step"
            )
        if any(later >= earlier for earlier, later in itertools.pairwise(self.timesteps)):
            raise ValueError(f"student.timesteps {_list(self.timesteps)} must descend, from noise to data")
        if not 0 < self.timesteps[-1] <= self.timesteps[0] <= 1000:
            raise ValueError(f"student.timesteps {_list(self.timesteps)} must lie above 0 and be at most 1000")
        return self

    @model_validator(mode="after")
    def _check_rank(self) -> Student:
        if self.form == "full" and self.lora_rank is not None:
            raise ValueError("student.lora_rank is set but student.form is full; drop it, or set form: lora")
        if self.form == "lora" and self.lora_rank is None:
            raise ValueError("student.form is lora but student.lora_rank is missing; set one, for example 64")
        if self.form == "full" and self.lora_form != LoraForm():
            changed = next(name for name in ("targets", "init", "alpha") if f"lora_{name}" in self.model_fields_set)
            raise ValueError(f"student.lora_{changed} is set but student.form is full; drop it, or set form: lora")
        return self

    @property
    def lora_form(self) -> LoraForm:
        """What a LoRA student adapts, how it begins, and its alpha."""
        return LoraForm(self.lora_targets, self.lora_init, self.lora_alpha)


def _list(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


class FakeScore(Section):
    """The LoRA on the shared base that learns the score of the student's distribution."""

    lora_rank: Positive = 32  # "official demo"
    scale: float = Field(2.0, gt=0)  # LoRA scale when the network acts as the fake score ("official demo")
    lora_targets: Targets = "attention"  # as for student
    lora_init: Init = "kaiming"  # as for student
