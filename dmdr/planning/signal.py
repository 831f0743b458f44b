"""How much of the reward's gradient an RL algorithm carries, measured at a student before anyone trains it.

1. Each algorithm hands the student a gradient in its x0 at some states. Where the rewards have a gradient, the figure
   is the cosine with ReFL's, the gradient of the reward of that x0, at the same state: 1 for ReFL itself. A random
   direction in D numbers has 0, with a spread of 1 / sqrt(D) for each state.
2. Where a reward has none, the figure is the cosine of two halves of a batch, of different prompts, in the student's
   parameters. It is near 0 if the gradient is mostly noise, and does not tell a shared bias from a signal.
3. The student stays as it is. The updates differ in prompts and noise, so their means give the standard error.
4. A surrogate is fitted on some updates first, and measured on others. At each of these it meets fresh scores, which
   give its held-out fit, then learns from them as in training, and then gives its gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from dmdr.config.rl import DPO, GRPO, AnyRL, EvolutionStrategies, Policy, ReFL, Surrogate, Weighting
from dmdr.draws import Run, roll_out_prompts, select_batches
from dmdr.rewards.sources import RewardSources
from dmdr.rl.algorithms import build_algorithm
from dmdr.rl.objective import Objective, RLTerm
from dmdr.rl.refl import ReFL as FollowReward
from dmdr.rl.surrogate import Surrogate as LearnReward
from dmdr.rollout import Window
from dmdr.shared_base import SharedBase
from dmdr.update import Batch
from dmdr.watch.halves import find_gradient

SHARED = ("rewards", "scales", "prefixes", "preferences")  # settings of joint.rl that all rows have
BRANCHES: dict[str, object] = {"branches": 8, "states": 24}
WHOLE: dict[str, object] = {"branches": 0, "batch": 32, "group_size": 8}


@dataclass(frozen=True)
class Figure:
    """A mean over updates and its standard error; None: no state had a gradient, or only one update had."""

    mean: float | None
    error: float | None


@dataclass(frozen=True)
class Signal:
    """What a row of settings carries. by_step: step of the student -> its cosine. seconds: of one update.

    fit: of a surrogate, the share of the variance of fresh scores that it explains, below 0 if it is worse than their
    mean; None: the row has none.
    """

    label: str
    by_step: Mapping[int, Figure]
    seconds: float
    fit: float | None = None


def list_rows(own: AnyRL, *, differentiable: bool) -> dict[str, AnyRL]:
    """Label -> settings to measure, with the rewards of `own`: the config's own settings first, unless they weigh.

    differentiable: whether all rewards have a gradient, without which there is no ReFL.
    """
    shared = {name: value for name, value in own.model_dump().items() if name in SHARED}
    kinds: list[tuple[str, type[AnyRL], dict[str, object]]] = [
        ("refl", ReFL, {}),
        ("grpo, branches", GRPO, BRANCHES),
        ("grpo, whole images", GRPO, WHOLE),
        ("dpo, branches", DPO, BRANCHES),
        ("dpo, whole images", DPO, WHOLE),
        ("es", EvolutionStrategies, {}),
        ("surrogate", Surrogate, {}),
    ]
    rows: dict[str, AnyRL] = {}
    if not isinstance(own, Weighting):  # which hands the student no gradient of its own
        rows[f"{own.algorithm}, as in the config"] = own
    for label, kind, settings in kinds:
        if kind is not ReFL or differentiable:
            named = {"algorithm": label.partition(",")[0], "weight": 1.0, **shared, **settings}
            rows[label] = kind.model_validate(named)
    return rows


def measure_signal(
    run: Run,
    label: str,
    config: AnyRL,
    sources: RewardSources,
    updates: int,
    *,
    fit: int,
    tick: Callable[[int, int], object],
) -> Signal:
    """The cosines of one row over some updates, which the student does not follow.

    run: of the joint stage; its RL is replaced. sources: of its rewards. fit: updates that a surrogate learns from
    first. tick: told the updates that are done, and how many there are.

    Raises:
        any of USER_ERRORS: as for training.
    """
    base, began = run.base, time.monotonic()
    algorithm = build_algorithm(config, base, sources, seed=run.seed)
    rewards = algorithm.reward.rewards.values()
    truth = build_truth(config, base, sources, run.seed) if all(each.differentiable for each in rewards) else None
    run = replace(run, rl=RLTerm(algorithm, config).act_at_once())
    first, fits = fit if isinstance(config, Surrogate) else 0, list[torch.Tensor]()
    for update in range(first):
        algorithm.build_objective(roll_out_prompts(run, update)[1])
        tick(update + 1, first + updates)
    found: dict[int, list[float]] = {}
    for update in range(first, first + updates):
        window, own = roll_out_prompts(run, update)
        objective = algorithm.build_objective(own)
        if isinstance(algorithm, LearnReward):
            fits.append(torch.stack(algorithm.network.last_errors()))
        parts = list_parts(run, window, objective)
        by_step = compare_halves(base, own, objective, parts, config) if truth is None else {}
        if truth is not None:
            by_step = compare_with_reward(truth.build_objective(own), objective, parts)
        for step, cosine in by_step.items():
            found.setdefault(step, []).append(cosine)
        tick(update + 1, first + updates)
    steps = range(len(run.times) - 1)
    by_step_figures = {step: summarize_updates(found.get(step, [])) for step in steps}
    return Signal(label, by_step_figures, (time.monotonic() - began) / max(1, first + updates), pool_fits(fits))


def pool_fits(fits: list[torch.Tensor]) -> float | None:
    """1 - squared errors / squares about the mean, both summed over updates; None without any, or if no score differs.

    fits: of each update, both numbers (2,).
    """
    if not fits:
        return None
    error, spread = torch.stack(fits).sum(0).tolist()
    return 1 - error / spread if spread > 0 else None


def build_truth(config: AnyRL, base: SharedBase, sources: RewardSources, seed: int) -> FollowReward:
    """ReFL with the rewards of a config."""
    shared = {name: value for name, value in config.model_dump().items() if name in SHARED}
    return FollowReward(ReFL.model_validate({"algorithm": "refl", "weight": 1.0, **shared}), base, sources, seed=seed)


def list_parts(run: Run, window: Window, objective: Objective) -> list[Batch]:
    """The states that an objective is a loss of, in parts: RL's own, or those of the student's update."""
    if objective.batches:
        return [batch for parts in objective.batches for batch in parts]
    return select_batches(run, window).student[0]


def compare_with_reward(truth: Objective, objective: Objective, parts: list[Batch]) -> dict[int, float]:
    """Step -> the mean cosine of the two gradients over its states that have one."""
    cosines: dict[int, list[float]] = {}
    for batch in parts:
        pair = [find_gradient(each, batch).flatten(1).double() for each in (objective, truth)]
        norms = [each.norm(dim=1) for each in pair]
        dot = (pair[0] * pair[1]).sum(1)
        for row, step in enumerate(batch.step.tolist()):
            size = float(norms[0][row] * norms[1][row])
            if size > 0:
                cosines.setdefault(step, []).append(float(dot[row]) / size)
    return {step: sum(values) / len(values) for step, values in cosines.items()}


def compare_halves(
    base: SharedBase, window: Window, objective: Objective, parts: list[Batch], config: AnyRL
) -> dict[int, float]:
    """Step -> the cosine of the gradients, in the student's parameters, of two halves of its states.

    Images of one group stand in one half.
    """
    group = config.group_size if isinstance(config, Policy) and not config.branches else 1
    halves: dict[tuple[int, int], list[torch.Tensor]] = {}
    trajectories = sorted({index // group for batch in parts for index in batch.trajectory.tolist()})
    half_of = {trajectory: number % 2 for number, trajectory in enumerate(trajectories)}
    for batch in parts:
        towards = find_gradient(objective, batch)
        x0 = base.student(batch.x_t, batch.t, batch.c)
        half = torch.tensor([half_of[index // group] for index in batch.trajectory.tolist()])
        for key, mask in list_masks(batch.step, half):
            chosen = (x0 * towards)[mask.to(x0.device)].sum()
            gradients = torch.autograd.grad(
                chosen, list(base.student_parameters.values()), retain_graph=True, allow_unused=True
            )
            flat = torch.cat([each.flatten() for each in gradients if each is not None])
            halves.setdefault(key, []).append(flat)
    sums = {key: torch.stack(found).sum(0).double() for key, found in halves.items()}
    cosines = {}
    for step in sorted({step for step, _ in sums}):
        one, other = sums.get((step, 0)), sums.get((step, 1))
        if one is not None and other is not None and one.any() and other.any():
            cosines[step] = float(one @ other / (one.norm() * other.norm()))
    return cosines


def list_masks(step: torch.Tensor, half: torch.Tensor) -> Iterator[tuple[tuple[int, int], torch.Tensor]]:
    """(step, half) -> which states of a batch they are, for those that it has."""
    for number in sorted(set(step.tolist())):
        for side in (0, 1):
            mask = (step == number) & (half == side)
            if mask.any():
                yield (number, side), mask


def summarize_updates(values: list[float]) -> Figure:
    """The mean of the updates, and its standard error."""
    if not values:
        return Figure(None, None)
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Figure(mean, None)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Figure(mean, math.sqrt(variance / len(values)))
