"""The settings of the watch: what it looks at, what rings an alarm, and what is done about it. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dmdr.config.section import Positive, Rate, Section

RECOVERIES = 3  # where a stage recovers and does not say how often (ours)


class Watch(Section):
    """The watch of a training stage: it evaluates the student while it trains, on training prompts and fixed noise.

    Alarms compare the student with the first look of its stage, in the cold start also with the teacher's own images.
    """

    every: Positive = 50  # student updates between evaluations; the first and the last student are always evaluated
    # a held-out reward: one that the stage does not train on. The joint stage needs one, the cold start may have one
    reward: str | None = Field(None, min_length=1)
    prompts: Positive = 64  # how many training prompts, evenly spaced; all of them if there are fewer
    seeds: int = Field(2, ge=2)  # images of each prompt, between which diversity is measured
    # off: print nothing. stop: end the stage and seal the current result. recover: go back to the best student that was
    # evaluated, in the cold start to the last healthy one, halve what the alarm names (the RL weight or a learning
    # rate), and go on
    on_alarm: Literal["off", "warn", "stop", "recover"] = "warn"
    # a loss that is not a number. fail: end with exit code 70. recover: as above, with half of both learning rates, or
    # of the RL weight if only the RL loss is broken
    on_divergence: Literal["fail", "recover"] = "fail"
    # how often the stage recovers; 3 if it is not set. After that it goes back once more, and ends there
    recoveries: Positive | None = None
    # last: the EMA weights at the end. best, for the joint stage: of the EMA weights that were evaluated, those with
    # the highest held-out reward. Weights that produced an image that is not a number are never the best.
    export: Literal["last", "best"] = "last"
    # for the joint stage: students of so many best evaluations are sealed too; dmdr export writes one by its --update
    keep_best: int = Field(0, ge=0)
    # alarm if the held-out reward falls by more than this below its best value; in the cold start, where it may dip on
    # the way, by more than three times this, and below the teacher's if its best value is above that
    reward_drop: Rate = 0.05
    diversity_drop: float = Field(0.3, gt=0, lt=1)  # alarm if diversity loses more than this share of its first value
    saturation_rise: Rate = 0.3  # alarm if colour saturation gains more than this share of its first value
    sharpness_drop: float = Field(0.4, gt=0, lt=1)  # alarm if sharpness loses more than this share: images are blurred
    # alarm if the share of black images, of white ones or of those of one colour rises by more than this
    blank_rise: float = Field(0.1, gt=0, lt=1)
    # alarm if the fake score's loss is more than so many times the bare teacher's on the same samples of the student; a
    # new LoRA begins at 1, healthy runs of the lab stay below 0.8, and one with 1,000 times its rate is at 1.0 to 1.5
    fake_lag: Rate = 1.2
    # alarm if the fake score's mean loss is more than so many times that of the first update; a healthy cold start of
    # the lab came to 4.3
    fake_rise: Rate = 8.0
    gradient_drop: float = Field(0.95, gt=0, lt=1)  # alarm if the student's median gradient loses more than this share

    @property
    def recovers(self) -> bool:
        return "recover" in (self.on_alarm, self.on_divergence)

    @property
    def kept(self) -> int:
        """How many of the best checkpoints are kept apart from the newest."""
        return max(self.keep_best, int(self.recovers))

    @model_validator(mode="before")
    @classmethod
    def _set_recoveries(cls, data: object) -> object:
        """So that the number is part of what names a result."""
        if isinstance(data, dict) and "recover" in (data.get("on_alarm"), data.get("on_divergence")):
            return {**data, "recoveries": RECOVERIES if data.get("recoveries") is None else data["recoveries"]}
        return data

    @model_validator(mode="after")
    def _check_recoveries(self) -> Watch:
        if self.recoveries is not None and not self.recovers:
            raise ValueError(
                f"joint.watch.recoveries is {self.recoveries} but neither joint.watch.on_alarm nor on_divergence is "
                "recover; drop it, or set one of them"
            )
        return self
