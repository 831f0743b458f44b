"""What DPO and GRPO compare: renoising steps of the sampler, drawn at states of the student, and their rewards.

1. Whole trajectories (`branches: 0`, the published form): a rollout of RL's own, several images of each prompt. All
   actions of an image share its reward.
2. Branches: from one state of distribution matching's rollout several renoisings, each sampled to the end by the
   student and scored. Their rewards differ by that one action, because all later noise is the same: TempFlow-GRPO and
   RTDMD share it likewise. Ours measured the cosine of the two forms with the gradient of the reward itself at the
   lab's 4-step student: .00, .01, .01 at its three actions for whole trajectories, .01, .04, .08 for 8 branches.
3. Each renoising step has its share of the branching states, so that the likelihood alone weighs the steps. Its weights
   (signal / spread, 1 : 3 : 9 in the lab) are close to what the measured cosines would choose.
4. `shuffled` deals the rewards of a group to its members by a random permutation, within the group and not among
   groups: each state keeps the size of its gradient, and nothing but the signal is gone. Ours; a control.
5. A rank has the actions of states that it rolled out itself. Of the others it hears the rewards alone.

S states of all ranks, s of this one, G actions of each. A branch at step k of N costs N - 1 - k forwards:
`config.batches` counts them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dmdr import distributed
from dmdr.backbones.protocol import Conditioning
from dmdr.config.deal import Deal, cut, share_evenly
from dmdr.path import Path, per_sample
from dmdr.rl.mixture import Mixture
from dmdr.rl.objective import Figures, summarize_scores
from dmdr.rollout import Renoising, Window, simulate_backward
from dmdr.shared_base import SharedBase
from dmdr.transfer import send_to
from dmdr.update import Batch, select_states


@dataclass(frozen=True)
class Actions:
    """The renoising steps that were drawn at this rank's states: x_next (s, G, C, H, W), to the times t_next (s,).

    eta: the share of fresh noise in them.
    """

    x_next: torch.Tensor
    t_next: torch.Tensor
    path: Path
    eta: float

    def find_step(self, batch: Batch) -> Renoising:
        """The renoising step of each state of a batch, whose `rows` are among the s."""
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
    count = window.trajectories // group
    groups = distributed.split_evenly(count)
    first = window.locate([groups.start * group])[0]  # a rank may have neighbours of its groups as well
    mine = slice(first, first + (groups.stop - groups.start) * group)
    found = reward.score_samples(window.states.x0[-1, mine], window.records[mine], group, update=window.update)
    scores = {
        name: distributed.all_gather_shares(each.view(-1, group), count).flatten() for name, each in found.items()
    }
    return reward.mix(scores).view(-1, group), summarize_scores(scores) | reward.list_moments(scores)


def shuffle_if(shuffled: bool, rewards_SG: torch.Tensor, window: Window) -> torch.Tensor:
    """Rewards (S, G) of all ranks; where `shuffled`, those of each group in an order that seed and update draw."""
    if not shuffled:
        return rewards_SG
    uniform = torch.rand(rewards_SG.shape, generator=window.generator("shuffled rewards"), dtype=torch.float64)
    return rewards_SG.gather(1, send_to(uniform.argsort(1), rewards_SG.device))


def list_own(deal: Deal) -> list[int]:
    """The numbers of this rank's states of a deal, those of the first batch first."""
    mine = share_evenly(deal.states, distributed.ranks(), distributed.rank())
    return [number for batch in range(deal.batches) for number in deal.list_states(deal.list_rows(mine, batch), batch)]


def follow_trajectories(window: Window, path: Path, pairs: torch.Tensor) -> Actions:
    """The one action (G = 1) that followed each state of `pairs`, flat indices into (N - 1 steps x M trajectories)."""
    count = window.states.x0.shape[1]
    step, trajectory = send_to(torch.stack([pairs // count, pairs % count]), window.states.x0.device)
    return Actions(window.states.x_t[step + 1, trajectory][:, None], window.times[step + 1], path, window.eta)


def list_steps(window: Window, deal: Deal, *, last_step: bool = False) -> list[int]:
    """The steps of all states (S,) that branch. Neighbours have different ones.

    Every renoising step has equally many. What is left over goes to steps that a permutation of the update chooses, so
    that each step has its share in the long run.
    last_step: whether the last step, which does not branch, has its share as well.
    """
    kinds = len(window.states.times) - (not last_step)
    order = torch.randperm(kinds, generator=window.generator("branching steps")).tolist()
    shift = math.lcm(kinds, deal.batches) if math.gcd(kinds, deal.batches) > 1 else deal.states  # else each batch
    return [order[(number + number // shift) % kinds] for number in range(deal.states)]  # would always have few steps


def choose_states(window: Window, deal: Deal, steps: list[int]) -> torch.Tensor:
    """Flat indices (s,) of this rank's states that branch, as `list_own` has them.

    Each trajectory gives its share; trajectories repeat only if the rollout has too few.
    """
    own = list_own(deal)
    places = window.locate([deal.find_trajectory(number) for number in own])
    return window.flatten([steps[number] for number in own], places)


def branch(
    base: SharedBase, window: Window, deal: Deal, steps: list[int], branches: int, reward: Mixture
) -> tuple[Actions, torch.Tensor, Figures]:
    """Renoise each state of a deal `branches` times, sample each to the end, and score it.

    steps: of `list_steps`. Returns this rank's actions, the rewards of all states (S, G), and the rewards' figures.
    States of the last step have no action, and their rewards are 0.
    """
    states, own, pairs = window.states, list_own(deal), choose_states(window, deal, steps)
    last, count, device = len(states.times) - 1, states.x0.shape[1], states.x0.device
    shape = tuple(base.backbone.latent_shape)
    step, trajectory = send_to(torch.stack([pairs // count, pairs % count]), device)
    fresh = window.draw("branches", own, (branches, *shape))
    later = window.draw("after branches", own, (last + 1, *shape))  # the same for all branches of a state
    t_next = window.times[(step + 1).clamp(max=last)]  # the last step has none; any will do
    move = Renoising(base.backbone.path, window.times[step], t_next, window.eta)
    mean = move.mean(states.x_t[step, trajectory], states.x0[step, trajectory])
    x_next = mean[:, None] + per_sample(move.deviation(), mean)[:, None] * fresh
    scored, scores = list[int](), {name: list[torch.Tensor]() for name in reward.rewards}
    for now in range(last):
        for part in split_step(steps, own, now, window.fit(branches)):
            rows = part or [0]  # a rank without a state runs one for the others, which may need its weights
            here, places = send_to(torch.tensor(rows), device), (pairs[rows] % count).tolist()
            c = {key: value[_beside(value, here, trajectory, places)] for key, value in window.c.items()}
            c = {key: value.repeat_interleave(branches, 0) for key, value in c.items()}
            after = later[here, now + 2 :].transpose(0, 1).repeat_interleave(branches, 1)
            noises = torch.stack([x_next[here].flatten(0, 1), *after])
            x0 = _finish(base, c, window.times[now + 1 :], noises, window.eta)
            records = [window.records[place] for place in places for _ in range(branches)]
            found = reward.score_samples(x0, records, branches, update=window.update)
            scored += [own[row] for row in part]
            for name, each in found.items():
                scores[name].append(each.view(-1, branches)[: len(part)])
    gathered = {name: _gather_scores(deal, scored, torch.cat(parts)) for name, parts in scores.items()}
    acting = send_to(torch.tensor([number for number, each in enumerate(steps) if each < last]), device)
    branching = {name: each[acting].flatten() for name, each in gathered.items()}
    mixed = reward.mix(branching).view(-1, branches)
    rewards = mixed.new_zeros(deal.states, branches).index_copy(0, acting, mixed)
    actions = Actions(x_next, t_next, base.backbone.path, window.eta)
    return actions, rewards, summarize_scores(branching) | reward.list_moments(branching)


def split_step(steps: list[int], own: list[int], now: int, most: int | None) -> list[list[int]]:
    """Where this rank's states of the step `now` stand among `own`, in parts of at most `most`: as many on every rank.

    steps: of all states.
    """
    ranks = distributed.ranks()
    counts = [sum(steps[number] == now for number in share_evenly(len(steps), ranks, each)) for each in range(ranks)]
    parts = min(1, max(counts)) if most is None else -(-max(counts) // most)
    rows = [row for row, number in enumerate(own) if steps[number] == now]
    return [rows[part] for part in cut(slice(0, len(rows)), parts)]


def _beside(
    value: torch.Tensor, here: torch.Tensor, trajectory: torch.Tensor, places: list[int]
) -> torch.Tensor | list[int]:
    """The index of rows of a conditioning: on its own device, because a copy from the other would be waited for."""
    return trajectory[here] if value.device == here.device else places


def _gather_scores(deal: Deal, scored: list[int], scores: torch.Tensor) -> torch.Tensor:
    """The scores (S, G) of all states, from this rank's of the states `scored`; 0 where nothing was scored."""
    mine = share_evenly(deal.states, distributed.ranks(), distributed.rank())
    places = send_to(torch.tensor([number - mine.start for number in scored], dtype=torch.int64), scores.device)
    own = scores.new_zeros(len(mine), scores.shape[1]).index_copy(0, places, scores)
    return distributed.all_gather_shares(own, deal.states)


def _finish(base: SharedBase, c: Conditioning, times: torch.Tensor, noises: torch.Tensor, eta: float) -> torch.Tensor:
    """The student's x0 after the rest of its steps, from noises[0] on."""

    def student(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return base.student(x_t, t, c)

    return simulate_backward(student, base.backbone, times=times, noises=noises, eta=eta).x0[-1]


def split_updates(window: Window, pairs: torch.Tensor, deal: Deal, *, block: int = 1) -> list[list[Batch]]:
    """This rank's states as the batches of each inner update, in parts; blocks of neighbours stay together.

    pairs: their flat indices, in the order of `list_own`. deal: of the blocks.
    """
    batches, first = [], 0
    mine = share_evenly(deal.states, distributed.ranks(), distributed.rank())
    for batch in range(deal.batches):
        chunk = pairs[first : first + len(deal.list_rows(mine, batch)) * block]
        of, most = deal.count_rows(batch) * block, window.micro_batch
        batches.append(select_states(window.states, window.c, chunk, block=block, most=most, first=first, of=of))
        first += len(chunk)
    return batches
