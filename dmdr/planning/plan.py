"""What a run needs, before anyone pays: its own updates, run on the meta device, where memory and work are exact.

1. The very code of a training stage is run with the shapes of its config: the networks, LoRAs, rewards, decoder,
   optimizers and a window of `dmdr.train`. Every tensor is counted from when it is made until it is let go.
2. Not counted: the context of CUDA, workspaces of kernels, and what an allocator cannot use for want of a piece of the
   right size. `dmdr.planning.gpus` leaves room for them.
3. Parts of a batch are alike: two of them are run, with two updates of the fake score, and work is scaled up to all.
4. Preferences and advantages choose by numbers, which meta has not: DPO and GRPO are run with their rewards and
   reference, and a likelihood of every state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from dmdr import distributed
from dmdr.backbones.protocol import Conditioning, Item
from dmdr.config.run import Config, Training
from dmdr.dyna import real_scale
from dmdr.planning.cost import CostCounter
from dmdr.planning.meta import build_meta_backbone, count_arithmetic
from dmdr.planning.shapes import KnownShapes
from dmdr.rewards.load import load_reward
from dmdr.rl.algorithms import ALGORITHMS
from dmdr.rl.objective import Figures, Objective, log_prob
from dmdr.rl.refl import ReFL
from dmdr.rollout import States
from dmdr.shared_base import DTYPES, FAKE, SharedBase
from dmdr.state import TrainState
from dmdr.train import Run, count_groups, roll_out_prompts, select_batches
from dmdr.update import Batch, Renoise, Weighted, update_fake_score, update_student, update_student_by_rl


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

    def records(self, indices: list[int]) -> list[dict]:
        return [{"prompt": f"prompt {index}"} for index in indices]


def plan_stage(config: Config, stage: str, *, say: Callable[[str], None] = lambda line: None) -> StagePlan:
    """What a training stage needs on each of its GPUs.

    Raises:
        ConfigError, InputMissing, DataError: the teacher's configuration is not to be had.
    """
    found = _Stage(config, stage, say).planned()
    found.floor = found.equivalents
    if config.execution.gradient_checkpointing:
        kept = config.model_copy(
            update={"execution": config.execution.model_copy(update={"gradient_checkpointing": False})}
        )
        found.floor = _Stage(kept, stage, lambda part: say(f"{part}, nothing computed twice")).planned().equivalents
    return found


class _Stage:
    """A training stage in small, on meta: two parts of one rank's batch, two updates of the fake score."""

    def __init__(self, config: Config, stage: str, say: Callable[[str], None]) -> None:
        self.config, self.stage, self.say = config, stage, say
        self.training: Training = getattr(config, stage)
        self.rl = config.joint.rl if stage == "joint" else None
        self.matching = stage != "joint" or config.joint.distribution_matching
        self.ranks = config.execution.processes
        self.block = 2 if self.rl and self.rl.algorithm == "dpo" else 1
        mine = -(-self.training.batch_size // self.ranks)
        part = min(config.execution.micro_batch_size or mine, mine)
        self.few = max(self.block, min(mine, 2 * part) // self.block * self.block)

    def planned(self) -> StagePlan:
        found = StagePlan(self.stage, self.training.updates, self.ranks)
        with KnownShapes(), CostCounter("meta") as cost:
            self.build(cost, found)
            spared = [*self.base.backbone.pipe.vae.parameters(), *self.tiny_parameters()]
            with count_arithmetic(DTYPES[self.config.precision], spared):
                self.measure(cost, found)
        self.share_out(found)
        return found

    def build(self, cost: CostCounter, found: StagePlan) -> None:
        """Everything that the stage holds, named in found.parts."""
        config, training = self.config, self.training
        backbone = build_meta_backbone(config.teacher)
        network, vae = backbone.network, backbone.pipe.vae
        cost.hold([*network.parameters(), *network.buffers(), *vae.parameters(), *vae.buffers()])
        found.load = cost.live
        compute = DTYPES[config.precision]
        with torch.device("meta"):
            base = SharedBase(
                backbone,
                fake_rank=config.fake_score.lora_rank,
                fake_scale=config.fake_score.scale,
                student_rank=config.student.lora_rank,
                seed=config.seed,
                compute=compute,
            )
        found.load += 0 if base.student_is_lora else count_bytes(network.parameters())
        if config.execution.gradient_checkpointing:
            base.recompute_activations()
        before = cost.live
        self.base, self.algorithm = base, None
        if self.rl is not None:
            if self.rl.needs_reference():
                with torch.device("meta"):
                    base.keep_reference()
            before = cost.live
            self.algorithm = ALGORITHMS[self.rl.algorithm](self.rl, base, config.weights)
        watch = config.joint.watch if self.stage == "joint" else None
        self.watched = watch and load_reward(watch.reward, "meta", config.weights)
        in_rewards = cost.live - before
        backbone.compute = torch.float32  # `arithmetic` casts, in the place of autocast

        plain = training.student.model_copy(update={"kind": "adamw"})
        self.small = training.model_copy(
            update={
                "batch_size": self.few,
                "fake_updates": min(training.fake_updates, 2),
                "student": plain,
                "fake_score": training.fake_score.model_copy(update={"kind": "adamw"}),
            }
        )
        self.state = TrainState(base, self.small, ema=config.student.ema)
        parts = {
            "teacher": [each for name, each in network.named_parameters() if ".lora_" not in name],
            "autoencoder": [*vae.parameters(), *vae.buffers()],
            "fake score (LoRA)": base.fake_parameters.values(),
            f"student ({config.student.form})": base.student_parameters.values(),
            "reference": self.reference_parameters(),
            "EMA": self.state.ema.values(),
        }
        found.parts = {name: count_bytes(tensors) for name, tensors in parts.items()}
        found.parts["teacher"] += count_bytes(network.buffers())
        if not base.student_is_lora:
            found.parts[f"student ({config.student.form})"] += count_bytes(base.student_network.buffers())
        found.parts["optimizers"] = sum(
            self.moments(role, getattr(training, role).kind) for role in ("student", "fake_score")
        )
        found.parts["rewards"] = in_rewards
        if watch and watch.export == "best":
            found.parts["best EMA"] = found.parts["EMA"]
        found.trained = {role: sum(p.numel() for p in each.values()) for role, each in self.state.networks.items()}
        found.teacher = sum(each.numel() for each in parts["teacher"])

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
        sizes = [parameter.numel() for parameter in self.state.networks[role].values()]
        return sum(int(2 * size * (1 + 4 / 256)) if kind == "8bit" and size >= 4096 else 8 * size for size in sizes)

    def run(self, training: Training) -> Run:
        backbone, config = self.base.backbone, self.config
        like = backbone.network.device
        return Run(
            stage=self.stage,
            seed=config.seed,
            training=training,
            base=self.base,
            prompts=BlankPrompts(backbone.blank()),
            unconditional=backbone.collate([backbone.blank()]),
            times=backbone.student_times(config.student.steps).to(like),
            guidance_scale=config.teacher.guidance_scale,
            rl=self.algorithm and (self.algorithm, self.rl),
            distribution_matching=self.matching,
            micro_batch=config.execution.micro_batch_size,
        )

    def measure(self, cost: CostCounter, found: StagePlan) -> None:
        """One window: found.update and found.work."""
        run, base, few = self.run(self.small), self.base, self.few
        whole = count_groups(self.run(self.training))
        real = self.training

        def counted(work: Callable[[], object]) -> tuple[object, float]:
            before = cost.flops
            return work(), cost.flops - before

        found.forward = counted(lambda: self.bare(run))[1] * real.batch_size
        cost.peak = held = cost.live
        self.say("rollout")
        (states, c, texts), work = counted(lambda: roll_out_prompts(run, 0))
        trajectories = math.prod(whole)
        found.work["rollout"] = work / states.x0.shape[1] * trajectories
        objective, work = counted(lambda: self.build_objective(states, texts)) if self.algorithm else (None, 0.0)
        found.work["reward"] = work / states.x0.shape[1] * trajectories
        rolling = cost.peak - held
        fake_batches, student_batches = select_batches(run, 0, states, c, objective)
        rolled = cost.live - held  # states and the batches chosen from them
        student, fake_score = self.state.optimizers["student"], self.state.optimizers["fake_score"]
        shape = base.backbone.latent_shape

        def levels(batches: list[Batch]) -> Renoise:
            return Renoise(torch.empty(batches[0].of), torch.empty(batches[0].of, *shape))

        def update_by(rl: Weighted | None) -> dict:
            if not self.matching:
                return update_student_by_rl(base, batches, student, rl, clip=clips[0])
            return update_student(
                base,
                batches,
                run.unconditional,
                levels(batches),
                (student, fake_score),
                guidance_scale=run.guidance_scale,
                real_scale=real_scale(0, real.dynamic),
                rl=rl,
                clips=clips,
            )

        clips, batches = (real.student.clip, real.fake_score.clip), student_batches[0]
        rl = objective and Weighted(objective.loss, self.rl.weight)
        first = 0
        if rl and self.rl.weight_is == "matched" and not base.student_is_lora:
            self.say("first student update, whose weight is matched")
            cost.peak = cost.live
            update_by(Weighted(objective.loss, self.rl.weight, matched=True))
            first = cost.peak - held - 8 * sum(found.trained.values())  # both moments are among found.parts
        self.warm()
        cost.peak = held = cost.live - rolled
        if self.matching:
            for part in fake_batches:
                self.say("fake score")
                _, work = counted(lambda now=part: update_fake_score(base, now, levels(now), fake_score, clip=clips[1]))
                found.work["fake score"] = work / few * real.batch_size * (real.fake_updates - 1)
        self.say("student")
        _, work = counted(lambda: update_by(rl))
        inner = self.algorithm.inner_updates if self.algorithm else 1
        found.work["student"] = work / few * real.batch_size * inner
        if self.rl is not None and self.rl.algorithm == "refl":
            reward = self.reward_work(cost, objective, batches[0]) / len(batches[0].t) * real.batch_size
            found.work["reward"] += reward
            found.work["student"] -= reward
        found.update = max(first, rolling, cost.peak - held)
        found.update += self.of_all_parts(states, c, trajectories)

    def bare(self, run: Run) -> None:
        """One forward of the base without adapters, of one sample."""
        backbone = self.base.backbone
        with torch.no_grad(), self.base.use_adapter(FAKE, 0.0) as network:
            x_t = torch.empty(1, *backbone.latent_shape, device="meta")
            backbone.predict(network, x_t, torch.empty(1, device="meta"), run.unconditional)

    def of_all_parts(self, states: States, c: Conditioning, trajectories: int) -> int:
        """Bytes of states and conditioning beyond those of the few that were run: all ranks hold all that was rolled
        out, and each of them copies of its share of every batch."""
        latent, conditioning = states.x0[0, 0].nbytes, sum(each[0].nbytes for each in c.values())
        more = trajectories - states.x0.shape[1]
        batches = self.training.fake_updates if self.matching else 1
        mine = -(-self.training.batch_size // self.ranks)
        copies = batches * mine - min(batches, self.small.fake_updates) * self.few
        return more * (2 * len(states.x0) * latent + conditioning) + copies * (2 * latent + conditioning)

    def warm(self) -> None:
        """Give the optimizers their moments, as after a first step."""
        for role, parameters in self.state.networks.items():
            for parameter in parameters.values():
                parameter.grad = torch.empty_like(parameter)
            self.state.optimizers[role].step()
            self.state.optimizers[role].zero_grad()

    def build_objective(self, states: States, texts: list[str]) -> Objective:
        """An algorithm's objective; of those that choose by numbers, one that costs the same."""
        if isinstance(self.algorithm, ReFL):
            return self.algorithm.build_objective(states, texts)
        algorithm, base, path = self.algorithm, self.base, self.base.backbone.path
        algorithm.reward.score_samples(states.x0[-1], texts, algorithm.group_size)

        def loss(x0: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Figures]:
            value = log_prob(path, batch.x_t, x0, batch.t).mean()
            if self.rl.needs_reference():
                value = value - log_prob(path, batch.x_t, base.reference(batch.x_t, batch.t, batch.c), batch.t).mean()
            return value * batch.share, {}

        count = states.x0.shape[1]
        return Objective(loss, torch.arange(count // self.block * self.block).view(-1, self.block))

    def reward_work(self, cost: CostCounter, objective: Objective, batch: Batch) -> float:
        """FLOPs of ReFL's reward of one part: decoder and rewards, forward and backward."""
        x0 = batch.x0.detach().requires_grad_(True)
        before = cost.flops
        objective.loss(x0, batch)[0].backward()
        return cost.flops - before

    def share_out(self, found: StagePlan) -> None:
        """What the optimizers' steps need, what FSDP2 splits, what messages between ranks need."""
        kinds = {role: getattr(self.training, role).kind for role in found.trained}
        gradients = 4 * sum(found.trained.values())
        at_once = max(4 * count if kinds[role] == "adamw" else 0 for role, count in found.trained.items())
        found.update = max(found.update, gradients + at_once)
        if self.ranks > 1:
            found.update += 2 * 4 * min(distributed.MESSAGE, sum(found.trained.values()))
        if self.config.execution.sharding == "fsdp" and self.ranks > 1:
            blocks = self.base.backbone.network._no_split_modules
            largest = max(
                sum(p.numel() for p in each.parameters())
                for each in self.base.backbone.network.modules()
                if type(each).__name__ in blocks
            )
            split = ("teacher", "reference") if self.base.student_is_lora else tuple(found.parts)
            for name in split:
                if name not in ("autoencoder", "fake score (LoRA)", "rewards"):
                    found.parts[name] = -(-found.parts[name] // self.ranks)
            found.load = 0  # each rank loads into the host's memory and takes its rows from there
            found.update += 2 * largest * DTYPES[self.config.precision].itemsize


def count_bytes(tensors) -> int:
    """Of their memory, what they share counted once."""
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())
