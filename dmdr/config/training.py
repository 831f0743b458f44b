"""The settings of the two training stages: networks and updates. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dmdr.config.rl import GRPO, AnyRL, Weighting
from dmdr.config.section import Positive, Rate, Section
from dmdr.config.watch import Watch


class Dynamic(Section):
    """The schedules DynaDG and DynaRS (DMDR, 3.3). `updates: 0` turns both off."""

    updates: int = Field(0, ge=0)  # student updates until both schedules end
    real_scale: float = Field(0.75, ge=0)  # DynaDG: initial LoRA scale of the real score; 0 turns DynaDG off
    renoise: tuple[Rate, Rate] = Field((4.0, 1.5), strict=False)  # DynaRS: initial Beta(a, b); [1, 1] turns it off
    schedule: Literal["cosine", "constant"] = "cosine"  # constant keeps the initial values (Table 4, -Dynamic)


class Optimizer(Section):
    """AdamW for one of the two networks."""

    learning_rate: Rate
    # the rate falls linearly to this at the last update; None: the rate stays constant
    final_learning_rate: Rate | None = None
    # fused: one kernel updates all tensors. 8bit: bitsandbytes keeps the moments in 8 bits, a quarter of the memory.
    kind: Literal["adamw", "fused", "8bit"] = "adamw"
    # decay of the two moments. Ours are for runs of hundreds of updates: no momentum, because the two networks chase
    # each other, and a second moment that soon forgets the first gradients. "authors' code, t2i" has 0.9 and 0.999
    betas: tuple[float, float] = Field((0.0, 0.99), strict=False)
    eps: Rate = 1e-8  # added to the root of the second moment
    warmup: int = Field(0, ge=0)  # updates in which the rate rises linearly from 0; the last of them has it whole
    weight_decay: float = Field(0.01, ge=0)  # "official demo"
    clip: Rate = 1.0  # largest gradient norm ("official demo")


class Training(Section):
    """The settings that the cold start and joint training share."""

    updates: Positive  # student updates
    batch_size: Positive  # prompts in an update
    # fake score updates for each student update; the last of them shares the student update's images
    fake_updates: Positive = 5
    student: Optimizer
    fake_score: Optimizer
    dynamic: Dynamic = Dynamic()
    # lowest and highest renoise level t ("DMD2"); the authors' code for text to image has [0, 1]
    renoise_range: tuple[float, float] = Field((0.02, 0.98), strict=False)
    # added to the mean |x0 - x0_real| that divides the gradient of distribution matching; "authors' code, t2i" has 1e-8
    dm_floor: float = Field(0.0, ge=0)
    # RL beside distribution matching. In the cold start, with weight 1 / beta, the student goes towards a teacher that
    # is tilted by the reward: teacher times exp(reward / beta) (RTDMD)
    rl: Annotated[AnyRL, Field(discriminator="algorithm")] | None = None
    # take the CFG of the real score at a renoise level of its own, for one forward more ("Decoupled-DMD", the recipe of
    # Z-Image). below: uniformly below the time of the student's own input, which its authors found best. independent:
    # uniformly over renoise_range. None: where the two scores are compared
    decoupled: Literal["below", "independent"] | None = None
    watch: Watch | None = None

    @model_validator(mode="after")
    def _check_watch(self) -> Training:
        if self.watch and self.rl and self.watch.reward in self.rl.rewards:
            raise ValueError(
                f"joint.watch.reward {self.watch.reward} is trained on; watch one that is not in joint.rl.rewards"
            )
        return self

    @model_validator(mode="after")
    def _check_renoise_range(self) -> Training:
        low, high = self.renoise_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"renoise_range must be 0 <= low < high <= 1, got {low}, {high}")
        return self

    @model_validator(mode="after")
    def _check_rate_warmup(self) -> Training:
        for network, optimizer in {"student": self.student, "fake_score": self.fake_score}.items():
            if optimizer.warmup > self.updates:
                raise ValueError(
                    f"{network}.warmup is {optimizer.warmup} but its stage has {self.updates} updates, so the learning "
                    "rate would never be reached; set fewer"
                )
        return self

    @property
    def most_updates(self) -> int:
        """Student updates for which the states of one rollout are enough."""
        return max(1, self.fake_updates - 1)

    @property
    def takes_guidance_apart(self) -> bool:
        """Whether it needs a teacher with CFG, whose part in the real score is decoupled or weighed."""
        return self.decoupled is not None or (isinstance(self.rl, Weighting) and self.rl.part == "guidance")

    @property
    def matches_distributions(self) -> bool:
        """Whether the student is distilled; a cold start always does that."""
        return True

    @model_validator(mode="after")
    def _check_inner_updates(self) -> Training:
        inner = self.rl.inner_updates if isinstance(self.rl, GRPO) else 1
        if inner > self.most_updates and self.matches_distributions:
            raise ValueError(
                f"joint.rl.inner_updates {inner} needs as many batches of joint.fake_updates {self.fake_updates}, "
                f"whose states are enough for {self.most_updates}; lower it, or raise fake_updates"
            )
        return self

    @model_validator(mode="after")
    def _check_rl_schedule(self) -> Training:
        if self.rl is None:
            return self
        start, ramp = self.rl.start, self.rl.ramp
        if start >= self.updates:
            raise ValueError(
                f"joint.rl.start is {start} but its stage has {self.updates} updates, so RL would never act; set fewer"
            )
        if start + ramp > self.updates:
            raise ValueError(
                f"joint.rl.ramp {ramp} from update {start} on ends after the {self.updates} updates of its stage, so "
                "the weight would never be reached; set fewer"
            )
        return self


class Joint(Training):
    """Distribution matching and RL at once.

    Without `rl` it is distillation only. Without distribution matching it is RL only (Table 5).
    """

    distribution_matching: bool = True
    # without a cold start: updates of the fake score alone, `fake_updates` steps each, before the first student update,
    # until it follows the student; they do not count as `updates`
    fake_warmup: int = Field(0, ge=0)

    @property
    def matches_distributions(self) -> bool:
        return self.distribution_matching

    @model_validator(mode="after")
    def _check_watched(self) -> Joint:
        if self.watch is not None and self.watch.reward is None:
            raise ValueError("joint.watch.reward is missing; name a held-out reward")
        return self

    @model_validator(mode="after")
    def _check_warmup(self) -> Joint:
        if self.fake_warmup and not self.distribution_matching:
            raise ValueError(
                "joint.fake_warmup trains the fake score, which distribution_matching: false does not use; drop it"
            )
        return self

    @model_validator(mode="after")
    def _check_losses(self) -> Joint:
        if self.decoupled is not None and not self.distribution_matching:
            raise ValueError("joint.decoupled is set but joint.distribution_matching is false; drop it")
        if isinstance(self.rl, Weighting) and not self.distribution_matching:
            raise ValueError(
                "joint.rl.algorithm weighting weighs distribution matching and joint.distribution_matching is false; "
                "drop one"
            )
        if self.rl is None:
            if not self.distribution_matching:
                raise ValueError(
                    "joint.distribution_matching is false and joint.rl is missing: nothing would be trained; set one"
                )
            return self
        if self.dm_floor and not self.distribution_matching:
            raise ValueError("joint.dm_floor is set but joint.distribution_matching is false; drop it")
        if self.rl.weight_is == "matched" and not self.distribution_matching:
            raise ValueError("joint.rl.weight_is matched needs distribution_matching; set it to fixed")
        if self.rl.start and not self.distribution_matching:
            raise ValueError(
                f"joint.rl.start is {self.rl.start} but joint.distribution_matching is false: nothing would be trained "
                "until then; drop it"
            )
        return self
