"""Evolution strategies (Salimans et al. 2017): ReFL for a reward without a gradient, which is estimated beside each x0.

1. At the x0 of a state, noise is added and subtracted, both images are scored, and the difference weighs the noise:
   (R(x0 + d e) - R(x0 - d e)) e / (2 d), averaged over the pairs, has the gradient of the mean reward of N(x0, d^2) as
   its mean. The student then follows it as it would follow ReFL's, at any of its steps.
2. An image costs the decoder and the rewards, and no step of the sampler: the x0 are those of the rollout. GRPO's
   branches pay the rest of the sampler for each image, and learn of one action; here the image itself is changed.
3. An estimate by K pairs in D numbers has a cosine of at most the square root of K / D with the gradient. So noise is
   drawn on a coarse grid, one number for a cell, and the estimate is that of the gradient's mean over each cell; cells
   at the border may be smaller. The lab's latents have 8 x 8 places, so a grid of 8 is every place.
4. A pair cancels all that both images share: no mean of a group is taken, and no deviation divides a group.
5. `shuffled` tosses a coin for each pair: whose reward is whose. The estimate keeps its size, and its mean is 0.

S states of all ranks, s of this one, K pairs of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from dmdr import distributed, losses
from dmdr.config.deal import Deal, share_evenly
from dmdr.config.rl import EvolutionStrategies as EvolutionStrategiesConfig
from dmdr.config.shares import deal_to_rl
from dmdr.optimizers import Trainable
from dmdr.rewards.sources import RewardSources
from dmdr.rl.actions import shuffle_if, split_updates
from dmdr.rl.mixture import Mixture
from dmdr.rl.objective import Figures, Objective, summarize_scores
from dmdr.rollout import Window
from dmdr.shared_base import SharedBase
from dmdr.transfer import send_to
from dmdr.update import Batch

NAME = "evolution strategies"  # of its draws


class EvolutionStrategies:
    """The RL loss of RL's states: minus the mean reward, to first order in x0.

    weights: where the rewards of the config lie. seed: of the words that a preference draws.

    Raises:
        ConfigError: a reward is unknown or broken, or has no log although the config takes it.
        InputMissing, DataError: the weights of a reward are missing, or damaged.
    """

    trained: Mapping[str, Trainable] = MappingProxyType({})

    def __init__(
        self,
        config: EvolutionStrategiesConfig,
        base: SharedBase,
        weights: RewardSources | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.config, self.base = config, base
        positive = config.map == "log"
        self.reward = Mixture(
            config, base.backbone, differentiable=False, positive=positive, weights=weights, seed=seed
        )

    def build_objective(self, window: Window) -> Objective:
        steps = len(window.states.times)
        deal = deal_to_rl(self.config, steps, window.trajectories)
        assert deal is not None, "it has states of its own"
        own = share_evenly(deal.states, distributed.ranks(), distributed.rank())
        pairs = window.find_pairs(deal, own, NAME, steps=steps)
        gradients, figures = self.estimate(window, deal, own, pairs)

        def loss(x0: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Figures]:
            return -(x0 * gradients[batch.rows]).sum() / batch.of, {}

        return Objective(loss, split_updates(window, pairs, deal), figures)

    @torch.no_grad()
    def estimate(self, window: Window, deal: Deal, own: range, pairs: torch.Tensor) -> tuple[torch.Tensor, Figures]:
        """The gradient of the reward at this rank's states (s, C, H, W), and the figures of all ranks.

        own: the numbers of this rank's states. pairs: their flat indices into the rollout.
        """
        config, device, each = self.config, window.states.x0.device, 2 * self.config.pairs
        x0 = window.states.x0.flatten(0, 1)[send_to(pairs, device)]
        noise, area = self.draw_noise(window, own)
        change = config.deviation * noise
        beside = torch.stack([x0[:, None] + change, x0[:, None] - change], dim=2).flatten(0, 2)
        count = window.states.x0.shape[1]
        records = [window.records[place] for place in (pairs % count).tolist() for _ in range(each)]
        at_once = min(each, window.micro_batch or each)
        found = self.reward.score_samples(beside, records, at_once, update=window.update)
        gathered = {
            name: distributed.all_gather_shares(scores.view(-1, each), deal.states).flatten()
            for name, scores in found.items()
        }
        rewards = shuffle_if(config.shuffled, self.reward.mix(gathered).view(-1, 2), window)
        gains_SK = losses.gain_of_pairs(rewards, log=config.map == "log").view(deal.states, config.pairs)
        gradients = losses.estimate_gradient(noise, gains_SK[own.start : own.stop], config.deviation) / area
        differing = (gains_SK != 0).any(1).float().mean()
        figures = {**summarize_scores(gathered), **self.reward.list_moments(gathered), "differing": differing}
        return gradients, figures

    def draw_noise(self, window: Window, own: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Standard normal noise (s, K, C, H, W), one number a cell, and how many places the cell of each has (H, W)."""
        channels, height, width = self.base.backbone.latent_shape
        cell = self.config.find_cell(height)
        places = [torch.arange(side) // cell for side in (height, width)]
        counts = [each.bincount() for each in places]
        drawn = window.draw(NAME, own, (self.config.pairs, channels, *map(len, counts)))
        rows, columns = (send_to(each, drawn.device) for each in places)
        area = counts[0][places[0]][:, None] * counts[1][places[1]]
        return drawn[..., rows, :][..., columns], send_to(area, drawn.device)
