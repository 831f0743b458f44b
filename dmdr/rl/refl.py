"""ReFL: reward feedback learning (Xu et al. 2023, ImageReward), with the DMD term in the place of its pretraining loss.

1. A few-step student predicts x0 at each of its N steps, so the gradient reaches each step directly (DMDR, 4.3). ReFL
   picks a step near the end; here no step is preferred.
2. Several rewards are added with the shares of the config. ReFL's phi then maps the sum, before the loss. The hinge of
   the authors' code for text to image acts on each reward instead, and the losses are added with the shares.
3. ReFL's usual regulariser, for RL without distribution matching, is the pretraining loss. There are no images to
   pretrain on here. Instead it pulls the student to what the student of the cold start predicts at each state; the
   paper calls that student P_fake_ref.
4. With `execution.decode_batch_size`, decoder and rewards run so many images at a time, forward and backward. What they
   keep for a gradient is then that of these images, and is never computed twice.

B states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch

from dmdr import losses
from dmdr.config.prompt_record import PromptRecord
from dmdr.config.rl import ReFL as ReFLConfig
from dmdr.optimizers import Trainable
from dmdr.rewards.sources import RewardSources
from dmdr.rl.decoders import load_decoder
from dmdr.rl.mixture import Mixture
from dmdr.rl.objective import Figures, Objective
from dmdr.rollout import Window
from dmdr.shared_base import SharedBase
from dmdr.update import Batch


class ReFL:
    """The RL loss of a batch: minus the mean mapped reward of the decoded x0, or the hinges of the rewards.

    weights: where the rewards of the config lie. seed: of the words
    that a preference draws.

    Raises:
        ConfigError: a reward is unknown, broken or without a gradient, or has no log although the config takes it.
        DataError, InputMissing: weights of a reward or the tiny decoder are missing or damaged, or it does not fit the
            teacher.
    """

    trained: Mapping[str, Trainable] = MappingProxyType({})

    def __init__(
        self, config: ReFLConfig, base: SharedBase, weights: RewardSources | None = None, *, seed: int = 0
    ) -> None:
        self.base, self.config, self.pretraining = base, config, config.pretraining
        positive = config.map == "log"
        self.reward = Mixture(config, base.backbone, differentiable=True, positive=positive, weights=weights, seed=seed)
        self.decode = load_decoder(config, base.backbone)

    def compute_loss(self, scores_B: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of the scores (B,) of each reward, under the map of the config."""
        if self.config.map == "hinge":
            assert self.config.margin is not None, "the config refuses a hinge without its margin"
            first, *others = [
                self.config.rewards[name] * losses.refl_hinge(each, self.config.margin)
                for name, each in self.reward.scale(scores_B).items()
            ]
            return sum(others, start=first)
        mixed_B = self.reward.mix(scores_B)
        return losses.refl_log(mixed_B) if self.config.map == "log" else losses.refl(mixed_B)

    def judge(self, x0: torch.Tensor, records: Sequence[PromptRecord], *, update: int) -> tuple[torch.Tensor, Figures]:
        """The loss of x0 (B, C, H, W), and the moments of its scores."""
        scores_B = self.reward(self.decode(x0), records, update=update)
        return self.compute_loss(scores_B), compute_moments(scores_B)

    def judge_in_parts(
        self, x0: torch.Tensor, records: Sequence[PromptRecord], most: int, *, update: int
    ) -> tuple[torch.Tensor, Figures]:
        """`judge`, at most `most` images at a time: each part's gradient is taken before the next part is decoded."""
        total, figures, slopes = x0.new_zeros(()), dict[str, torch.Tensor](), []
        for part, of in zip(x0.split(most), split_records(records, most), strict=True):
            leaf, share = part.detach().requires_grad_(True), len(part) / len(x0)
            loss, moments = self.judge(leaf, of, update=update)
            slopes.append(torch.autograd.grad(loss * share, leaf)[0])
            total = total + loss.detach() * share
            figures = {name: figures.get(name, 0) + share * each for name, each in moments.items()}
        towards = ((x0 - x0.detach()) * torch.cat(slopes)).sum()  # 0, with the gradient that was found
        return total + towards, figures

    def build_objective(self, window: Window) -> Objective:
        most = self.base.backbone.decoded_at_once

        def loss(x0: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Figures]:
            records = [window.records[index] for index in batch.trajectory.tolist()]
            if most is None or len(x0) <= most or not torch.is_grad_enabled():
                total, figures = self.judge(x0, records, update=window.update)
            else:
                total, figures = self.judge_in_parts(x0, records, most, update=window.update)
            if self.pretraining:
                regulariser = losses.pretraining(x0, self.base.reference(batch.x_t, batch.t, batch.c))
                total = total + self.pretraining * regulariser
                figures["loss_reference"] = regulariser
            return total * batch.share, {name: each.detach() * batch.share for name, each in figures.items()}

        return Objective(loss)


def split_records(records: Sequence[PromptRecord], most: int) -> Iterator[Sequence[PromptRecord]]:
    """Parts of at most `most`, as torch.split cuts."""
    for start in range(0, len(records), most):
        yield records[start : start + most]


def compute_moments(scores_B: dict[str, torch.Tensor]) -> Figures:
    """The mean and the mean square of each reward's scores, in float64, which add up over the parts of a batch."""
    exact = {name: each.detach().double() for name, each in scores_B.items()}
    squares = {f"reward_square/{name}": each.square().mean() for name, each in exact.items()}
    return {f"reward/{name}": each.mean() for name, each in exact.items()} | squares
