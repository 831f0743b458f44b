"""The settings of the two training stages: networks and updates, RL, and the hacking alarm. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dmdr.config.reward_weights import BLIND
from dmdr.config.section import Address, Positive, Rate, Section


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


Words = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1, strict=False)]


class Preference(Section):
    """Semantic relative preference: how much better a reward finds an image under a positive word than a negative one.

    The score is (1 + k) reward(image, "POSITIVE. prompt") - reward(image, "NEGATIVE. prompt") ("authors' code, t2i",
    which calls it SRPO). One word of each list is drawn each update.
    """

    positive: Words
    negative: Words
    k: float = Field(0.1, ge=0)


class RL(Section):
    """The settings that the three RL algorithms share."""

    weight: float = Field(gt=0)  # of the RL loss; the weight of the distribution matching loss is 1
    # matched: multiply the weight by |gradient of distribution matching| / |gradient of RL| at the first joint update
    weight_is: Literal["fixed", "matched"] = "fixed"
    rewards: dict[str, float] = Field(min_length=1)  # reward -> its weight in the sum of rewards
    # reward -> what its score is multiplied by before all else. 0.01 makes cosines of dfn-clip, hpsv2.1 and clip-score,
    # whose scores are 100 times the cosine.
    scales: dict[str, Rate] = Field({})
    # grpo and dpo: centre each reward and divide it by its standard deviation, both over the last 100 updates, so that
    # the weights in `rewards` weigh rewards of any unit
    normalise: bool = False
    prefixes: dict[str, Annotated[str, Field(min_length=1)]] = Field({})  # reward -> what stands before its prompts
    preferences: dict[str, Preference] = Field({})  # reward -> the words that it compares an image under

    @model_validator(mode="after")
    def _check_rewards_named(self) -> RL:
        named = {"scales": {*self.scales}, "prefixes": {*self.prefixes}, "preferences": {*self.preferences}}
        for key, of_reward in named.items():
            if other := sorted(of_reward.difference(self.rewards)):
                raise ValueError(
                    f"joint.rl.{key} has {other[0]}, which is not in joint.rl.rewards; drop it, or add the reward"
                )
        if self.normalise and self.scales:
            raise ValueError(
                f"joint.rl.normalise gives every reward the deviation 1, and the scale of {next(iter(self.scales))} in "
                "joint.rl.scales would do nothing; drop one"
            )
        for key in ("prefixes", "preferences"):
            if blind := sorted(BLIND.intersection(named[key])):
                raise ValueError(f"joint.rl.{key} has {blind[0]}, which does not read the prompt; drop it")
        if both := sorted(set(self.prefixes) & set(self.preferences)):
            raise ValueError(
                f"joint.rl.prefixes and joint.rl.preferences both have {both[0]}; name it in one, for both write words "
                "before its prompts"
            )
        return self


class ReFL(RL):
    """Reward feedback learning: follow the gradient of the reward through the decoder."""

    algorithm: Literal["refl"]
    # Maximise the reward, or its logarithm. Use the logarithm for rewards that are probabilities, as those of the lab:
    # the gradient of a probability vanishes near 0 and near 1, that of its logarithm only near 1. hinge: raise each
    # reward until it reaches the margin, L = weight in the sum * mean max(0, margin - score) ("authors' code, t2i").
    map: Literal["linear", "log", "hinge"] = "linear"
    margin: float | None = None  # for hinge: where a reward, times its scale, is good enough
    pretraining: float = Field(0.0, ge=0)  # weight of the pretraining loss, for RL without distribution matching
    # The decoder that the gradient goes through. whole: the teacher's. tiled: the teacher's, tile by tile, which keeps
    # the activations of one tile in memory. tiny: an AutoencoderTiny such as TAESD.
    decoder: Literal["whole", "tiled", "tiny"] = "whole"
    tiny_decoder: Address | None = None  # for tiny: a folder, or hub:OWNER/NAME@COMMIT

    @model_validator(mode="after")
    def _check_normalise(self) -> ReFL:
        if self.normalise:
            raise ValueError(
                "joint.rl.normalise is for rewards that are compared within a group, and refl follows the gradient of "
                "each; set joint.rl.scales"
            )
        return self

    @model_validator(mode="after")
    def _check_map(self) -> ReFL:
        if self.map == "hinge" and self.margin is None:
            raise ValueError(
                "joint.rl.map is hinge but joint.rl.margin is missing; set one, for example 0.7 of a cosine"
            )
        if self.map != "hinge" and self.margin is not None:
            raise ValueError(f"joint.rl.margin is set but joint.rl.map is {self.map}; drop it, or set map: hinge")
        if self.map == "hinge" and (below := [name for name, share in self.rewards.items() if share <= 0]):
            raise ValueError(
                f"joint.rl.map is hinge, which needs weights above 0, and {below[0]} has {self.rewards[below[0]]:g}; "
                "raise it, or use map: linear"
            )
        if self.map == "log" and self.preferences:
            raise ValueError(
                f"joint.rl.map log needs rewards above 0, and joint.rl.preferences makes a difference of "
                f"{next(iter(self.preferences))}; use map: linear or hinge"
            )
        return self

    @model_validator(mode="after")
    def _check_tiny_decoder(self) -> ReFL:
        if self.decoder == "tiny" and self.tiny_decoder is None:
            raise ValueError(
                "joint.rl.decoder is tiny but joint.rl.tiny_decoder is missing; give a folder or hub:OWNER/NAME@COMMIT"
            )
        if self.decoder != "tiny" and self.tiny_decoder is not None:
            raise ValueError(
                f"joint.rl.tiny_decoder is set but joint.rl.decoder is {self.decoder}; drop it, or set decoder: tiny"
            )
        return self

    def needs_reference(self) -> bool:
        return self.pretraining > 0


class DPO(RL):
    """Direct preference optimization on the best and the worst of each group."""

    algorithm: Literal["dpo"]
    group_size: int = Field(8, ge=2)  # images of one prompt; the best and the worst become a pair
    # how close the student stays to the cold start; it multiplies log-likelihoods, which are means over the elements
    beta: Rate = 100.0

    def needs_reference(self) -> bool:
        return True


class GRPO(RL):
    """Group relative policy optimization. The actions of the policy are the renoising steps of the sampler."""

    algorithm: Literal["grpo"]
    group_size: int = Field(8, ge=2)  # images of one prompt; each is compared with their mean
    inner_updates: Positive = 1  # student updates on one rollout; clipping acts from the second on
    # largest change of the likelihood ratio, for inner_updates 2 or more; log-likelihoods are means over the elements
    clip_range: Rate = 1e-3
    kl: float = Field(0.0, ge=0)  # weight of the KL regulariser, for RL without distribution matching

    def needs_reference(self) -> bool:
        return self.kl > 0

    @model_validator(mode="after")
    def _check_clip_range(self) -> GRPO:
        if self.inner_updates == 1 and "clip_range" in self.model_fields_set:
            raise ValueError(
                "joint.rl.clip_range does nothing with inner_updates 1, because the ratio is always 1; drop it, or set "
                "inner_updates to 2 or more"
            )
        return self


AnyRL = ReFL | DPO | GRPO


class Watch(Section):
    """The hacking alarm: it evaluates the student during joint training, on training prompts and fixed noise."""

    every: Positive = 50  # student updates between evaluations; the first and the last student are always evaluated
    reward: str = Field(min_length=1)  # a held-out reward: one that joint.rl.rewards does not have
    prompts: Positive = 64  # how many training prompts, evenly spaced; all of them if there are fewer
    seeds: int = Field(2, ge=2)  # images of each prompt, between which diversity is measured
    # off: print nothing. stop: end the stage and seal the current result
    on_alarm: Literal["off", "warn", "stop"] = "warn"
    # last: the EMA weights at the end. best: of the EMA weights that were evaluated, those with the highest held-out
    # reward. Weights that produced an image that is not a number are never the best.
    export: Literal["last", "best"] = "last"
    reward_drop: Rate = 0.05  # alarm if the held-out reward falls by more than this below its best value
    diversity_drop: float = Field(0.3, gt=0, lt=1)  # alarm if diversity loses more than this share of its first value
    saturation_rise: Rate = 0.3  # alarm if colour saturation gains more than this share of its first value


class Joint(Training):
    """Distribution matching and RL at once.

    Without `rl` it is distillation only. Without distribution matching it is RL only (Table 5).
    """

    rl: Annotated[AnyRL, Field(discriminator="algorithm")] | None = None
    distribution_matching: bool = True
    watch: Watch | None = None
    # without a cold start: updates of the fake score alone, `fake_updates` steps each, before the first student update,
    # until it follows the student; they do not count as `updates`
    fake_warmup: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check_warmup(self) -> Joint:
        if self.fake_warmup and not self.distribution_matching:
            raise ValueError(
                "joint.fake_warmup trains the fake score, which distribution_matching: false does not use; drop it"
            )
        return self

    @model_validator(mode="after")
    def _check_losses(self) -> Joint:
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
        if isinstance(self.rl, DPO) and self.batch_size % 2:
            raise ValueError(f"joint.batch_size is {self.batch_size}; DPO trains on pairs, so make it even")
        if self.watch and self.watch.reward in self.rl.rewards:
            raise ValueError(
                f"joint.watch.reward {self.watch.reward} is trained on; watch one that is not in joint.rl.rewards"
            )
        return self
