"""One frozen base for teacher, fake score and LoRA student: the same weights under different adapters.

1. The official demo injects one LoRA and runs it at two scales. We do the same with PEFT. At scale 0 the adapters are
   off, so that the real score is the untouched teacher, bit for bit.
2. A LoRA starts at B = 0, and A ~ Kaiming or, with the init gaussian, A ~ N(0, 1 / rank^2), both PEFT's. The first
   step of Adam moves the network by about scale * rate * rank * std(A). So a rate carries over only with its init: the
   authors' code for text to image has gaussian, their ImageNet demo an A of unit variance.
3. In bfloat16 only the frozen weights are stored as bfloat16. Trained weights stay in float32, because a step is often
   smaller than the distance between two bfloat16 numbers; the networks see them rounded.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from dmdr import distributed, losses
from dmdr.backbones.lora_targets import select_targets
from dmdr.backbones.protocol import Backbone, Conditioning
from dmdr.config.lora import LoraForm, LoraForms
from dmdr.errors import ConfigError, doing
from dmdr.rollout import predict_guided
from dmdr.teacher.start_files import KEY, StartSource
from dmdr.teacher.start_lora import read_lora
from dmdr.teacher.start_weights import build_skeleton, turn_into_start

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of a config's precision
FAKE, STUDENT, REFERENCE = "fake_score", "student", "reference"
PLAIN = LoraForms()


@dataclass(frozen=True)
class Adapter:
    """A LoRA of the base and the scale at which it runs. Scale 0 is the bare base."""

    name: str
    scale: float


class SharedBase:
    """The three roles of DMDR over one backbone. Only the LoRA parameters, and a full student's own copy, are trained.

    Outside of `use_adapter` the base runs as the fake score.

    Args:
        backbone: the teacher; its network gains adapters and stays frozen.
        fake_rank, fake_scale: of the fake score's LoRA.
        student_rank: of a LoRA student; None makes a full copy of the network.
        seed: of the adapters' initial values.
        compute: dtype in which the networks run; trained weights are float32.
        lora: what the LoRAs adapt, how they begin, and the student's alpha.

    Raises:
        ConfigError: a LoRA would adapt a module that the network does not have.
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
        lora: LoraForms = PLAIN,
    ) -> None:
        self.backbone, self.fake_scale = backbone, fake_scale
        base = backbone.network
        self.student_is_lora = student_rank is not None
        self._student_form = lora.student
        self.student_scale = 1.0 if student_rank is None else lora.student.scale(student_rank)  # of its LoRA
        targets = select_lora_targets(backbone, lora)  # before the first adapter renames modules
        self._student_targets = targets[STUDENT]
        self.student_network = base if self.student_is_lora else copy.deepcopy(base).requires_grad_(True)
        self.reference_network: ModelMixin | None = None  # of a full student, after `keep_reference`
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._add_lora(FAKE, fake_rank, lora.fake_score, targets[FAKE])
            if student_rank is not None:
                self._add_lora(STUDENT, student_rank, lora.student, targets[STUDENT])
        if compute != torch.float32:
            backbone.compute = compute
            _cast_frozen_weights(base, compute)
        self._layers = [module for module in base.modules() if isinstance(module, LoraLayer)]
        self._name_parameters()
        self._switch_to(Adapter(FAKE, fake_scale))

    @torch.no_grad()
    def begin_at(self, source: StartSource, *, scale: float) -> None:
        """Give the student the weights of a start: before `split`, and before a reference is kept.

        A LoRA student goes on with the start's LoRA. Where the scales of the two differ, `up` takes up the difference,
        so that the function is the start's. Modules that the start does not adapt begin as new ones do, at 0.

        Raises:
            ConfigError: a LoRA does not have the student's rank or modules.
            DataError: the start is of another model.
        """
        pipeline = type(self.backbone.pipe)
        if not self.student_is_lora:
            turn_into_start(self.student_network, source, pipeline, scale=scale)
            return
        with doing(f"loading the start {source.address}"):
            modules = read_lora(source, build_skeleton(self.backbone.network), pipeline, scale=scale)
        for name, module in modules.items():
            layer = self.backbone.network.get_submodule(name)
            down = self.student_parameters.get(f"{name}.lora_A.{STUDENT}.weight")
            up = self.student_parameters.get(f"{name}.lora_B.{STUDENT}.weight")
            if down is None or up is None or not isinstance(layer, LoraLayer) or down.shape != module.down.shape:
                raise ConfigError(f"{KEY} {source.address} adapts {name} otherwise than the student's LoRA does")
            own = layer.lora_alpha[STUDENT] / layer.r[STUDENT]
            down.copy_(module.down)
            up.copy_(module.up * (module.scale / own))

    def _name_parameters(self) -> None:
        self.fake_parameters = _select_parameters(self.backbone.network, f".{FAKE}.")
        self.student_parameters = _select_parameters(
            self.student_network, f".{STUDENT}." if self.student_is_lora else ""
        )
        self._trained_lora = list(self.fake_parameters.values())
        if self.student_is_lora:
            self._trained_lora += self.student_parameters.values()

    def split(self, device: str, *, group: int | None = None) -> None:
        """Split the weights of base, full student and reference over the ranks, on whose devices they go (FSDP2).

        group: how many neighbours share them; None: all ranks.

        LoRA parameters stay whole on each rank. They are few, PEFT switches them on and off between forwards that still
        wait for their backward pass, and the frozen blocks around them then have no gradients to exchange.
        """
        networks = [self.backbone.network]
        if not self.student_is_lora:
            networks.append(self.student_network)
        if self.reference_network is not None:
            networks.append(self.reference_network)
        for network in networks:
            adapters = {parameter for name, parameter in network.named_parameters() if ".lora_" in name}
            distributed.shard_network(network, device, whole=adapters, group=group, compute=self.backbone.compute)
        self.backbone.vae.to(device)  # type: ignore[arg-type]  # diffusers' wrapper hides that `to` is a method
        self._name_parameters()

    def recompute_activations(self, checkpoint: Callable[..., object] | None = None) -> None:
        """Keep only each block's input, and run the block again in the backward pass: less memory, a third more work.

        The decoder that ReFL's gradient goes through does so too. The result is the same bit for bit.

        checkpoint: (block, its inputs) -> its outputs; runs a block that runs again later. None: torch's own.
        """
        for network in (self.backbone.network, self.student_network, self.backbone.vae):
            network.enable_gradient_checkpointing(checkpoint)

    def _add_lora(self, name: str, rank: int, form: LoraForm, targets: list[str]) -> None:
        config = LoraConfig(
            r=rank,
            lora_alpha=rank if form.alpha is None else form.alpha,  # type: ignore[arg-type]  # any number will do
            target_modules=targets,
            init_lora_weights="gaussian" if form.init == "gaussian" else True,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # we want several adapters on one base
            self.backbone.network.add_adapter(config, adapter_name=name)

    def to_diffusers(self, role: str, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A role's parameters as others load them: a LoRA under diffusers' names, a full student with its buffers.

        The student's alpha is multiplied into B, so that whoever loads the LoRA need not know it.
        """
        if role == STUDENT and not self.student_is_lora:
            return {**self.student_network.state_dict(), **values}
        renamed = {name.replace(f".{role}.", "."): value for name, value in values.items()}
        return scale_lora(renamed, self.student_scale if role == STUDENT else 1.0)

    def from_diffusers(self, role: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of `to_diffusers`."""
        if role == STUDENT and not self.student_is_lora:
            buffers = {name for name, _ in self.student_network.named_buffers()}
            return {name: value for name, value in weights.items() if name not in buffers}
        return {
            name.replace(".lora_A.", f".lora_A.{role}.").replace(".lora_B.", f".lora_B.{role}."): value
            for name, value in scale_lora(weights, 1 / self.student_scale if role == STUDENT else 1.0).items()
        }

    @contextmanager
    def use_adapter(self, name: str, scale: float = 1.0) -> Iterator[ModelMixin]:
        """Inside it, the base runs with this adapter alone, at this scale; scale 0 is the bare base.

        A backward pass that recomputes activations needs the adapter of its forward pass again.
        """
        before, adapter = self._adapter, Adapter(name, scale)
        if adapter != before:
            self._switch_to(adapter)
        try:
            yield self.backbone.network
        finally:
            if adapter != before:
                self._switch_to(before)

    def _switch_to(self, adapter: Adapter) -> None:
        enable = adapter.scale != 0
        for layer in self._layers:
            if layer.disable_adapters == enable:  # it is in the other state
                layer.enable_adapters(enable)
            if enable:
                layer.set_adapter(adapter.name)
                layer.set_scale(adapter.name, adapter.scale)
        self._adapter = adapter
        # PEFT stops the gradients of the other adapters, but a graph that was built before may still reach them
        for parameter in self._trained_lora:
            parameter.requires_grad_(True)

    def student(self, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        """The student's x0 (B, C, H, W)."""
        if not self.student_is_lora:
            return self.backbone.predict_x0(self.student_network, x_t, t, c)
        with self.use_adapter(STUDENT) as network:
            return self.backbone.predict_x0(network, x_t, t, c)

    def keep_reference(self) -> None:
        """Freeze a copy of the student as it is now: the reference of RL from here on."""
        if not self.student_is_lora:
            self.reference_network = copy.deepcopy(self.student_network).requires_grad_(False)
            if self.backbone.compute != torch.float32:
                _cast_frozen_weights(self.reference_network, self.backbone.compute)
            return
        rank = next(iter(self.student_parameters.values())).shape[0]
        self._add_lora(REFERENCE, rank, self._student_form, self._student_targets)
        copies = _select_parameters(self.backbone.network, f".{REFERENCE}.")
        with torch.no_grad():
            for name, parameter in self.student_parameters.items():
                copies[name.replace(f".{STUDENT}.", f".{REFERENCE}.")].copy_(parameter)
        self._switch_to(self._adapter)  # PEFT switched to the new adapter

    @torch.no_grad()
    def reference(self, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        """The reference's x0 (B, C, H, W)."""
        if self.student_is_lora:
            with self.use_adapter(REFERENCE) as network:
                return self.backbone.predict_x0(network, x_t, t, c)
        assert self.reference_network is not None, "keep_reference comes first"
        return self.backbone.predict_x0(self.reference_network, x_t, t, c)

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
        """The real score as x0, with CFG, under DynaDG's LoRA scale. One call runs cond and uncond."""
        with self.use_adapter(FAKE, lora_scale) as network:
            prediction = predict_guided(self.backbone, network, x_t, t, c, unconditional, guidance_scale)
        return self.backbone.path.to_x0(x_t, prediction, t)

    @torch.no_grad()
    def decoupled_real_x0(
        self,
        matched: tuple[torch.Tensor, torch.Tensor],
        guided: tuple[torch.Tensor, torch.Tensor],
        c: Conditioning,
        unconditional: Conditioning,
        *,
        guidance_scale: float,
        lora_scale: float,
    ) -> torch.Tensor:
        """The real score as x0, its CFG taken at x_t and t of its own: one forward more than `real_x0`.

        matched, guided: x_t and t of the matching part and of the CFG part.
        """
        backbone, (x_DM, t_DM), (x_CA, t_CA) = self.backbone, matched, guided
        both = {key: torch.cat([value, unconditional[key].expand_as(value)]) for key, value in c.items()}
        with self.use_adapter(FAKE, lora_scale) as network:
            x0_DM = backbone.predict_x0(network, x_DM, t_DM, c)
            x0_CA = backbone.predict_x0(network, torch.cat([x_CA, x_CA]), torch.cat([t_CA, t_CA]), both)
        with_prompt, without_prompt = x0_CA.chunk(2)
        return losses.decouple_real_score(x0_DM, with_prompt, without_prompt, guidance_scale)


def select_lora_targets(backbone: Backbone, lora: LoraForms) -> dict[str, list[str]]:
    """Role -> the modules that its LoRA adapts, of a network without adapters.

    Raises:
        ConfigError: the network does not have one of them.
    """
    forms = {FAKE: lora.fake_score, STUDENT: lora.student}
    return {
        role: select_targets(
            backbone.network,
            form.targets,
            attention=backbone.lora_targets,
            wide=backbone.wide_targets,
            key=f"{role}.lora_targets",
        )
        for role, form in forms.items()
    }


def scale_lora(weights: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    """A LoRA whose product B A is `factor` times as large."""
    if factor == 1:
        return weights
    return {name: value.detach() * factor if ".lora_B." in name else value for name, value in weights.items()}


def _select_parameters(network: torch.nn.Module, part: str) -> dict[str, torch.nn.Parameter]:
    """The parameters whose names contain `part`."""
    return {name: parameter for name, parameter in network.named_parameters() if part in name}


def _cast_frozen_weights(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen weights of a network; adapters and buffers stay as they are."""
    for name, parameter in network.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.to(dtype)
