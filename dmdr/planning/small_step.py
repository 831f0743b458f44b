"""One training step of a small stage on meta: the memory and the work that the whole one needs.

1. All parts of a batch cost the same. We run two parts and two fake-score updates, and scale the work up.
2. DPO and GRPO select states by the values of rewards, and meta has no values. In their place we run one part of each
   kind, rollout, rewards, student, reference and likelihood, and scale by what `dmdr.config.batches` counts.
3. Optimizers run once an update, whatever the parts, and on a GPU in a few fused kernels. Their work is what they move.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from dmdr.config.batches import count_rl, count_student_forwards
from dmdr.draws import Batches, Run, count_window, roll_out_prompts, select_batches
from dmdr.dyna import real_scale
from dmdr.optimizers import Balance, GradientSum, Share, Trainable
from dmdr.planning.cost import CostCounter
from dmdr.planning.host_work import count_host_work
from dmdr.planning.small_stage import SmallStage
from dmdr.planning.work import Tally, Work
from dmdr.promptset.encode import count_numbers
from dmdr.rl.actions import Actions
from dmdr.rl.dpo import DPO
from dmdr.rl.evolution_strategies import EvolutionStrategies
from dmdr.rl.grpo import GRPO
from dmdr.rl.objective import Figures, Objective
from dmdr.rl.refl import ReFL
from dmdr.rl.surrogate import Surrogate
from dmdr.rl.weighting import Weighting
from dmdr.rollout import Window
from dmdr.shared_base import DTYPES, FAKE
from dmdr.update import (
    Batch,
    GuidanceLevels,
    Levels,
    RealScore,
    SampleWeights,
    WeightedLoss,
    select_states,
    update_fake_score,
    update_student,
    update_student_by_rl,
)

STEP_BYTES = 4 * (1 + 2 + 7)  # a parameter's gradient normed, clipped, then AdamW reads 4 numbers and writes 3
EMA_BYTES = 4 * 3


class _Balance(Balance):
    """Weighs without numbers."""

    def weigh(self, grad_dm: torch.Tensor, grad_rl: torch.Tensor, *, clip: float, trust: float | torch.Tensor) -> Share:
        return Share(*torch.ones(3, dtype=torch.float64))


@dataclass(frozen=True)
class _Uncounted(Trainable):
    """A trainable whose steps count as memory, but not as operators: on meta they run tensor by tensor."""

    cost: CostCounter

    @classmethod
    def of(cls, trainable: Trainable, cost: CostCounter) -> _Uncounted:
        return cls(trainable.parameters, trainable.optimizer, trainable.clip, cost)

    def step(self) -> torch.Tensor:
        with self.cost.leave_out():
            return super().step()

    def step_beside(
        self, rl: GradientSum, balance: Balance, trust: float | torch.Tensor = 1.0
    ) -> dict[str, torch.Tensor]:
        with self.cost.leave_out():
            return super().step_beside(rl, balance, trust)


class SmallStep:
    """Runs one training step of a small stage. say: called with the name of the part that is being counted."""

    def __init__(self, small: SmallStage, say: Callable[[str], None]) -> None:
        self.small, self.say, self.cost, self.plan = small, say, small.cost, small.plan
        self.base, self.algorithm = small.base, small.algorithm
        self.student = _Uncounted.of(small.state.student, small.cost)
        self.fake_score = _Uncounted.of(small.state.fake_score, small.cost)
        self.asked = count_rl(small.stage.rl, small.config.student.steps)

    def measure(self) -> None:
        """Run one training step, and fill plan.update and the plan's work."""
        cost, plan, small = self.cost, self.plan, self.small
        run = small.build_run(small.small_training)
        shares_rollout = small.stage.distribution_matching or not self.asked.trajectories
        trajectories = count_window(small.build_run(small.training)) if shares_rollout else 0
        plan.prompts = trajectories + self.asked.trajectories // self.asked.group
        plan.conditioning = count_numbers(self.base.backbone.blank())
        plan.forward = self.count(lambda: self.run_bare_base(run)).flops * small.training.batch_size
        held = cost.reset_peak()
        self.say("rollout")
        before = cost.tally()
        window, _ = roll_out_prompts(run, 0)
        count = window.states.x0.shape[1]  # trajectories that ran; the work is scaled up from them
        plan.set_work("rollout", (cost.tally() - before).scale(trajectories / count))
        self.roll_out_widest(window, trajectories)
        if isinstance(self.algorithm, DPO | GRPO):
            self.measure_samples(window, self.algorithm)
        rollout_peak = cost.peak - held
        batches = select_batches(run, window)
        objective = None if self.algorithm is None else self.build_objective(window)
        rollout_live = cost.live - held  # the states, and the batches selected from them
        small.fill_moments()
        cost.peak = held = cost.live - rollout_live
        self.measure_updates(run, batches, objective)
        samples_too = self.asked.states > 0  # RL's sampling, which has run beside the rollout
        in_rollout = rollout_peak + self.count_other_states(window, trajectories, selected=samples_too)
        in_rollout += 4 * sum(plan.trained.values())  # the gradients of the update before, which its steps leave
        plan.update = max(in_rollout, cost.peak - held + self.count_other_states(window, trajectories))
        self.measure_optimizers()
        self.count_messages(window, trajectories)

    def roll_out_widest(self, window: Window, trajectories: int) -> None:
        """Run one step of the largest part of a rollout, which may be larger than the small form's, for its memory."""
        most, share = self.small.config.execution.rollout_batch_size, math.ceil(trajectories / self.plan.ranks)
        if most is None or not share:
            return
        count = -(-share // -(-share // most))  # parts are as equal as can be
        x_t, t = window.states.x_t[0, :1].expand(count, -1, -1, -1), window.times[0].expand(count)
        c = {key: value[:1].expand(count, *value.shape[1:]) for key, value in window.c.items()}
        with torch.no_grad():
            self.base.student(x_t, t, c)

    def measure_samples(self, window: Window, algorithm: DPO | GRPO) -> None:
        """Run one part of the sampling of RL's own, and score it; note the work of both."""
        self.say("sampling of RL")
        asked, steps, config = self.asked, self.small.config.student.steps, algorithm.config
        group = asked.branches or asked.group
        samples = asked.trajectories or math.ceil(asked.states / (steps - 1)) * asked.branches
        share = math.ceil(samples / group / self.plan.ranks) * group
        fitting = window.fit(group)
        together = share if fitting is None else min(share, fitting * group)
        x_t, t = window.states.x_t[0, :1].expand(together, -1, -1, -1), window.times[0].expand(together)
        c = {key: value[:1].expand(together, *value.shape[1:]) for key, value in window.c.items()}
        records = window.records[:1] * group
        with torch.no_grad():
            forward = self.count(lambda: self.base.student(x_t, t, c)).scale(1 / together)
            score = self.count(lambda: algorithm.reward.score_samples(x_t[:group], records, group))
        scored = asked.trajectories or asked.states * asked.branches
        self.plan.set_work("RL samples", forward.scale(count_student_forwards(config, steps)))
        self.plan.set_work("reward", score.scale(scored / group))

    def measure_scores(self, window: Window, algorithm: Surrogate | EvolutionStrategies | Weighting) -> None:
        """Score as many images as are scored at a time; note the work of all."""
        images = self.small.training.batch_size if isinstance(algorithm, Weighting) else algorithm.config.images
        together = math.ceil(images / self.plan.ranks)
        if isinstance(algorithm, EvolutionStrategies):
            together = 2 * algorithm.config.pairs  # of one state
        together = min(together, window.micro_batch or together)
        x0, records = window.states.x0[-1, :1].expand(together, -1, -1, -1), window.records[:1] * together
        with torch.no_grad():
            score = self.count(lambda: algorithm.reward.score_samples(x0, records, together))
        self.plan.set_work("reward", score.scale(images / together))

    def measure_updates(self, run: Run, batches: Batches, objective: Objective | None) -> None:
        """Run the updates of fake score and student, and note their work."""
        plan, small, cost, training = self.plan, self.small, self.cost, self.small.training
        if small.stage.distribution_matching:
            for parts in batches.fake_score:
                self.say("fake score")
                before = cost.tally()
                update_fake_score(self.base, parts, self.blank_levels(parts), self.fake_score)
                samples = training.batch_size * (training.fake_updates - 1)
                plan.set_work("fake score", (cost.tally() - before).scale(samples / small.small_batch))
        own = Tally()
        if objective is not None and objective.batches:
            self.say("student, RL's own states")
            (parts,) = objective.batches
            assert objective.loss is not None, "states of its own are those of a loss"
            rl = WeightedLoss(objective.loss, 1.0, parts)
            own = self.count(lambda: update_student_by_rl(self.base, [], self.student, rl))
            plan.set_work("RL", own.scale(self.asked.states / parts[0].of))
        if own.flops and not small.stage.distribution_matching:
            return
        self.say("student")
        parts = batches.student[0]
        before = cost.tally()
        self.update_student(run, parts, objective)
        inner = self.asked.inner_updates
        student = (cost.tally() - before - own).scale(training.batch_size * inner / small.small_batch)
        if isinstance(self.algorithm, ReFL) and objective is not None:
            reward = self.count_reward(objective, parts[0]).scale(training.batch_size / len(parts[0].t))
            plan.set_work("student", student - reward)
            plan.set_work("reward", reward)
        else:
            plan.set_work("student", student)

    def measure_optimizers(self) -> None:
        """Note what the steps of the optimizers and of the EMA move, on each rank alike, whatever its batch."""
        plan, matches = self.plan, self.small.stage.distribution_matching
        steps = {"student": self.asked.inner_updates, "fake_score": plan.fake_updates if matches else 0}
        moved = {role: count * STEP_BYTES for role, count in plan.trained.items()}
        moved["student"] += plan.trained["student"] * EMA_BYTES
        works = {Work("elementwise", "float32", 0, moved[role]): float(steps[role]) for role in steps if steps[role]}
        plan.tallies["optimizers"] = Tally(works).scale(plan.ranks)

    def count_messages(self, window: Window, trajectories: int) -> None:
        """Note what the CPU of a rank draws and reads for an update, and what the update sends to it."""
        plan, small, steps = self.plan, self.small, len(window.states.x0)
        host = count_host_work(small.config, small.stage.name, self.base.backbone, ranks=plan.ranks)
        plan.noise, plan.read = host.noise, host.prompts
        inner, trained = self.asked.inner_updates, plan.trained
        plan.reduced = 4 * (trained["student"] * inner + trained["fake_score"] * plan.fake_updates)
        parts = math.ceil(small.training.batch_size / plan.ranks / small.part)
        passes = steps * math.ceil(trajectories / plan.ranks / small.part)
        passes += parts * 2 * (plan.fake_updates - 1)  # each forward, and each backward, gathers all weights once
        passes += parts * 5 * inner  # student and fake score forward and backward, and the real score
        plan.gathered = passes * plan.teacher * DTYPES[small.config.precision].itemsize

    def update_student(self, run: Run, parts: list[Batch], objective: Objective | None) -> None:
        """Run one student update of the stage."""
        config = self.small.stage.rl
        rl: WeightedLoss | SampleWeights | None = None
        if objective is not None and config is not None and objective.loss is not None:
            own = objective.batches[0] if objective.batches else None
            apart = own is not None or config.weight_is == "matched"
            rl = WeightedLoss(objective.loss, config.weight, own, _Balance() if apart else None)
        elif objective is not None and objective.weigh is not None:
            rl, _ = objective.weigh(parts, range(parts[0].of), 1.0)
        if not self.small.stage.distribution_matching:
            assert isinstance(rl, WeightedLoss), "the config refuses a joint stage that trains nothing"
            update_student_by_rl(self.base, parts, self.student, rl)
            return
        scale = real_scale(0, self.small.training.dynamic)
        real_score = RealScore(run.unconditional, self.small.config.teacher.guidance, scale)
        levels = self.blank_levels(parts)
        if self.small.training.decoupled is not None:
            cfg = GuidanceLevels(levels.t, levels.noise, self.small.training.renoise_range, below=True)
            levels = replace(levels, cfg=cfg)
        update_student(self.base, parts, levels, real_score, student=self.student, fake_score=self.fake_score, rl=rl)

    def blank_levels(self, parts: list[Batch]) -> Levels:
        """Levels and noise without numbers, for a global batch."""
        count = parts[0].of
        return Levels(torch.empty(count), torch.empty(count, *self.base.backbone.latent_shape))

    def count(self, work: Callable[[], object]) -> Tally:
        """The work of a call of `work`."""
        before = self.cost.tally()
        work()
        return self.cost.tally() - before

    def run_bare_base(self, run: Run) -> None:
        """Run one forward of the base without adapters, for one sample."""
        backbone = self.base.backbone
        with torch.no_grad(), self.base.use_adapter(FAKE, 0.0) as network:
            x_t = torch.empty(1, *backbone.latent_shape, device="meta")
            backbone.predict(network, x_t, torch.empty(1, device="meta"), run.unconditional)

    def count_other_states(self, window: Window, trajectories: int, *, selected: bool = True) -> int:
        """Bytes of states and conditioning of the trajectories and batches that did not run, and of RL's own.

        selected: whether batches are there already; if not, of the trajectories alone.

        A rank holds its own part of the rollout, and a copy of its share of every batch. RL's branches are their
        x_next, the noise that they were drawn with, and the noise of later steps.
        """
        ranks = self.plan.ranks
        states, asked = window.states, self.asked
        latent, conditioning = states.x0[0, 0].nbytes, sum(each[0].nbytes for each in window.c.values())
        more = math.ceil(trajectories / ranks) + math.ceil(asked.trajectories / ranks) - states.x0.shape[1]
        if not selected:
            return more * (2 * len(states.x0) * latent + conditioning)
        batches = self.small.training.fake_updates if self.small.stage.distribution_matching else 1
        share = math.ceil(self.small.training.batch_size / self.plan.ranks)
        copies = batches * share - min(batches, self.small.small_training.fake_updates) * self.small.small_batch
        copies += math.ceil(asked.states / self.plan.ranks)
        branches = asked.states * (2 * asked.branches + len(states.x0)) if asked.branches else asked.states
        if isinstance(self.algorithm, EvolutionStrategies):
            branches += 2 * self.algorithm.config.images  # the images, their noise, and what is added and subtracted
        return (
            more * (2 * len(states.x0) * latent + conditioning)
            + copies * (2 * latent + conditioning)
            + math.ceil(branches / ranks) * latent
        )

    def build_objective(self, window: Window) -> Objective:
        """The algorithm's objective, or one that costs the same where states or images are chosen by their values."""
        algorithm, base, path, asked = self.algorithm, self.base, self.base.backbone.path, self.asked
        if isinstance(algorithm, Surrogate | EvolutionStrategies | Weighting):
            self.measure_scores(window, algorithm)
        if isinstance(algorithm, Surrogate):
            return Objective(algorithm.compute_loss)
        if isinstance(algorithm, Weighting):
            weighted, device = algorithm.config.part, window.states.x0.device

            def weigh(parts: list[Batch], rows: range, strength: float) -> tuple[SampleWeights, Figures]:
                return SampleWeights(torch.ones(len(rows), device=device), weighted), {}

            return Objective(None, weigh=weigh)
        if not isinstance(algorithm, DPO | GRPO | EvolutionStrategies):
            assert algorithm is not None
            return algorithm.build_objective(window)
        needs_reference = self.small.stage.rl is not None and self.small.stage.rl.needs_reference()
        share = math.ceil(asked.states // asked.inner_updates / asked.block / self.plan.ranks) * asked.block
        part = min(share, window.micro_batch or share)
        steps, count = window.states.x0.shape[:2]
        pairs = torch.arange(min(share, 2 * part)) % (steps * count)

        def follow(x0: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Figures]:
            return (x0 * batch.x0).sum() / batch.of, {}

        def loss(x0: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Figures]:
            x_next = batch.x_t[:, None].expand(-1, max(1, asked.branches), -1, -1, -1)
            here = replace(batch, rows=slice(0, len(batch.t)))
            actions = Actions(x_next, batch.t, path, self.small.config.student.eta)
            value = actions.log_prob(here, x0).mean()
            if needs_reference:
                reference = base.reference(batch.x_t, batch.t, batch.c)
                value = value - actions.log_prob(here, reference).mean()
            return value * batch.share, {}

        own = follow if isinstance(algorithm, EvolutionStrategies) else loss
        return Objective(own, [select_states(window.states, window.c, pairs, most=window.micro_batch)])

    def count_reward(self, objective: Objective, batch: Batch) -> Tally:
        """The work of ReFL's reward for one part of a batch: decoder and rewards, forward and backward."""
        x0, loss = batch.x0.detach().requires_grad_(True), objective.loss
        assert loss is not None, "ReFL has one"
        return self.count(lambda: loss(x0, batch)[0].backward())
