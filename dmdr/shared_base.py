"""One frozen base for teacher, fake score and LoRA student: the same weights under different adapters.

1. The official demo injects one LoRA and runs it at two scales. So do we, with layers of our own. At scale 0 no adapter
   runs, so that the real score is the untouched teacher, bit for bit.
2. A LoRA starts at B = 0, and A ~ Kaiming or, with the init gaussian, A ~ N(0, 1 / rank^2), both PEFT's. The first
   step of Adam moves the network by about scale * rate * rank * std(A). So a rate carries over only with its init: the
   authors' code for text to image has gaussian, their ImageNet demo an A of unit variance.
3. In bfloat16 only the frozen weights are stored as bfloat16. Trained weights stay in float32, because a step is often
   smaller than the distance between two bfloat16 numbers; the networks see them rounded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from diffusers import ModelMixin
from torch.utils.checkpoint import checkpoint

from dmdr import distributed, losses
from dmdr.backbones.lora_targets import select_targets
from dmdr.backbones.protocol import Backbone, Conditioning
from dmdr.config.execution import AttentionKernel, Recomputation
from dmdr.config.lora import Init, LoraForms
from dmdr.errors import ConfigError, doing
from dmdr.kernels.adapters import Adapter, InUse, LoraLayer, add_lora
from dmdr.kernels.attention import use_attention
from dmdr.kernels.compiled_blocks import compile_blocks
from dmdr.kernels.recomputation import Again, Contexts, make_contexts
from dmdr.rollout import predict_guided
from dmdr.teacher.skeletons import copy_skeleton
from dmdr.teacher.start_files import KEY, StartSource
from dmdr.teacher.start_lora import read_lora
from dmdr.teacher.start_weights import turn_into_start

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of a config's precision
FAKE, STUDENT, REFERENCE = "fake_score", "student", "reference"
PLAIN = LoraForms()


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
        self.student_scale = 1.0 if student_rank is None else lora.student.scale(student_rank)  # of its LoRA
        self._alphas = {
            FAKE: lora.fake_score.scale(fake_rank),
            STUDENT: self.student_scale,
            REFERENCE: self.student_scale,
        }
        self._in_use = InUse()
        targets = select_lora_targets(backbone, lora)  # before the first adapter renames modules
        self._student_targets = targets[STUDENT]
        self.student_network = base if self.student_is_lora else copy.deepcopy(base).requires_grad_(True)
        self.reference_network: ModelMixin | None = None  # of a full student, after `keep_reference`
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._add_lora(FAKE, fake_rank, targets[FAKE], lora.fake_score.init)
            if student_rank is not None:
                self._add_lora(STUDENT, student_rank, targets[STUDENT], lora.student.init)
        if compute != torch.float32:
            backbone.compute = compute
            _cast_frozen_weights(base, compute)
        self._name_parameters()
        self._in_use.adapter = self._find_adapter(FAKE, fake_scale)

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
            modules = read_lora(source, copy_skeleton(self.backbone.network), pipeline, scale=scale)
        for name, module in modules.items():
            layer = self.backbone.network.get_submodule(name)
            down = self.student_parameters.get(f"{name}.lora_A.{STUDENT}.weight")
            up = self.student_parameters.get(f"{name}.lora_B.{STUDENT}.weight")
            if down is None or up is None or not isinstance(layer, LoraLayer) or down.shape != module.down.shape:
                raise ConfigError(f"{KEY} {source.address} adapts {name} otherwise than the student's LoRA does")
            down.copy_(module.down)
            up.copy_(module.up * (module.scale / self.student_scale))

    def _name_parameters(self) -> None:
        self.fake_parameters = _select_parameters(self.backbone.network, f".{FAKE}.")
        self.student_parameters = _select_parameters(
            self.student_network, f".{STUDENT}." if self.student_is_lora else ""
        )

    def split(self, device: str, *, group: int | None = None) -> None:
        """Split the weights of base, full student and reference over the ranks, on whose devices they go (FSDP2).

        They are those of the first rank. The others' may lie on meta, so that one rank alone has to hold all of them.

        group: how many neighbours share them; None: all ranks.

        LoRA parameters stay whole on each rank. They are few, and the frozen blocks around them then have no gradients
        to exchange.
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
        self._in_use.adapter = self._find_adapter(FAKE, self.fake_scale)  # its scale lay where the parameters lay

    def recompute_activations(
        self, what: Recomputation, around: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        """Keep only each block's input, and run the block again in the backward pass: less memory, more work.

        The result is the same bit for bit: a block runs again with the adapter and the attention of its first run.

        around: makes a context in which blocks run again.
        """
        if what == "none":
            return

        def run_block(block: torch.nn.Module, *inputs: object, attention: AttentionKernel = "auto") -> object:
            adapter = self._in_use.adapter

            def build_contexts() -> Contexts:
                keep, reuse = make_contexts(what)
                return keep, Again(lambda: run_again(reuse))

            @contextmanager
            def run_again(reuse: AbstractContextManager[object]) -> Iterator[None]:
                with self._in_use.switch(adapter), use_attention(attention), around(), reuse:
                    yield

            return checkpoint(block, *inputs, use_reentrant=False, context_fn=build_contexts)

        for network in (self.backbone.network, self.student_network):
            network.enable_gradient_checkpointing(partial(run_block, attention=self.backbone.attention))
        if what == "all":
            self.backbone.vae.enable_gradient_checkpointing(run_block)

    def compile_blocks(self, *, backend: str = "inductor") -> None:
        """Compile the blocks of all networks: after adapters, shards and the reference are there, for a copy of a
        compiled network would run the blocks of its original."""
        for network in {self.backbone.network, self.student_network, self.reference_network or self.student_network}:
            compile_blocks(network, backend=backend)

    def _add_lora(self, name: str, rank: int, targets: list[str], init: Init = "kaiming") -> None:
        add_lora(self.backbone.network, self._in_use, name, rank=rank, targets=targets, init=init)

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
    def use_adapter(self, name: str, scale: float | torch.Tensor = 1.0) -> Iterator[ModelMixin]:
        """Inside it, the base runs with this adapter alone, at this scale; scale 0 is the bare base.

        scale: of all samples, or (B,), one a sample. A backward pass needs no adapter, not even one that recomputes.
        """
        with self._in_use.switch(self._find_adapter(name, scale)):
            yield self.backbone.network

    def _find_adapter(self, name: str, scale: float | torch.Tensor) -> Adapter | None:
        """The adapter, its alpha in its scale."""
        if isinstance(scale, torch.Tensor):
            return Adapter(name, scale * self._alphas[name])
        beside = next(iter(self.fake_parameters.values()))
        return Adapter(name, beside.new_full((), scale * self._alphas[name])) if scale else None

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
        self._add_lora(REFERENCE, rank, self._student_targets)
        copies = _select_parameters(self.backbone.network, f".{REFERENCE}.")
        with torch.no_grad():
            for name, parameter in self.student_parameters.items():
                copies[name.replace(f".{STUDENT}.", f".{REFERENCE}.")].copy_(parameter).requires_grad_(False)

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
        guidance_scale: float | torch.Tensor,
        lora_scale: float,
    ) -> torch.Tensor:
        """The real score as x0, with CFG, under DynaDG's LoRA scale. One call runs cond and uncond.

        guidance_scale: of all samples, or (B, 1, 1, 1).
        """
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
        guidance_scale: float | torch.Tensor,
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
