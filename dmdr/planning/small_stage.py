"""A training stage on the meta device, put together by its own code, and the memory of what it holds all the time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch

from dmdr import distributed
from dmdr.assembly.networks import assemble
from dmdr.assembly.run import build_run
from dmdr.assembly.stage_config import StageConfig
from dmdr.backbones.protocol import Item
from dmdr.config.prompt_record import PromptRecord
from dmdr.config.rl import ReFL as ReFLConfig
from dmdr.config.run import Config
from dmdr.config.training import Training
from dmdr.draws import Run
from dmdr.metrics.verifier import load_any_reward
from dmdr.planning.cost import CostCounter
from dmdr.planning.meta import build_meta_backbone
from dmdr.planning.stage_plan import StagePlan
from dmdr.rewards.sources import list_sources
from dmdr.rl.refl import ReFL
from dmdr.shared_base import DTYPES


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


class SmallStage:
    """A small form of a training stage on meta: two parts of one rank's batch, and two updates of the fake score.

    ranks: how many share the batch. plan: with the memory of its parts.

    Raises:
        ConfigError, InputMissing, DataError: the teacher's configuration is not available.
    """

    def __init__(self, config: Config, stage: StageConfig, cost: CostCounter, *, ranks: int) -> None:
        self.config, self.stage, self.cost = config, stage, cost
        self.training, self.ranks = stage.training, ranks
        self.plan = StagePlan(
            stage.name,
            stage.training.updates,
            self.ranks,
            warmup=stage.fake_warmup,
            fake_updates=stage.training.fake_updates,
        )
        self.build()

    def build(self) -> None:
        """Build everything that the stage holds, and fill plan.parts."""
        config, plan, cost = self.config, self.plan, self.cost
        backbone = build_meta_backbone(config.teacher)
        network, vae = backbone.network, backbone.vae
        cost.hold([*network.parameters(), *network.buffers(), *vae.parameters(), *vae.buffers()])
        plan.load = cost.live
        plan.teacher = sum(each.numel() for each in network.parameters())  # before a frozen base packs them
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
        self.name_parts()

        share = math.ceil(training.batch_size / self.ranks)
        self.part = min(config.execution.micro_batch_size or share, share)
        self.small_batch = min(share, 2 * self.part)
        fake_updates = min(training.fake_updates, 2)
        self.small_training = training.model_copy(update={"batch_size": self.small_batch, "fake_updates": fake_updates})

    def name_parts(self) -> None:
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
        rewards = self.cost.live - sum(plan.parts.values())
        roles = {"student": self.training.student.kind, "fake_score": self.training.fake_score.kind}
        plan.parts["optimizers"] = sum(self.count_moments(role, kind) for role, kind in roles.items())
        plan.parts["rewards"] = rewards
        if self.stage.watch is not None and self.stage.watch.export == "best":
            plan.parts["best EMA"] = plan.parts["EMA"]
        plan.trained = {
            role: sum(parameter.numel() for parameter in self.state.trainables[role].parameters.values())
            for role in roles  # a surrogate of the rewards is too small to matter
        }

    def list_reference_parameters(self) -> list[torch.Tensor]:
        """The parameters and buffers of RL's reference, a network or a LoRA; none if RL needs no reference."""
        if self.base.reference_network is not None:
            return [*self.base.reference_network.parameters(), *self.base.reference_network.buffers()]
        return [each for name, each in self.base.backbone.network.named_parameters() if ".reference." in name]

    @property
    def decodes_in_bfloat16(self) -> bool:
        """Whether ReFL's decoder computes as the networks do."""
        return isinstance(self.stage.rl, ReFLConfig) and self.stage.rl.decoder_precision == "bfloat16"

    def list_decoder_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters of the teacher's autoencoder, and of ReFL's tiny decoder if it has one."""
        vae = [*self.base.backbone.vae.parameters()]
        if not isinstance(self.algorithm, ReFL) or not isinstance(self.algorithm.decode, partial):
            return vae
        modules = [each for each in self.algorithm.decode.args if isinstance(each, torch.nn.Module)]
        return vae + [parameter for module in modules for parameter in module.parameters()]

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

    def fill_moments(self) -> None:
        """Give the optimizers their moments, as after a first step."""
        for trainable in self.state.trainables.values():
            for parameter in trainable.parameters.values():
                parameter.grad = torch.empty_like(parameter)
            trainable.optimizer.step()
            trainable.zero_grad()

    def account_for_ranks(self) -> None:
        """Add the memory of the optimizers' steps and of messages between ranks, and divide what FSDP2 shards."""
        plan = self.plan
        kinds = {role: getattr(self.training, role).kind for role in plan.trained}
        gradients = 4 * sum(plan.trained.values())
        step_memory = max(4 * count if kinds[role] == "adamw" else 0 for role, count in plan.trained.items())
        plan.update = max(plan.update, gradients + step_memory)
        if self.ranks > 1:
            plan.update += 2 * 4 * min(distributed.MESSAGE, sum(plan.trained.values()))
        execution = self.config.execution
        if execution.sharding != "none" and self.ranks > 1:
            sharers = execution.processes if execution.sharding == "hsdp" else self.ranks
            blocks = distributed.list_blocks(self.base.backbone.network)
            largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
            split = ("teacher", "reference") if self.base.student_is_lora else tuple(plan.parts)
            for name in split:
                if name not in ("autoencoder", "fake score (LoRA)", "rewards"):
                    plan.parts[name] = -(-plan.parts[name] // sharers)
            plan.load = 0  # each rank loads into the host's memory and takes its rows from there
            plan.update += 2 * largest * DTYPES[self.config.precision].itemsize


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of memory behind these tensors. Memory that they share counts once."""
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())
