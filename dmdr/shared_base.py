"""One frozen base for teacher, fake score and LoRA student: the same weights under different adapters.

1. The official demo injects one LoRA and runs it at two scales; so do we, with PEFT. At scale 0 the adapters are
   switched off, so that the real score is the untouched teacher, bit for bit.
2. PEFT starts a LoRA at B = 0 and A ~ Kaiming, not at unit variance: learning rates of the demo do not carry over.
3. In bfloat16 only what is frozen is stored so. What is trained stays in float32, whose steps are often smaller than
   bfloat16 can tell apart; the networks see it rounded.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from dmdr import distributed
from dmdr.backbones.protocol import Backbone, Conditioning
from dmdr.rollout import predict_guided

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of a config's precision
FAKE, STUDENT, REFERENCE = "fake_score", "student", "reference"


class SharedBase:
    """The three roles of DMDR over one backbone. Only the LoRA parameters, and a full student's own copy, are trained.

    Args:
        backbone: the teacher; its network gains adapters and stays frozen.
        fake_rank, fake_scale: of the fake score's LoRA.
        student_rank: of a LoRA student; None makes a full copy of the network.
        seed: of the adapters' initial values.
        compute: dtype in which the networks run; what is trained is float32.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        fake_rank: int,
        fake_scale: float,
        student_rank: int | None,
        seed: int,
        compute: torch.dtype = torch.float32,
    ) -> None:
        self.backbone, self.fake_scale = backbone, fake_scale
        base = backbone.network
        self.student_network = copy.deepcopy(base).requires_grad_(True) if student_rank is None else base
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._add_lora(FAKE, fake_rank)
            if student_rank is not None:
                self._add_lora(STUDENT, student_rank)
        if compute != torch.float32:
            backbone.compute = compute
            _store_in(base, compute)
        self._layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
        self.student_is_lora, self.reference_network = student_rank is not None, None
        self._name_parameters()

    def _name_parameters(self) -> None:
        self.fake_parameters = self._named(self.backbone.network, f".{FAKE}.")
        self.student_parameters = self._named(self.student_network, f".{STUDENT}." if self.student_is_lora else "")

    def split(self, device: str) -> None:
        """Split the weights of base, full student and reference over the ranks, on whose devices they go (FSDP2).

        LoRA parameters stay whole on each rank: they are few, PEFT switches them on and off between forwards that wait
        for their backward pass, and the frozen blocks around them have then no gradients to exchange.
        """
        for network in {self.backbone.network, self.student_network, self.reference_network} - {None}:
            adapters = {parameter for name, parameter in network.named_parameters() if ".lora_" in name}
            distributed.shard_network(network, device, whole=adapters, compute=self.backbone.compute)
        self.backbone.pipe.vae.to(device)
        self._name_parameters()

    def recompute_activations(self) -> None:
        """Keep only what enters each block, and run the block again in the backward pass: memory for a third more work.

        The decoder that ReFL's gradient goes through does so too. The result is the same bit for bit.
        """
        for network in (self.backbone.network, self.student_network, self.backbone.pipe.vae):
            network.enable_gradient_checkpointing()

    def _add_lora(self, name: str, rank: int) -> None:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(self.backbone.lora_targets))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters on one base are the point
            self.backbone.network.add_adapter(config, adapter_name=name)

    @staticmethod
    def _named(network: torch.nn.Module, part: str) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in network.named_parameters() if part in name}

    def to_diffusers(self, role: str, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parameters as others load them: a LoRA under diffusers' names, a full student with its buffers."""
        if role == STUDENT and not self.student_is_lora:
            return {**self.student_network.state_dict(), **values}
        return {name.replace(f".{role}.", "."): value for name, value in values.items()}

    def from_diffusers(self, role: str, portable: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The reverse of `portable`."""
        if role == STUDENT and not self.student_is_lora:
            buffers = {name for name, _ in self.student_network.named_buffers()}
            return {name: value for name, value in portable.items() if name not in buffers}
        return {
            name.replace(".lora_A.", f".lora_A.{role}.").replace(".lora_B.", f".lora_B.{role}."): value
            for name, value in portable.items()
        }

    @contextmanager
    def use_adapter(self, adapter: str, scale: float = 1.0) -> Iterator[torch.nn.Module]:
        """The base with one adapter on, at one scale; scale 0 is the bare base. Needed again around a backward pass
        that recomputes activations."""
        for layer in self._layers:
            layer.enable_adapters(scale != 0)
            if scale != 0:
                layer.set_adapter(adapter)
                layer.set_scale(adapter, scale)
        yield self.backbone.network

    def student(self, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        """The student's x0 (B, C, H, W)."""
        if not self.student_is_lora:
            return self.backbone.predict_x0(self.student_network, x_t, t, c)
        with self.use_adapter(STUDENT) as network:
            return self.backbone.predict_x0(network, x_t, t, c)

    def keep_reference(self) -> None:
        """Freeze the student as it is now: the reference of RL from here on."""
        if not self.student_is_lora:
            self.reference_network = copy.deepcopy(self.student_network).requires_grad_(False)
            if self.backbone.compute != torch.float32:
                _store_in(self.reference_network, self.backbone.compute)
            return
        rank = next(iter(self.student_parameters.values())).shape[0]
        self._add_lora(REFERENCE, rank)
        kept = self._named(self.backbone.network, f".{REFERENCE}.")
        with torch.no_grad():
            for name, parameter in self.student_parameters.items():
                kept[name.replace(f".{STUDENT}.", f".{REFERENCE}.")].copy_(parameter)

    @torch.no_grad()
    def reference(self, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        """The reference's x0 (B, C, H, W)."""
        if not self.student_is_lora:
            return self.backbone.predict_x0(self.reference_network, x_t, t, c)
        with self.use_adapter(REFERENCE) as network:
            return self.backbone.predict_x0(network, x_t, t, c)

    def fake(self, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        """The fake score's raw prediction, with a graph to its LoRA."""
        with self.use_adapter(FAKE, self.fake_scale) as network:
            return self.backbone.predict(network, x_t, t, c)

    @torch.no_grad()
    def real_x0(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        c: Conditioning,
        unconditional: Conditioning,
        *,
        guidance_scale: float,
        lora_scale: float,
    ) -> torch.Tensor:
        """The real score as x0, with CFG, under DynaDG's LoRA scale; cond and uncond are one call."""
        with self.use_adapter(FAKE, lora_scale) as network:
            prediction = predict_guided(self.backbone, network, x_t, t, c, unconditional, guidance_scale)
        return self.backbone.path.to_x0(x_t, prediction, t)


def _store_in(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """Turn the frozen weights of a network into `dtype`; adapters and buffers stay as they are."""
    for name, parameter in network.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.to(dtype)
