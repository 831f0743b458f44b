"""What DPO and GRPO compare: renoising steps of the sampler, drawn at states of the student, and their rewards.

1. Whole trajectories (`branches: 0`, the published form): a rollout of RL's own, several images of each prompt. All
   actions of an image share its reward.
2. Branches: from one state of distribution matching's rollout several renoisings, each sampled to the end by the
   student and scored. Their rewards differ by that one action, because all later noise is the same: TempFlow-GRPO and
   RTDMD share it likewise. Ours measured the cosine of the two forms with the gradient of the reward itself at the
   lab's 4-step student: .00, .01, .01 at its three actions for whole trajectories, .01, .04, .08 for 8 branches.
3. Each renoising step has its share of the branching states, so that the likelihood alone weighs the steps. Its weights
   (signal / spread, 1 : 3 : 9 in the lab) are close to what the measured cosines would choose.

S states, G actions of each. A branch at step k of N costs N - 1 - k forwards: `config.batches` counts them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dmdr import distributed
from dmdr.backbones.protocol import Conditioning
from dmdr.config.batches import spread_states
from dmdr.path import Path, per_sample
from dmdr.rl.mixture import Mixture
from dmdr.rl.objective import Figures, summarize_scores
from dmdr.rollout import Renoising, Window, simulate_backward
from dmdr.shared_base import SharedBase
from dmdr.update import Batch, select_states


@dataclass(frozen=True)
class Actions:
    """The renoising steps that were drawn at S states: x_next (S, G, C, H, W), to the times t_next (S,).

    eta: the share of fresh noise in them.
    """

    x_next: torch.Tensor
    t_next: torch.Tensor
    path: Path
    eta: float

    def find_step(self, batch: Batch) -> Renoising:
        """The renoising step of each state of a batch, whose `rows` are among the S."""
        return Renoising(self.path, batch.t, self.t_next[batch.rows], self.eta)

    def log_prob(self, batch: Batch, x0: torch.Tensor) -> torch.Tensor:
        """log N(x_next; mean, deviation^2) under predictions x0 (B, C, H, W), averaged over C, H, W: (B, G)."""
        step = self.find_step(batch)
        deviation = step.deviation()[:, None]
        mean = step.mean(batch.x_t, x0)[:, None]
        z = (self.x_next[batch.rows] - mean) / per_sample(deviation.flatten(), x0)[:, None]
        return (-0.5 * z * z).flatten(2).mean(2) - deviation.log() - 0.5 * math.log(2 * math.pi)


def gather_groups(reward: Mixture, window: Window, group: int) -> tuple[torch.Tensor, Figures]:
    """Score all images of a rollout: rewards (P, G) by group, and their figures. Each group is scored by one rank."""
    groups = distributed.split_evenly(len(window.records) // group)
    mine = slice(groups.start * group, groups.stop * group)
    scores = reward.score_samples(window.states.x0[-1, mine], window.records[mine], group, update=window.update)
    gathered = {name: distributed.all_gather(each) for name, each in scores.items()}
    return reward.mix(gathered).view(-1, group), summarize_scores(gathered) | reward.list_moments(gathered)


def follow_trajectories(window: Window, path: Path, pairs: torch.Tensor) -> Actions:
    """The one action (G = 1) that followed each state of `pairs`, flat indices into (N - 1 steps x M trajectories)."""
    count = window.states.x0.shape[1]
    step, trajectory = pairs // count, pairs % count
    return Actions(window.states.x_t[step + 1, trajectory][:, None], window.times[step + 1], path, window.eta)


def choose_states(window: Window, states: int, *, last_step: bool = False) -> torch.Tensor:
    """Flat indices (S,) of the states of a rollout that branch, those of the first step first.

    Every renoising step has equally many. What is left over goes to steps that a permutation of the update chooses, so
    that each step has its share in the long run. Trajectories repeat only if the rollout has too few.
    last_step: whether the last step, which does not branch, has its share as well.
    """
    steps, count = window.states.x0.shape[:2]
    kinds = steps if last_step else steps - 1
    fewest, more = spread_states(states, kinds)
    lucky = set(torch.randperm(kinds, generator=window.generator("branching steps"))[:more].tolist())
    step = torch.tensor([step for step in range(kinds) for _ in range(fewest + (step in lucky))])
    order = torch.randperm(count, generator=window.generator("branching trajectories"))
    return step * count + order[torch.arange(states) % count]


def branch(
    base: SharedBase, window: Window, pairs: torch.Tensor, branches: int, reward: Mixture
) -> tuple[Actions, torch.Tensor, Figures]:
    """Renoise each state of `pairs` `branches` times, sample each to the end, and score it.

    pairs: of `choose_states`, whose order by step lets each step be sampled at once. Returns the actions, their rewards
    (S, G), and the rewards' figures. States of the last step have no action, and their rewards are 0.
    """
    states, path = window.states, base.backbone.path
    steps, count = states.x0.shape[:2]
    step, trajectory = pairs // count, pairs % count
    shape = tuple(base.backbone.latent_shape)
    fresh = window.noise("branches", (len(pairs), branches, *shape))
    later = window.noise("after branches", (steps, len(pairs), *shape))  # the same for all branches of a state
    t_next = window.times[(step + 1).clamp(max=steps - 1)]  # the last step has none; any will do
    move = Renoising(path, window.times[step], t_next, window.eta)
    mean = move.mean(states.x_t[step, trajectory], states.x0[step, trajectory])
    x_next = mean[:, None] + per_sample(move.deviation(), mean)[:, None] * fresh
    scores: dict[str, list[torch.Tensor]] = {name: [] for name in reward.rewards}
    for now in range(steps - 1):
        rows = (step == now).nonzero().flatten()
        if not len(rows):
            continue
        start = int(rows[0])
        found: dict[str, list[torch.Tensor]] = {name: [] for name in reward.rewards}
        for part in distributed.split_batches(distributed.split_evenly(len(rows)), len(rows), window.fit(branches)):
            here = slice(start + part.start, start + part.stop)
            c = {key: value[trajectory[here]].repeat_interleave(branches, 0) for key, value in window.c.items()}
            noises = torch.stack([x_next[here].flatten(0, 1), *later[now + 2 :, here].repeat_interleave(branches, 1)])
            x0 = _finish(base, c, window.times[now + 1 :], noises, window.eta)
            records = [window.records[index] for index in trajectory[here].tolist() for _ in range(branches)]
            for name, each in reward.score_samples(x0, records, branches, update=window.update).items():
                found[name].append(each)
        for name, parts in found.items():
            scores[name].append(distributed.all_gather(torch.cat(parts)))
    branching = {name: torch.cat(parts) for name, parts in scores.items()}
    rewards = reward.mix(branching).view(-1, branches)
    ends = rewards.new_zeros(len(pairs) - len(rewards), branches)
    actions = Actions(x_next, t_next, path, window.eta)
    return actions, torch.cat([rewards, ends]), summarize_scores(branching) | reward.list_moments(branching)


def _finish(base: SharedBase, c: Conditioning, times: torch.Tensor, noises: torch.Tensor, eta: float) -> torch.Tensor:
    """The student's x0 after the rest of its steps, from noises[0] on."""

    def student(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return base.student(x_t, t, c)

    return simulate_backward(student, base.backbone, times=times, noises=noises, eta=eta).x0[-1]


def split_updates(window: Window, pairs: torch.Tensor, inner_updates: int, *, block: int = 1) -> list[list[Batch]]:
    """The states of `pairs` as the batches of each inner update, in parts; blocks of neighbours stay together."""
    batches, first = [], 0
    for chunk in pairs.view(-1, block).tensor_split(inner_updates):
        most = window.micro_batch
        batches.append(select_states(window.states, window.c, chunk.flatten(), block=block, most=most, first=first))
        first += chunk.numel()
    return batches
