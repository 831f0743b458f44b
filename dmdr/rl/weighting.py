"""Distribution matching weighted by rewards: what the student draws well, the teacher is followed in more.

1. The image that a trajectory ends in is scored. Its standard score in the batch, A, weighs the state of the trajectory
   that the student's update has: exp(weight A), over its mean. There is no RL loss, and no forward more.
2. A batch has one image of each prompt, so A compares images of different prompts as well.
3. `part: guidance` multiplies only what CFG adds to the real score, which then has a scale for each sample.
4. The lab gave it little hope before it was built: the cosine of distribution matching's own direction with the
   reward's gradient was .04 and .02 at two steps, weighted by exp(A) .02 and .01.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import torch

from dmdr import distributed, losses
from dmdr.config.rl import Weighting as WeightingConfig
from dmdr.optimizers import Trainable
from dmdr.rewards.sources import RewardSources
from dmdr.rl.actions import shuffle_if
from dmdr.rl.mixture import Mixture
from dmdr.rl.objective import Figures, Objective, summarize_scores
from dmdr.rollout import Window
from dmdr.shared_base import SharedBase
from dmdr.transfer import send_to
from dmdr.update import Batch, SampleWeights


class Weighting:
    """Weights of the samples of the student's batch, and no loss.

    weights: where the rewards of the config lie. seed: of the words that a preference draws.

    Raises:
        ConfigError: a reward is unknown or broken.
        InputMissing, DataError: the weights of a reward are missing, or damaged.
    """

    trained: Mapping[str, Trainable] = MappingProxyType({})

    def __init__(
        self, config: WeightingConfig, base: SharedBase, weights: RewardSources | None = None, *, seed: int = 0
    ) -> None:
        self.config = config
        self.reward = Mixture(config, base.backbone, differentiable=False, weights=weights, seed=seed)

    def build_objective(self, window: Window) -> Objective:
        return Objective(None, weigh=partial(self.weigh, window))

    def weigh(self, window: Window, parts: list[Batch], rows: range, strength: float) -> tuple[SampleWeights, Figures]:
        """Score the images of a batch of states. rows: of the batch that this rank has. strength: the weight of RL."""
        trajectories = torch.cat([part.trajectory for part in parts])
        x0 = window.states.x0[-1][send_to(trajectories, window.states.x0.device)]
        records = [window.records[place] for place in trajectories.tolist()]
        found = self.reward.score_samples(x0, records, window.micro_batch or max(1, len(x0)), update=window.update)
        scores = {name: gather_rows(each, rows, parts[0].of) for name, each in found.items()}
        rewards_B = shuffle_if(self.config.shuffled, self.reward.mix(scores)[None], window)[0]
        weights_B = losses.weigh_by_advantage(rewards_B, strength)
        figures = {**summarize_scores(scores), **self.reward.list_moments(scores)}
        figures |= {"rl_weight": torch.tensor(strength), "rl_weight_std": weights_B.std(correction=0)}
        return SampleWeights(weights_B[rows.start : rows.stop], self.config.part), figures


def gather_rows(own: torch.Tensor, rows: range, of: int) -> torch.Tensor:
    """All rows (B,) of a batch, of which this rank has `rows`."""
    whole = own.new_zeros(of)
    whole[rows.start : rows.stop] = own
    return distributed.all_reduce_sum(whole)
