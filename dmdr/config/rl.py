"""The settings of the RL algorithms, and of the rewards that they train on. No torch.

1. RL in the cold start, `cold_start.rl`, is the paper's newer version, "Reward-Tilted Distribution Matching". Its
   equations are not to be had: only its abstract could be read. We follow RTDMD, which derives the same aim: KL(student
   || teacher exp(reward / beta) / Z) = KL(student || teacher) - mean reward / beta + a constant. That is the paper's
   equation 2 with weight 1 / beta from update 0 on.
2. `weighting` follows what its authors answered when they were asked for it (issues 8 and 13 of their repository): "the
   advantages serve as the coefficient of the DMD loss", or of its CFG part. How, they do not say; the form is ours.
3. Messages here name the settings of `joint`; `load` names the stage that has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, NoReturn

from pydantic import Field, model_validator

from dmdr.config.reward_weights import BLIND
from dmdr.config.section import Address, Positive, Rate, Section

Words = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1, strict=False)]


class Preference(Section):
    """Semantic relative preference: how much better a reward finds an image under a positive word than a negative one.

    The score is (1 + k) reward(image, "POSITIVE. prompt") - reward(image, "NEGATIVE. prompt") ("authors' code, t2i",
    which calls it SRPO). One word of each list is drawn each update.
    """

    positive: Words
    negative: Words
    k: float = Field(0.1, ge=0)


MATCHING = 16  # updates whose median ratio sets a matched weight: "matched" by one was off by a factor of 2 to 4 (ours)


class RL(Section):
    """The settings that the RL algorithms share."""

    # of the RL loss; the weight of the distribution matching loss is 1. With 0, RL is logged and changes nothing
    weight: float = Field(ge=0)
    # matched: multiply the weight by the median of |gradient of distribution matching| / |gradient of RL| over the
    # first updates, and clip RL's gradient apart, at its weight times the median length of the other
    weight_is: Literal["fixed", "matched"] = "fixed"
    matching: Positive | None = None  # for matched: over how many updates the median is taken; 16 if it is not set
    rewards: dict[str, float] = Field(min_length=1)  # reward -> its weight in the sum of rewards
    # reward -> what its score is multiplied by before all else. 0.01 makes cosines of dfn-clip, hpsv2.1 and clip-score,
    # whose scores are 100 times the cosine.
    scales: dict[str, Rate] = Field({})
    # all but refl: centre each reward and divide it by its standard deviation, both over the last 100
    # updates, so that the weights in `rewards` weigh rewards of any unit
    normalise: bool = False
    prefixes: dict[str, Annotated[str, Field(min_length=1)]] = Field({})  # reward -> what stands before its prompts
    preferences: dict[str, Preference] = Field({})  # reward -> the words that it compares an image under
    start: int = Field(0, ge=0)  # the update from which RL acts; before it, the stage is distillation alone
    ramp: int = Field(0, ge=0)  # updates in which the weight rises linearly from 0; the last of them has it whole

    def weight_share(self, update: int) -> float:
        """The share of the weight that RL has at an update: 0 before `start`, then a rise over `ramp` updates to 1."""
        if update < self.start:
            return 0.0
        return min(1.0, (update - self.start + 1) / self.ramp) if self.ramp else 1.0

    @model_validator(mode="before")
    @classmethod
    def _set_matching(cls, data: object) -> object:
        """So that the setting is part of what names a result, and a run that matched otherwise is not continued."""
        if isinstance(data, dict) and data.get("weight_is") == "matched" and data.get("matching") is None:
            return {**data, "matching": MATCHING}
        return data

    @model_validator(mode="after")
    def _check_matching(self) -> RL:
        if self.weight_is == "fixed" and self.matching is not None:
            raise ValueError("joint.rl.matching is set but joint.rl.weight_is is fixed; drop it, or set matched")
        return self

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


def refuse_log_of_preference(preferences: Mapping[str, Preference], others: str) -> NoReturn:
    """Raises ValueError: differences have no log. others: the maps to use."""
    raise ValueError(
        f"joint.rl.map log needs rewards above 0, and joint.rl.preferences makes a difference of "
        f"{next(iter(preferences))}; use map: {others}"
    )


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
    # in which the decoder computes the images that ReFL's gradient goes through. bfloat16 takes less time and memory on
    # a GPU, and rounds the gradient. The alarm and the scorecard decode in float32
    decoder_precision: Literal["float32", "bfloat16"] = "float32"

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
            refuse_log_of_preference(self.preferences, "linear or hinge")
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


class Policy(RL):
    """The settings that DPO and GRPO share: what they compare. The actions are the renoising steps of the sampler.

    They learn from states of their own. What distribution matching and the fake score see does not depend on them.
    Branches: from each of `states` states of the rollout, `branches` renoisings, each sampled to the end and scored;
    all later noise is shared, so that rewards differ by that one action. `branches: 0` compares whole trajectories,
    the published form: `batch` trajectories, `group_size` of each prompt.
    """

    branches: int = Field(8, ge=0)  # renoisings of one state, which are compared; 0: whole trajectories
    states: Positive = 24  # with branches: how many states of an update branch, equally many at each renoising step
    batch: Positive = 32  # with branches 0: trajectories that RL rolls out in an update, in whole groups
    group_size: int = Field(8, ge=2)  # with branches 0: images of one prompt, which are compared
    # a control without a signal, never to be deployed: in each group, a random permutation deals the rewards to what is
    # compared. Each group keeps its mean and its deviation, so the gradient has the size that it has with a signal
    shuffled: bool = False

    @model_validator(mode="after")
    def _check_form(self) -> Policy:
        if self.branches == 1:
            raise ValueError("joint.rl.branches is 1, and one has nothing to compare with; set 2 or more, or 0")
        if self.branches and (unused := sorted({"batch", "group_size"} & self.model_fields_set)):
            raise ValueError(
                f"joint.rl.{unused[0]} is for whole trajectories and joint.rl.branches is {self.branches}; drop it, or "
                "set branches: 0"
            )
        if not self.branches and "states" in self.model_fields_set:
            raise ValueError("joint.rl.states is for branches and joint.rl.branches is 0; drop it, or set branches")
        if not self.branches and self.batch % self.group_size:
            raise ValueError(
                f"joint.rl.batch {self.batch} is not a multiple of joint.rl.group_size {self.group_size}; make it "
                f"{-(-self.batch // self.group_size) * self.group_size}"
            )
        return self


def list_idle(rl: Mapping[str, object]) -> list[str]:
    """The settings of a joint.rl that do nothing beside its others: a config that sets one is refused."""
    if rl.get("algorithm") not in ("dpo", "grpo"):
        return []
    of_form = ["batch", "group_size"] if rl.get("branches", True) else ["states"]
    return of_form + (["clip_range"] if rl.get("inner_updates", 1) == 1 else [])


class DPO(Policy):
    """Direct preference optimization on the best and the worst of what is compared."""

    algorithm: Literal["dpo"]
    # how close the student stays to the cold start; it multiplies log-likelihoods, which are means over the elements
    beta: Rate = 100.0

    def needs_reference(self) -> bool:
        return True


class GRPO(Policy):
    """Group relative policy optimization: each action against the mean of those that it is compared with."""

    algorithm: Literal["grpo"]
    inner_updates: Positive = 1  # student updates that share one batch of RL; clipping acts from the second on
    # largest change of the likelihood ratio, for inner_updates 2 or more; log-likelihoods are means over the elements
    clip_range: Rate = 1e-3
    kl: float = Field(0.0, ge=0)  # weight of the KL regulariser, for RL without distribution matching
    # with branches: the last step, which has no action, follows the reward's own gradient, which the reward must have.
    # Most of what such a run learns comes from that gradient, so call its row "hybrid" wherever it is shown
    hybrid: bool = False

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

    @model_validator(mode="after")
    def _check_hybrid(self) -> GRPO:
        if self.hybrid and not self.branches:
            raise ValueError("joint.rl.hybrid needs branches and joint.rl.branches is 0; drop it, or set branches")
        if self.hybrid and self.shuffled:
            raise ValueError(
                "joint.rl.shuffled is a control without a signal and joint.rl.hybrid follows the reward's gradient; "
                "drop one"
            )
        return self


class Surrogate(RL):
    """ReFL through a network that learns the rewards: a small one on the student's latents, fitted while training goes
    on. It gives rewards without a gradient one. Its weight is the configured one times its fit on samples that it has
    not seen, the share of the rewards' variance that it explains: at first none, and none again if it fools itself.
    """

    algorithm: Literal["surrogate"]
    samples: int = Field(32, ge=4)  # of the student, at any of its steps, that are scored and learned from in an update
    steps: Positive = 12  # of its optimizer in an update, each on at most 32 of the samples
    learning_rate: Rate = 5e-4  # of its AdamW
    width: int = Field(64, ge=8, multiple_of=8)  # channels of its layers
    memory: Positive = 8  # updates over which its fit is taken

    @property
    def images(self) -> int:
        """How many are scored in an update."""
        return self.samples

    def needs_reference(self) -> bool:
        return False


class EvolutionStrategies(RL):
    """ReFL for rewards without a gradient, which is estimated at the student's samples: from each of `states` samples
    x0, at any step, `pairs` of images, x0 plus and minus a noise. What the reward prefers, the student follows.
    """

    algorithm: Literal["es"]
    states: Positive = 32  # of the student, at any of its steps, in an update
    pairs: Positive = 8  # of images of each state; two are decoded and scored for each
    deviation: Rate = 0.1  # of the noise; a latent has a deviation of about 1
    # cells of a side of the latent in which the noise is the same: an estimate by K pairs in D numbers has a cosine of
    # at most the root of K / D with the gradient, and 8 cells a side make D a thousand in any latent of 16 channels
    grid: Positive = 8
    map: Literal["linear", "log"] = "linear"  # as for refl
    # a control without a signal, never to be deployed: a coin decides whose reward is whose in each pair. The gradient
    # has the size that it has with a signal
    shuffled: bool = False

    @model_validator(mode="after")
    def _check_map(self) -> EvolutionStrategies:
        if self.map == "log" and self.normalise:
            raise ValueError(
                "joint.rl.map log needs rewards above 0, and joint.rl.normalise makes their mean 0; use map: linear"
            )
        if self.map == "log" and self.preferences:
            refuse_log_of_preference(self.preferences, "linear")
        return self

    @property
    def images(self) -> int:
        """How many are scored in an update."""
        return 2 * self.states * self.pairs

    def find_cell(self, height: int) -> int:
        """How many places of a latent of this height a side of a cell has."""
        return -(-height // self.grid)

    def needs_reference(self) -> bool:
        return False


class Weighting(RL):
    """Distribution matching weighted by rewards, and no loss of RL's own: the gradient of each sample is multiplied by
    exp(weight A), over its mean in the batch. A: the standard score of its image's reward, in the batch.

    To first order that is 1 + weight A. It is never below 0, so that no sample is pushed away from the teacher.
    """

    algorithm: Literal["weighting"]
    part: Literal["all", "guidance"] = "all"  # what is multiplied: all of the gradient, or the CFG in it
    # a control without a signal, never to be deployed: a random permutation deals the rewards to the samples. The
    # weights have the size that they have with a signal
    shuffled: bool = False

    @model_validator(mode="after")
    def _check_weight(self) -> Weighting:
        if self.weight_is == "matched":
            raise ValueError(
                "joint.rl.weight_is is matched but joint.rl.algorithm weighting has no gradient of its own to match; "
                "set weight_is: fixed"
            )
        return self

    def needs_reference(self) -> bool:
        return False


AnyRL = ReFL | DPO | GRPO | Surrogate | EvolutionStrategies | Weighting
