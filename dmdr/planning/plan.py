"""Plans a training stage: runs its code on the meta device and counts the memory and the work that it needs.

1. The stage's own code runs with the shapes of its config. `dmdr.assembly` builds networks, LoRAs, rewards, decoder and
   optimizers, and then one training step runs. Every tensor counts from its creation until it is freed.
2. We do not count the CUDA context, workspaces of kernels, and memory that an allocator cannot use because no free
   piece has the right size. `dmdr.planning.gpus` leaves room for them.
3. All parts of a batch cost the same. We run two parts and two fake-score updates, and scale the work up.
4. DPO and GRPO select states by the values of rewards, and meta has no values. In their place we run one part of each
   kind, rollout, rewards, student, reference and likelihood, and scale by what `dmdr.config.batches` counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from dmdr import distributed
from dmdr.assembly import StageConfig, assemble, build_run, select_stage
from dmdr.backbones.protocol import Item
from dmdr.config.batches import count_rl, count_student_forwards
from dmdr.config.prompt_record import PromptRecord
from dmdr.config.rl import ReFL as ReFLConfig
from dmdr.config.run import Config
from dmdr.config.training import Training
from dmdr.dyna import real_scale
from dmdr.metrics.verifier import load_any_reward
from dmdr.optimizers import Balance, Share
from dmdr.planning.cost import CostCounter
from dmdr.planning.meta import Arithmetic, build_meta_backbone
from dmdr.planning.shapes import KnownShapes
from dmdr.promptset.encode import count_numbers
from dmdr.rewards.sources import list_sources
from dmdr.rl.actions import Actions
from dmdr.rl.dpo import DPO
from dmdr.rl.grpo import GRPO
from dmdr.rl.objective import Figures, Objective
from dmdr.rl.refl import ReFL
from dmdr.rl.surrogate import Surrogate
from dmdr.rollout import Window
from dmdr.shared_base import DTYPES, FAKE
from dmdr.train import Batches, Run, count_window, roll_out_prompts, select_batches
from dmdr.update import (
    Batch,
    GuidanceLevels,
    Levels,
    RealScore,
    WeightedLoss,
    select_states,
    update_fake_score,
    update_student,
    update_student_by_rl,
)


@dataclass
class StagePlan:
    """What one training stage needs: memory in bytes on each of `ranks` GPUs, work in FLOPs of one update on all GPUs.

    parts: memory that the stage holds all the time, by name.
    update: the most memory that an update holds beside the parts.
    floor: what `equivalents` would be without gradient checkpointing.
    forward: F, the work of one forward of the bare base on the whole batch, without gradients.
    work: work of one update, by name.
    load: memory that is held for a moment while the teacher is loaded in float32.
    teacher: number of the teacher's parameters.
    trained: number of trained parameters of the student and of the fake score.
    warmup: updates of the fake score alone. fake_updates: K, its steps in an update.
    prompts: those that one update rolls out. conditioning: the numbers of a typical prompt's conditioning.
    """

    stage: str
    updates: int
    ranks: int
    parts: dict[str, int] = field(default_factory=dict)
    update: int = 0
    floor: float = 0.0
    forward: float = 0.0
    work: dict[str, float] = field(default_factory=dict)
    load: int = 0
    teacher: int = 0
    trained: dict[str, int] = field(default_factory=dict)
    warmup: int = 0
    fake_updates: int = 1
    prompts: int = 0
    conditioning: int = 0

    @property
    def total(self) -> float:
        """Work of the whole stage, the fake score's updates alone included."""
        return self.updates * self.flops + self.warmup * self.warmup_flops

    @property
    def warmup_flops(self) -> float:
        """Work of one update of the fake score alone: a rollout, K of its steps, and one forward of the teacher."""
        step = self.work.get("fake score", 0.0) / (self.fake_updates - 1) if self.fake_updates > 1 else 3 * self.forward
        return self.work["rollout"] + self.fake_updates * step + self.forward

    @property
    def peak(self) -> int:
        return sum(self.parts.values()) + self.update

    @property
    def flops(self) -> float:
        return sum(self.work.values())

    @property
    def equivalents(self) -> float:
        """Work of one update without the reward, in units of F."""
        return (self.flops - self.work.get("reward", 0.0)) / self.forward


class BlankPrompts:
    """A prompt set for a run on meta: all its prompts have the same, blank conditioning."""

    def __init__(self, item: Item) -> None:
        self.item = item

    def __len__(self) -> int:
        return 4096

    def items(self, indices: list[int]) -> list[Item]:
        return [self.item] * len(indices)

    def records(self, indices: list[int]) -> list[PromptRecord]:
        return [{"prompt": f"prompt {index}"} for index in indices]


def plan_stage(config: Config, name: str, *, say: Callable[[str], None] = lambda line: None) -> StagePlan:
    """Compute what a training stage needs on each of its GPUs.

    say: called with the name of the part that is being counted, to show progress.

    Raises:
        ConfigError, InputMissing, DataError: the teacher's configuration is not available.
    """
    plan = _Stage(config, select_stage(config, name), say).fill()
    plan.floor = plan.equivalents
    if config.execution.gradient_checkpointing != "none":
        execution = config.execution.model_copy(update={"gradient_checkpointing": "none"})
        without = config.model_copy(update={"execution": execution})
        stage = _Stage(without, select_stage(without, name), lambda part: say(f"{part}, nothing computed twice"))
        plan.floor = stage.fill().equivalents
    return plan


def count_stage(config: Config, name: str, *, say: Callable[[str], None] = lambda line: None) -> StagePlan:
    """`plan_stage` without `floor`, in half the time. Raises as `plan_stage`."""
    return _Stage(config, select_stage(config, name), say).fill()


class _Balance(Balance):
    """Weighs without numbers."""

    def weigh(self, grad_dm: torch.Tensor, grad_rl: torch.Tensor, *, clip: float, trust: float | torch.Tensor) -> Share:
        return Share(*torch.ones(3, dtype=torch.float64))


class _Stage:
    """A small form of a training stage on meta: two parts of one rank's batch, and two updates of the fake score."""

    def __init__(self, config: Config, stage: StageConfig, say: Callable[[str], None]) -> None:
        self.config, self.stage, self.say = config, stage, say
        self.training, self.ranks = stage.training, config.execution.processes
        self.plan = StagePlan(
            stage.name,
            stage.training.updates,
            self.ranks,
            warmup=stage.fake_warmup,
            fake_updates=stage.training.fake_updates,
        )

    def fill(self) -> StagePlan:
        """Assemble the stage, run one training step, and compute what each rank needs."""
        with KnownShapes(), CostCounter("meta") as cost:
            self.build(cost)
            exempt = [*self.base.backbone.vae.parameters(), *self.list_tiny_decoder_parameters()]
            if isinstance(self.stage.rl, ReFLConfig) and self.stage.rl.decoder_precision == "bfloat16":
                exempt = []
            with Arithmetic(DTYPES[self.config.precision], exempt) as arithmetic:
                self.base.recompute_activations(self.config.execution.gradient_checkpointing, arithmetic.again)
                decoder = self.base.backbone.vae.decoder  # whose tiles the backward pass computes again
                decoder.forward = arithmetic.enclose(decoder.forward)  # type: ignore[method-assign]
                self.measure(cost)
        self.account_for_ranks()
        return self.plan

    def build(self, cost: CostCounter) -> None:
        """Build everything that the stage holds, and fill plan.parts."""
        config, plan = self.config, self.plan
        backbone = build_meta_backbone(config.teacher)
        network, vae = backbone.network, backbone.vae
        cost.hold([*network.parameters(), *network.buffers(), *vae.parameters(), *vae.buffers()])
        plan.load = cost.live
        # plain AdamW: the other kinds need a GPU or bitsandbytes, and differ from it only in the size of their moments
        plain = {
            role: getattr(self.training, role).model_copy(update={"kind": "adamw"})
            for role in ("student", "fake_score")
        }
        training = self.training.model_copy(update=plain)
        assembly = assemble(config, replace(self.stage, training=training), backbone)
        self.assembly, self.base, self.state = assembly, assembly.base, assembly.state
        self.algorithm = None if assembly.rl is None else assembly.rl.algorithm
        if self.stage.watch is not None and self.stage.watch.reward is not None:
            self.watched = load_any_reward(self.stage.watch.reward, "meta", list_sources(config))
        plan.load += 0 if self.base.student_is_lora else count_bytes(network.parameters())
        backbone.compute = torch.float32  # Arithmetic casts instead of autocast
        self.name_parts(cost)

        share = math.ceil(training.batch_size / self.ranks)
        part = min(config.execution.micro_batch_size or share, share)
        self.small_batch = min(share, 2 * part)
        fake_updates = min(training.fake_updates, 2)
        self.small_training = training.model_copy(update={"batch_size": self.small_batch, "fake_updates": fake_updates})

    def name_parts(self, cost: CostCounter) -> None:
        """Fill plan.parts with the bytes of each part. The rewards hold all bytes that no other part holds."""
        base, plan, student_part = self.base, self.plan, f"student ({self.config.student.form})"
        network, vae = base.backbone.network, base.backbone.vae
        teacher = [each for name, each in network.named_parameters() if ".lora_" not in name]
        buffers = [] if base.student_is_lora else [*base.student_network.buffers()]
        plan.parts = {
            "teacher": count_bytes(teacher) + count_bytes(network.buffers()),
            "autoencoder": count_bytes([*vae.parameters(), *vae.buffers()]),
            "fake score (LoRA)": count_bytes(base.fake_parameters.values()),
            student_part: count_bytes(base.student_parameters.values()) + count_bytes(buffers),
            "reference": count_bytes(self.list_reference_parameters()),
            "EMA": count_bytes(self.state.ema.values()),
        }
        rewards = cost.live - sum(plan.parts.values())
        roles = {"student": self.training.student.kind, "fake_score": self.training.fake_score.kind}
        plan.parts["optimizers"] = sum(self.count_moments(role, kind) for role, kind in roles.items())
        plan.parts["rewards"] = rewards
        if self.stage.watch is not None and self.stage.watch.export == "best":
            plan.parts["best EMA"] = plan.parts["EMA"]
        plan.trained = {
            role: sum(parameter.numel() for parameter in self.state.trainables[role].parameters.values())
            for role in roles  # a surrogate of the rewards is too small to matter
        }
        plan.teacher = sum(each.numel() for each in teacher)

    def list_reference_parameters(self) -> list[torch.Tensor]:
        """The parameters and buffers of RL's reference, a network or a LoRA; none if RL needs no reference."""
        if self.base.reference_network is not None:
            return [*self.base.reference_network.parameters(), *self.base.reference_network.buffers()]
        return [each for name, each in self.base.backbone.network.named_parameters() if ".reference." in name]

    def list_tiny_decoder_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters of ReFL's tiny decoder; none if it decodes otherwise."""
        if not isinstance(self.algorithm, ReFL) or not isinstance(self.algorithm.decode, partial):
            return []
        modules = [each for each in self.algorithm.decode.args if isinstance(each, torch.nn.Module)]
        return [parameter for module in modules for parameter in module.parameters()]

    def count_moments(self, role: str, kind: str) -> int:
        """Bytes of an optimizer's state: two moments a parameter.

        A moment takes 4 bytes. With 8bit it takes 1 byte, and 256 moments share a scale of 4 bytes; bitsandbytes keeps
        4 bytes for tensors of fewer than 4,096 parameters.
        """
        sizes = [parameter.numel() for parameter in self.state.trainables[role].parameters.values()]
        return sum(int(2 * size * (1 + 4 / 256)) if kind == "8bit" and size >= 4096 else 8 * size for size in sizes)

    def build_run(self, training: Training) -> Run:
        """The run of this stage with other training settings and blank prompts, without RL."""
        blank = self.base.backbone.blank()
        stage = replace(self.stage, training=training)
        run = build_run(self.config, stage, self.assembly, prompts=BlankPrompts(blank), empty_prompt=blank)
        return replace(run, rl=None)

    def measure(self, cost: CostCounter) -> None:
        """Run one training step, and fill plan.update and plan.work."""
        run, plan, batch_size, self.cost = (
            self.build_run(self.small_training),
            self.plan,
            self.training.batch_size,
            cost,
        )
        self.asked = count_rl(self.stage.rl, self.config.student.steps)
        shares_rollout = self.stage.distribution_matching or not self.asked.trajectories
        trajectories = count_window(self.build_run(self.training)) if shares_rollout else 0
        plan.prompts = trajectories + self.asked.trajectories // self.asked.group
        plan.conditioning = count_numbers(self.base.backbone.blank())
        plan.forward = self.count_flops(cost, lambda: self.run_bare_base(run)) * batch_size
        held = cost.reset_peak()
        self.say("rollout")
        before = cost.flops
        window, _ = roll_out_prompts(run, 0)
        count = window.states.x0.shape[1]  # trajectories that ran; the work is scaled up from them
        plan.work["rollout"] = (cost.flops - before) / count * trajectories
        self.roll_out_widest(window, trajectories)
        if isinstance(self.algorithm, DPO | GRPO):
            self.measure_samples(cost, window, self.algorithm)
        rollout_peak = cost.peak - held
        batches = select_batches(run, window)
        objective = None if self.algorithm is None else self.build_objective(window)
        rollout_live = cost.live - held  # the states, and the batches selected from them
        self.fill_moments()
        cost.peak = held = cost.live - rollout_live
        self.measure_updates(cost, run, batches, objective)
        samples_too = self.asked.states > 0  # RL's sampling, which has run beside the rollout
        in_rollout = rollout_peak + self.count_other_states(window, trajectories, selected=samples_too)
        plan.update = max(in_rollout, cost.peak - held + self.count_other_states(window, trajectories))

    def roll_out_widest(self, window: Window, trajectories: int) -> None:
        """Run one step of the largest part of a rollout, which may be larger than the small form's, for its memory."""
        most, share = self.config.execution.rollout_batch_size, math.ceil(trajectories / self.ranks)
        if most is None or not share:
            return
        count = -(-share // -(-share // most))  # parts are as equal as can be
        x_t, t = window.states.x_t[0, :1].expand(count, -1, -1, -1), window.times[0].expand(count)
        c = {key: value[:1].expand(count, *value.shape[1:]) for key, value in window.c.items()}
        with torch.no_grad():
            self.base.student(x_t, t, c)

    def measure_samples(self, cost: CostCounter, window: Window, algorithm: DPO | GRPO) -> None:
        """Run one part of the sampling of RL's own, and score it; fill plan.work."""
        self.say("sampling of RL")
        asked, steps, config = self.asked, self.config.student.steps, algorithm.config
        group = asked.branches or asked.group
        samples = asked.trajectories or math.ceil(asked.states / (steps - 1)) * asked.branches
        share = math.ceil(samples / group / self.ranks) * group
        fitting = window.fit(group)
        together = share if fitting is None else min(share, fitting * group)
        x_t, t = window.states.x_t[0, :1].expand(together, -1, -1, -1), window.times[0].expand(together)
        c = {key: value[:1].expand(together, *value.shape[1:]) for key, value in window.c.items()}
        with torch.no_grad():
            forward = self.count_flops(cost, lambda: self.base.student(x_t, t, c)) / together
            score = self.count_flops(
                cost, lambda: algorithm.reward.score_samples(x_t[:group], window.records[:1] * group, group)
            )
        scored = asked.trajectories or asked.states * asked.branches
        self.plan.work["RL samples"] = forward * count_student_forwards(config, steps)
        self.plan.work["reward"] = score / group * scored

    def measure_updates(self, cost: CostCounter, run: Run, batches: Batches, objective: Objective | None) -> None:
        """Run the updates of fake score and student, and add their work to plan.work."""
        plan, training = self.plan, self.training
        if self.stage.distribution_matching:
            for parts in batches.fake_score:
                self.say("fake score")
                before = cost.flops
                update_fake_score(self.base, parts, self.blank_levels(parts), self.state.fake_score)
                samples = training.batch_size * (training.fake_updates - 1)
                plan.work["fake score"] = (cost.flops - before) / self.small_batch * samples
        own = 0.0
        if objective is not None and objective.batches:
            self.say("student, RL's own states")
            (parts,) = objective.batches
            rl = WeightedLoss(objective.loss, 1.0, parts)
            own = self.count_flops(cost, lambda: update_student_by_rl(self.base, [], self.state.student, rl))
            plan.work["RL"] = own / parts[0].of * self.asked.states
        if own and not self.stage.distribution_matching:
            return
        self.say("student")
        parts = batches.student[0]
        before = cost.flops
        self.update_student(run, parts, objective)
        inner = self.asked.inner_updates
        plan.work["student"] = (cost.flops - before - own) / self.small_batch * training.batch_size * inner
        if isinstance(self.algorithm, ReFL) and objective is not None:
            reward = self.count_reward(cost, objective, parts[0]) / len(parts[0].t) * training.batch_size
            plan.work["reward"] = reward
            plan.work["student"] -= reward

    def update_student(self, run: Run, parts: list[Batch], objective: Objective | None) -> None:
        """Run one student update of the stage."""
        state, config = self.state, self.stage.rl
        rl = None
        if objective is not None and config is not None:
            own = objective.batches[0] if objective.batches else None
            apart = own is not None or config.weight_is == "matched"
            rl = WeightedLoss(objective.loss, config.weight, own, _Balance() if apart else None)
        if not self.stage.distribution_matching:
            assert rl is not None, "the config refuses a joint stage that trains nothing"
            update_student_by_rl(self.base, parts, state.student, rl)
            return
        scale = real_scale(0, self.training.dynamic)
        real_score = RealScore(run.unconditional, self.config.teacher.guidance, scale)
        levels = self.blank_levels(parts)
        if self.training.decoupled is not None:
            cfg = GuidanceLevels(levels.t, levels.noise, self.training.renoise_range, below=True)
            levels = replace(levels, cfg=cfg)
        update_student(self.base, parts, levels, real_score, student=state.student, fake_score=state.fake_score, rl=rl)

    def blank_levels(self, parts: list[Batch]) -> Levels:
        """Levels and noise without numbers, for a global batch."""
        count = parts[0].of
        return Levels(torch.empty(count), torch.empty(count, *self.base.backbone.latent_shape))

    @staticmethod
    def count_flops(cost: CostCounter, work: Callable[[], object]) -> float:
        """FLOPs of a call of `work`, inside the counter."""
        before = cost.flops
        work()
        return cost.flops - before

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
        states, asked = window.states, self.asked
        latent, conditioning = states.x0[0, 0].nbytes, sum(each[0].nbytes for each in window.c.values())
        more = math.ceil(trajectories / self.ranks) + math.ceil(asked.trajectories / self.ranks) - states.x0.shape[1]
        if not selected:
            return more * (2 * len(states.x0) * latent + conditioning)
        batches = self.training.fake_updates if self.stage.distribution_matching else 1
        share = math.ceil(self.training.batch_size / self.ranks)
        copies = batches * share - min(batches, self.small_training.fake_updates) * self.small_batch
        copies += math.ceil(asked.states / self.ranks)
        branches = asked.states * (2 * asked.branches + len(states.x0)) if asked.branches else asked.states
        return (
            more * (2 * len(states.x0) * latent + conditioning)
            + copies * (2 * latent + conditioning)
            + math.ceil(branches / self.ranks) * latent
        )

    def fill_moments(self) -> None:
        """Give the optimizers their moments, as after a first step."""
        for trainable in self.state.trainables.values():
            for parameter in trainable.parameters.values():
                parameter.grad = torch.empty_like(parameter)
            trainable.optimizer.step()
            trainable.zero_grad()

    def build_objective(self, window: Window) -> Objective:
        """The algorithm's objective; for DPO and GRPO, which select states by rewards, one that costs the same."""
        algorithm, base, path, asked = self.algorithm, self.base, self.base.backbone.path, self.asked
        if isinstance(algorithm, Surrogate):
            with torch.no_grad():
                x0, records = window.states.x0[-1, :1], window.records[:1]
                score = self.count_flops(self.cost, lambda: algorithm.reward.score_samples(x0, records, 1))
            self.plan.work["reward"] = score * algorithm.config.samples
            return Objective(algorithm.compute_loss)
        if not isinstance(algorithm, DPO | GRPO):
            assert algorithm is not None
            return algorithm.build_objective(window)
        needs_reference = self.stage.rl is not None and self.stage.rl.needs_reference()
        share = math.ceil(asked.states // asked.inner_updates / asked.block / self.ranks) * asked.block
        part = min(share, window.micro_batch or share)
        steps, count = window.states.x0.shape[:2]
        pairs = torch.arange(min(share, 2 * part)) % (steps * count)

        def loss(x0: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Figures]:
            x_next = batch.x_t[:, None].expand(-1, max(1, asked.branches), -1, -1, -1)
            here = replace(batch, rows=slice(0, len(batch.t)))
            actions = Actions(x_next, batch.t, path, self.config.student.eta)
            value = actions.log_prob(here, x0).mean()
            if needs_reference:
                reference = base.reference(batch.x_t, batch.t, batch.c)
                value = value - actions.log_prob(here, reference).mean()
            return value * batch.share, {}

        return Objective(loss, [select_states(window.states, window.c, pairs, most=window.micro_batch)])

    def count_reward(self, cost: CostCounter, objective: Objective, batch: Batch) -> float:
        """FLOPs of ReFL's reward for one part of a batch: decoder and rewards, forward and backward."""
        x0 = batch.x0.detach().requires_grad_(True)
        return self.count_flops(cost, lambda: objective.loss(x0, batch)[0].backward())

    def account_for_ranks(self) -> None:
        """Add the memory of the optimizers' steps and of messages between ranks, and divide what FSDP2 shards."""
        plan = self.plan
        kinds = {role: getattr(self.training, role).kind for role in plan.trained}
        gradients = 4 * sum(plan.trained.values())
        step_memory = max(4 * count if kinds[role] == "adamw" else 0 for role, count in plan.trained.items())
        plan.update = max(plan.update, gradients + step_memory)
        if self.ranks > 1:
            plan.update += 2 * 4 * min(distributed.MESSAGE, sum(plan.trained.values()))
        if self.config.execution.sharding == "fsdp" and self.ranks > 1:
            blocks = distributed.list_blocks(self.base.backbone.network)
            largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
            split = ("teacher", "reference") if self.base.student_is_lora else tuple(plan.parts)
            for name in split:
                if name not in ("autoencoder", "fake score (LoRA)", "rewards"):
                    plan.parts[name] = -(-plan.parts[name] // self.ranks)
            plan.load = 0  # each rank loads into the host's memory and takes its rows from there
            plan.update += 2 * largest * DTYPES[self.config.precision].itemsize


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of memory behind these tensors. Memory that they share counts once."""
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())
