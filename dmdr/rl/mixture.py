"""The weighted sum of the rewards that a run trains on. They are checked before the first step.

1. With `joint.rl.normalise`, each reward is centred and divided by its deviation, over the samples of the last WINDOW
   updates and of this one. Both follow from the metrics rows, so a resumed run needs no memory of its own.
2. A service that is away is away for all ranks: all of them stop at the same place, and can write a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from dmdr import distributed
from dmdr.backbones.protocol import Backbone
from dmdr.config.prompt_record import PromptRecord
from dmdr.config.reward_weights import VERIFIERS
from dmdr.config.rl import RL
from dmdr.errors import ConfigError, NonFinite, RewardUnavailable, doing
from dmdr.metrics.verifier import load_any_reward
from dmdr.rewards.protocol import Reward
from dmdr.rewards.service import ServiceReward
from dmdr.rewards.sources import RewardSources
from dmdr.rewards.wording import Wording

PROBES = [PromptRecord(prompt=text) for text in ("a red circle", "two blue squares", "")]  # of plain images
WINDOW = 100  # updates
MEAN, STD = "reward/", "reward_std/"  # figures of a metrics row, followed by the name of a reward
LEAST_STD = 1e-6  # a reward that gives every image the same score stays at 0


class Mixture:
    """The sum of share times reward, each with its scale and its words.

    differentiable: require a gradient of every reward. positive: require rewards and shares above 0, for their log.
    weights: where the rewards of the config lie. seed: of the words that a preference draws.

    Raises:
        ConfigError: a reward is unknown, does not meet these requirements, or does not give each plain image one finite
            number.
        InputMissing, DataError: the weights of a reward are missing, or damaged; a user's code raises.
        RewardUnavailable: a service does not answer.
    """

    def __init__(
        self,
        config: RL,
        backbone: Backbone,
        *,
        differentiable: bool,
        positive: bool = False,
        weights: RewardSources | None = None,
        seed: int = 0,
    ) -> None:
        self.shares, self.scales, self.backbone = config.rewards, config.scales, backbone
        shares, device = self.shares, backbone.network.device
        self.wordings = {
            name: Wording(name, seed, config.prefixes.get(name, ""), config.preferences.get(name)) for name in shares
        }
        self.rewards = {name: load_any_reward(name, str(device), weights) for name in shares}
        self.normalises, self.seen = config.normalise, list[Mapping[str, float]]()
        self.positive = positive
        own = set() if weights is None else set(weights.own)
        self.asking = (own | VERIFIERS.keys()).intersection(shares)  # rewards that may ask for a prompt's metadata
        if differentiable:
            refuse_without_gradient(self.rewards)
        if device.type == "meta":  # no numbers to check
            return
        self._probe([name for name in shares if name not in self.asking], PROBES)

    def probe(self, records: Sequence[PromptRecord]) -> None:
        """Score plain images under a few training prompts by the rewards that may ask for a prompt's metadata: the
        user's own, services and verifiers.

        Raises:
            ConfigError, DataError, NonFinite: one of them does not give each image one finite number.
            RewardUnavailable: a service does not answer.
        """
        self._probe(sorted(self.asking), records)

    @torch.no_grad()
    def _probe(self, names: list[str], records: Sequence[PromptRecord]) -> None:
        if not names:
            return
        zeros = torch.zeros(len(records), *self.backbone.latent_shape, device=self.backbone.network.device)
        images = self.backbone.decode(zeros)
        for name in names:
            with doing(f"scoring plain images with {name}"):
                scores = self.wordings[name].score(self.rewards[name], images, records, 0)
            check_scores(name, scores, len(records), share=self.shares[name], positive=self.positive)

    def __call__(
        self, images: torch.Tensor, records: Sequence[PromptRecord], *, update: int
    ) -> dict[str, torch.Tensor]:
        """images (B, 3, H, W) in [0, 1] -> the scores (B,) of each reward, with its words of this update.

        records: of their B prompts.
        """
        return {
            name: self.wordings[name].score(reward, images, records, update) for name, reward in self.rewards.items()
        }

    def remember(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Take the metrics rows of all updates so far, by whose rewards the next scores are normalised."""
        self.seen = [row for row in rows[-WINDOW:] if any(f"{STD}{name}" in row for name in self.rewards)]

    def normalise(self, scores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """(score - mean) / deviation of each reward, over the last updates and these scores; unchanged unless the
        config asks for it. Each update counts the same."""
        if not self.normalises:
            return scores
        moments = {name: self.measure(name, each) for name, each in scores.items()}
        return {name: ((each - moments[name][0]) / moments[name][1]).to(each.dtype) for name, each in scores.items()}

    def list_moments(self, scores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Figures of a metrics row: the mean and the deviation that each reward was normalised by; none without."""
        if not self.normalises:
            return {}
        moments = {name: self.measure(name, each) for name, each in scores.items()}
        means = {f"normal_mean/{name}": mean for name, (mean, _) in moments.items()}
        return means | {f"normal_std/{name}": std for name, (_, std) in moments.items()}

    @torch.no_grad()
    def measure(self, name: str, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of a reward's scores over the last updates and these (M,), in float64."""
        past = [(row[f"{MEAN}{name}"], row[f"{STD}{name}"]) for row in self.seen if f"{STD}{name}" in row]
        now, now_std = scores.double().mean(), scores.double().std(correction=0)
        mean = (math.fsum(each for each, _ in past) + now) / (len(past) + 1)
        square = (math.fsum(each**2 + std**2 for each, std in past) + now**2 + now_std**2) / (len(past) + 1)
        return mean, (square - mean**2).clamp(min=0).sqrt().clamp(min=LEAST_STD)

    def scale(self, scores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The scores of all rewards, each times its scale."""
        return {name: self.scales[name] * each if name in self.scales else each for name, each in scores.items()}

    def mix(self, scores: dict[str, torch.Tensor]) -> torch.Tensor:
        """The scores (M,) of all rewards -> their sum (M,), each normalised if the config says so, times its share.

        Without normalisation each is multiplied by its scale, which would cancel out.
        """
        ready = self.normalise(scores) if self.normalises else self.scale(scores)
        first, *others = [self.shares[name] * each for name, each in ready.items()]
        return sum(others, start=first)

    @torch.no_grad()
    def score_samples(
        self, x0: torch.Tensor, records: Sequence[PromptRecord], at_once: int, *, update: int = 0
    ) -> dict[str, torch.Tensor]:
        """x0 (M, C, H, W) -> the scores (M,) of each reward; `at_once` images are decoded and scored at a time.

        Raises:
            RewardUnavailable: a service is away, for this rank or for another.
        """
        away: RewardUnavailable | None = None
        parts: list[dict[str, torch.Tensor]] = []
        try:
            for start in range(0, len(x0), at_once):
                part = slice(start, start + at_once)
                parts.append(self(self.backbone.decode(x0[part]), records[part], update=update))
        except RewardUnavailable as error:
            away = error
        asks = any(isinstance(reward, ServiceReward) for reward in self.rewards.values())
        if asks and distributed.any_rank(away is not None):
            raise away or RewardUnavailable("a reward does not answer another rank; repeat the command")
        scores = {name: torch.cat([part[name] for part in parts]) for name in self.rewards}
        for name, each in scores.items():
            has_numbers = each.device.type != "meta"  # a plan has none
            if name in self.asking and has_numbers and not each.isfinite().all():
                raise NonFinite(f"the reward {name} gives an image a score that is not a number; mend it")
        return scores


def refuse_without_gradient(rewards: Mapping[str, Reward]) -> None:
    """
    Raises:
        ConfigError: one of the rewards has no gradient, which ReFL follows.
    """
    without_gradient = [name for name, reward in rewards.items() if not reward.differentiable]
    if without_gradient:
        raise ConfigError(
            f"rl.rewards: ReFL needs a gradient, but {', '.join(without_gradient)} has none; use another "
            "reward, or algorithm: es, grpo or dpo"
        )


def check_scores(name: str, scores: torch.Tensor, count: int, *, share: float, positive: bool) -> None:
    """Refuse a reward whose scores of `count` plain images are unusable.

    Raises:
        ConfigError: the scores are not one finite number each or, where `positive`, do not have a log.
    """
    if scores.shape != (count,):
        raise ConfigError(
            f"rl.rewards: {name} gives {tuple(scores.shape)} for {count} images, not one number each; use "
            "another reward"
        )
    if not scores.isfinite().all():
        raise ConfigError(f"rl.rewards: {name} gives {scores.tolist()} for plain images; use another reward")
    if positive and (share <= 0 or not (scores > 0).all()):
        raise ConfigError(
            f"rl.map: log needs rewards and shares above 0, and {name}, share {share:g}, gives "
            f"{scores.tolist()} for plain images; use map: linear"
        )
