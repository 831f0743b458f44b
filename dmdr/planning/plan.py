"""What a run needs, before anyone pays: its own updates, run on the meta device, where memory and work are exact.

1. A training stage's own code runs with the shapes of its config: `dmdr.assembly` builds networks, LoRAs, rewards,
   decoder and optimizers, and one training step follows. Every tensor counts from its creation until it is freed.
2. Not counted: the context of CUDA, workspaces of kernels, and memory that an allocator cannot use because no free
   piece has the right size. `dmdr.planning.gpus` leaves room for them.
3. Parts of a batch are alike: two of them run, with two updates of the fake score, and the work is scaled up to all.
4. Preferences and advantages choose by numbers, which meta does not have: DPO and GRPO run their rewards and their
   reference, and a likelihood of every state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch

from dmdr import distributed
from dmdr.assembly import StageConfig, assemble, build_run, select_stage
from dmdr.backbones.protocol import Conditioning, Item
from dmdr.config.prompt_record import PromptRecord
from dmdr.config.run import Config, Training
from dmdr.dyna import real_scale
from dmdr.planning.cost import CostCounter
from dmdr.planning.meta import Arithmetic, build_meta_backbone
from dmdr.planning.shapes import KnownShapes
from dmdr.rewards.load import load_reward
from dmdr.rl.dpo import DPO
from dmdr.rl.grpo import GRPO
from dmdr.rl.objective import Figures, Objective, log_prob
from dmdr.rl.refl import ReFL
from dmdr.rollout import States
from dmdr.shared_base import DTYPES, FAKE
from dmdr.train import Batches, Run, count_groups, roll_out_prompts, select_batches
from dmdr.update import (
    Batch,
    Levels,
    RealScore,
    WeightedLoss,
    update_fake_score,
    update_student,
    update_student_by_rl,
)


@dataclass
class StagePlan:
    """One training stage on one GPU of `ranks`. Memory in bytes, work in FLOPs of one update of the whole run.

    parts: what is held all the time, by name. update: the most that an update holds beside it.
    """

    stage: str
    updates: int
    ranks: int
    parts: dict[str, int] = field(default_factory=dict)
    update: int = 0
    floor: float = 0.0  # `equivalents` if no activation were computed twice
    forward: float = 0.0  # F: the bare base, no graph, on the whole batch
    work: dict[str, float] = field(default_factory=dict)
    load: int = 0  # bytes that are held for a moment while the teacher is loaded, in float32
    teacher: int = 0  # parameters
    trained: dict[str, int] = field(default_factory=dict)  # parameters of student and fake_score

    @property
    def peak(self) -> int:
        return sum(self.parts.values()) + self.update

    @property
    def flops(self) -> float:
        return sum(self.work.values())

    @property
    def equivalents(self) -> float:
        """Forward-equivalents of an update, reward aside."""
        return (self.flops - self.work.get("reward", 0.0)) / self.forward


class BlankPrompts:
    """As many prompts as are asked for, all alike."""

    def __init__(self, item: Item) -> None:
        self.item = item

    def __len__(self) -> int:
        return 4096

    def items(self, indices: list[int]) -> list[Item]:
        return [self.item] * len(indices)

    def records(self, indices: list[int]) -> list[PromptRecord]:
        return [{"prompt": f"prompt {index}"} for index in indices]


def plan_stage(config: Config, name: str, *, say: Callable[[str], None] = lambda line: None) -> StagePlan:
    """What a training stage needs on each of its GPUs. say: takes what is being worked out.

    Raises:
        ConfigError, InputMissing, DataError: the teacher's configuration is not available.
    """
    plan = _Stage(config, select_stage(config, name), say).fill()
    plan.floor = plan.equivalents
    if config.execution.gradient_checkpointing:
        execution = config.execution.model_copy(update={"gradient_checkpointing": False})
        keeping = config.model_copy(update={"execution": execution})
        stage = _Stage(keeping, select_stage(keeping, name), lambda part: say(f"{part}, nothing computed twice"))
        plan.floor = stage.fill().equivalents
    return plan


class _Stage:
    """A training stage in small, on meta: two parts of one rank's batch, two updates of the fake score."""

    def __init__(self, config: Config, stage: StageConfig, say: Callable[[str], None]) -> None:
        self.config, self.stage, self.say = config, stage, say
        self.training, self.ranks = stage.training, config.execution.processes
        self.plan = StagePlan(stage.name, stage.training.updates, self.ranks)

    def fill(self) -> StagePlan:
        """Assemble the stage, run one training step, and work out what each rank needs."""
        with KnownShapes(), CostCounter("meta") as cost:
            self.build(cost)
            spared = [*self.base.backbone.vae.parameters(), *self.tiny_parameters()]
            with Arithmetic(DTYPES[self.config.precision], spared) as arithmetic:
                if self.config.execution.gradient_checkpointing:
                    self.base.recompute_activations(arithmetic.recompute)
                self.measure(cost)
        self.share_out()
        return self.plan

    def build(self, cost: CostCounter) -> None:
        """Everything that the stage holds, named in plan.parts."""
        config, plan = self.config, self.plan
        backbone = build_meta_backbone(config.teacher)
        network, vae = backbone.network, backbone.vae
        cost.hold([*network.parameters(), *network.buffers(), *vae.parameters(), *vae.buffers()])
        plan.load = cost.live
        # AdamW's plain kind: the others need a GPU or bitsandbytes, and only their moments differ
        plain = {
            role: getattr(self.training, role).model_copy(update={"kind": "adamw"})
            for role in ("student", "fake_score")
        }
        training = self.training.model_copy(update=plain)
        with torch.device("meta"):
            assembly = assemble(config, replace(self.stage, training=training), backbone)
        self.assembly, self.base, self.state = assembly, assembly.base, assembly.state
        self.algorithm = None if assembly.rl is None else assembly.rl.algorithm
        if self.stage.watch is not None:
            self.watched = load_reward(self.stage.watch.reward, "meta", config.weights)
        plan.load += 0 if self.base.student_is_lora else count_bytes(network.parameters())
        backbone.compute = torch.float32  # Arithmetic casts instead of autocast
        self.name_parts(cost)

        self.block = 1 if self.algorithm is None else self.algorithm.block
        mine = math.ceil(training.batch_size / self.ranks)
        part = min(config.execution.micro_batch_size or mine, mine)
        self.few = max(self.block, min(mine, 2 * part) // self.block * self.block)
        few_updates = min(training.fake_updates, 2)
        self.small = training.model_copy(update={"batch_size": self.few, "fake_updates": few_updates})

    def name_parts(self, cost: CostCounter) -> None:
        """Which part of the stage holds how many bytes; the rewards hold what no other part does."""
        base, plan, student_part = self.base, self.plan, f"student ({self.config.student.form})"
        network, vae = base.backbone.network, base.backbone.vae
        teacher = [each for name, each in network.named_parameters() if ".lora_" not in name]
        buffers = [] if base.student_is_lora else [*base.student_network.buffers()]
        plan.parts = {
            "teacher": count_bytes(teacher) + count_bytes(network.buffers()),
            "autoencoder": count_bytes([*vae.parameters(), *vae.buffers()]),
            "fake score (LoRA)": count_bytes(base.fake_parameters.values()),
            student_part: count_bytes(base.student_parameters.values()) + count_bytes(buffers),
            "reference": count_bytes(self.reference_parameters()),
            "EMA": count_bytes(self.state.ema.values()),
        }
        rewards = cost.live - sum(plan.parts.values())
        roles = {"student": self.training.student.kind, "fake_score": self.training.fake_score.kind}
        plan.parts["optimizers"] = sum(self.moments(role, kind) for role, kind in roles.items())
        plan.parts["rewards"] = rewards
        if self.stage.watch is not None and self.stage.watch.export == "best":
            plan.parts["best EMA"] = plan.parts["EMA"]
        plan.trained = {
            role: sum(parameter.numel() for parameter in trainable.parameters.values())
            for role, trainable in self.state.trainables.items()
        }
        plan.teacher = sum(each.numel() for each in teacher)

    def reference_parameters(self) -> list[torch.Tensor]:
        if self.base.reference_network is not None:
            return [*self.base.reference_network.parameters(), *self.base.reference_network.buffers()]
        return [each for name, each in self.base.backbone.network.named_parameters() if ".reference." in name]

    def tiny_parameters(self) -> list[torch.nn.Parameter]:
        decode = getattr(self.algorithm, "decode", None)
        return [
            parameter
            for each in getattr(decode, "args", ())
            if isinstance(each, torch.nn.Module)
            for parameter in each.parameters()
        ]

    def moments(self, role: str, kind: str) -> int:
        """Bytes of an optimizer's state: two moments of 4 bytes, or with 8bit of 1 and a scale for each 256."""
        sizes = [parameter.numel() for parameter in self.state.trainables[role].parameters.values()]
        return sum(int(2 * size * (1 + 4 / 256)) if kind == "8bit" and size >= 4096 else 8 * size for size in sizes)

    def build_run(self, training: Training) -> Run:
        blank = self.base.backbone.blank()
        stage = replace(self.stage, training=training)
        return build_run(self.config, stage, self.assembly, prompts=BlankPrompts(blank), empty_prompt=blank)

    def measure(self, cost: CostCounter) -> None:
        """One training step: plan.update and plan.work."""
        run, plan, batch_size = self.build_run(self.small), self.plan, self.training.batch_size
        trajectories = math.prod(count_groups(self.build_run(self.training)))
        plan.forward = self.count_flops(cost, lambda: self.run_bare_base(run)) * batch_size
        held = cost.reset_peak()
        self.say("rollout")
        before = cost.flops
        states, c, texts = roll_out_prompts(run, 0)
        few = states.x0.shape[1]
        plan.work["rollout"] = (cost.flops - before) / few * trajectories
        before = cost.flops
        objective = None if self.algorithm is None else self.build_objective(states, texts)
        plan.work["reward"] = (cost.flops - before) / few * trajectories
        rolling = cost.peak - held
        batches = select_batches(run, 0, states, c, objective)
        rolled = cost.live - held  # the states, and the batches selected from them

        first = 0
        if self.matches_gradients() and objective is not None:
            self.say("first student update, whose weight is matched")
            cost.reset_peak()
            self.update_student(run, batches.student[0], objective, matched=True)
            moments = 8 * sum(plan.trained.values())  # both are among plan.parts
            first = cost.peak - held - moments
        self.fill_moments()
        cost.peak = held = cost.live - rolled
        self.measure_updates(cost, run, batches, objective)
        plan.update = max(first, rolling, cost.peak - held) + self.count_other_states(states, c, trajectories)

    def measure_updates(self, cost: CostCounter, run: Run, batches: Batches, objective: Objective | None) -> None:
        """The updates of fake score and student: their part of plan.work."""
        plan, training = self.plan, self.training
        if self.stage.distribution_matching:
            for parts in batches.fake_score:
                self.say("fake score")
                before = cost.flops
                update_fake_score(self.base, parts, self.blank_levels(parts), self.state.fake_score)
                samples = training.batch_size * (training.fake_updates - 1)
                plan.work["fake score"] = (cost.flops - before) / self.few * samples
        self.say("student")
        parts = batches.student[0]
        before = cost.flops
        self.update_student(run, parts, objective)
        inner = self.algorithm.inner_updates if self.algorithm else 1
        plan.work["student"] = (cost.flops - before) / self.few * training.batch_size * inner
        if isinstance(self.algorithm, ReFL) and objective is not None:
            reward = self.count_reward(cost, objective, parts[0]) / len(parts[0].t) * training.batch_size
            plan.work["reward"] += reward
            plan.work["student"] -= reward

    def matches_gradients(self) -> bool:
        """Whether the first student update keeps the gradients of both losses apart, and whether that needs more room:
        a LoRA's gradients are small."""
        rl = self.stage.rl
        return rl is not None and rl.weight_is == "matched" and not self.base.student_is_lora

    def update_student(
        self, run: Run, parts: list[Batch], objective: Objective | None, *, matched: bool = False
    ) -> None:
        """One student update of the stage."""
        state = self.state
        rl = None
        if objective is not None and self.stage.rl is not None:
            rl = WeightedLoss(objective.loss, self.stage.rl.weight, matched)
        if not self.stage.distribution_matching:
            assert rl is not None, "the config refuses a joint stage that trains nothing"
            update_student_by_rl(self.base, parts, state.student, rl)
            return
        scale = real_scale(0, self.training.dynamic)
        real_score = RealScore(run.unconditional, run.guidance_scale, scale)
        levels = self.blank_levels(parts)
        update_student(self.base, parts, levels, real_score, student=state.student, fake_score=state.fake_score, rl=rl)

    def blank_levels(self, parts: list[Batch]) -> Levels:
        """Levels and noise without numbers, for a global batch."""
        count = parts[0].of
        return Levels(torch.empty(count), torch.empty(count, *self.base.backbone.latent_shape))

    @staticmethod
    def count_flops(cost: CostCounter, work: Callable[[], object]) -> float:
        before = cost.flops
        work()
        return cost.flops - before

    def run_bare_base(self, run: Run) -> None:
        """One forward of the base without adapters, of one sample."""
        backbone = self.base.backbone
        with torch.no_grad(), self.base.use_adapter(FAKE, 0.0) as network:
            x_t = torch.empty(1, *backbone.latent_shape, device="meta")
            backbone.predict(network, x_t, torch.empty(1, device="meta"), run.unconditional)

    def count_other_states(self, states: States, c: Conditioning, trajectories: int) -> int:
        """Bytes of states and conditioning beyond those of the few that ran: every rank holds all of the rollout, and
        copies of its own share of every batch."""
        latent, conditioning = states.x0[0, 0].nbytes, sum(each[0].nbytes for each in c.values())
        more = trajectories - states.x0.shape[1]
        batches = self.training.fake_updates if self.stage.distribution_matching else 1
        mine = math.ceil(self.training.batch_size / self.ranks)
        copies = batches * mine - min(batches, self.small.fake_updates) * self.few
        return more * (2 * len(states.x0) * latent + conditioning) + copies * (2 * latent + conditioning)

    def fill_moments(self) -> None:
        """Give the optimizers their moments, as after a first step."""
        for trainable in self.state.trainables.values():
            for parameter in trainable.parameters.values():
                parameter.grad = torch.empty_like(parameter)
            trainable.optimizer.step()
            trainable.zero_grad()

    def build_objective(self, states: States, texts: list[str]) -> Objective:
        """An algorithm's objective; for those that choose by numbers, one that costs the same."""
        algorithm, base, path = self.algorithm, self.base, self.base.backbone.path
        if not isinstance(algorithm, DPO | GRPO):
            assert algorithm is not None
            return algorithm.build_objective(states, texts)
        algorithm.reward.score_samples(states.x0[-1], texts, algorithm.group_size)
        needs_reference = self.stage.rl is not None and self.stage.rl.needs_reference()

        def loss(x0: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Figures]:
            value = log_prob(path, batch.x_t, x0, batch.t).mean()
            if needs_reference:
                value = value - log_prob(path, batch.x_t, base.reference(batch.x_t, batch.t, batch.c), batch.t).mean()
            return value * batch.share, {}

        count = states.x0.shape[1]
        return Objective(loss, torch.arange(count // self.block * self.block).view(-1, self.block))

    def count_reward(self, cost: CostCounter, objective: Objective, batch: Batch) -> float:
        """FLOPs of ReFL's reward of one part: decoder and rewards, forward and backward."""
        x0 = batch.x0.detach().requires_grad_(True)
        return self.count_flops(cost, lambda: objective.loss(x0, batch)[0].backward())

    def share_out(self) -> None:
        """Add what the optimizers' steps and messages between ranks need; divide what FSDP2 shards."""
        found = self.plan
        kinds = {role: getattr(self.training, role).kind for role in found.trained}
        gradients = 4 * sum(found.trained.values())
        at_once = max(4 * count if kinds[role] == "adamw" else 0 for role, count in found.trained.items())
        found.update = max(found.update, gradients + at_once)
        if self.ranks > 1:
            found.update += 2 * 4 * min(distributed.MESSAGE, sum(found.trained.values()))
        if self.config.execution.sharding == "fsdp" and self.ranks > 1:
            blocks = distributed.list_blocks(self.base.backbone.network)
            largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
            split = ("teacher", "reference") if self.base.student_is_lora else tuple(found.parts)
            for name in split:
                if name not in ("autoencoder", "fake score (LoRA)", "rewards"):
                    found.parts[name] = -(-found.parts[name] // self.ranks)
            found.load = 0  # each rank loads into the host's memory and takes its rows from there
            found.update += 2 * largest * DTYPES[self.config.precision].itemsize


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of memory behind these tensors; what they share counts once."""
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())
