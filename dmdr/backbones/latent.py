"""What every family shares: it holds a frozen pipeline, predicts x0, decodes latents and fixes the images' size."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.utils import logging

from dmdr.backbones.lora_targets import list_linears
from dmdr.backbones.protocol import Autoencoder, Conditioning, Item, StudentScheduler, TimesArguments, Unconditional
from dmdr.config.execution import AttentionKernel
from dmdr.config.few_steps import FewSteps
from dmdr.errors import ConfigError, DataError
from dmdr.kernels.attention import use_attention
from dmdr.path import FlowPath, Path

TIMESTEPS = 1000.0  # a flow network is told t * 1000, or what its own pipeline makes of that
Pipe = TypeVar("Pipe", bound=DiffusionPipeline)
Network = TypeVar("Network", bound=ModelMixin)


class LatentBackbone(ABC, Generic[Pipe, Network]):
    """A diffusers pipeline as the method sees it. It is frozen and lies on its network's device.

    Args:
        pipe: the teacher's own pipeline.
        network: its transformer or UNet.
        channels: number of channels of a latent.
        side: side of a latent if `resolution` is None, as the network's config has it: one number or two, or None.
        multiple: the network takes latents whose side is a multiple of it.
        resolution: side of the images in pixels.

    Raises:
        DataError: the network is not one of text to image, or the family cannot draw images of that resolution.
    """

    family: str
    path: Path
    lora_targets: tuple[str, ...]
    blocks: tuple[str, ...] = ()  # the network's lists of blocks, whose linear layers `wide_targets` are
    latent_shape: tuple[int, int, int]
    smallest: int
    plain_guidance = 1.0
    compute = torch.float32
    attention: AttentionKernel = "auto"
    decoded_at_once: int | None = None
    guidance_is_input = False
    fixed_tokens = True

    def __init__(
        self,
        pipe: Pipe,
        network: Network,
        *,
        channels: int,
        side: int | list[int] | None,
        multiple: int,
        resolution: int | None,
    ) -> None:
        self.pipe = pipe
        self.network = network
        _check_autoencoder(pipe.vae, channels)
        for module in (network, self.vae):
            module.requires_grad_(False).eval()
        pixels: int = pipe.vae_scale_factor
        if resolution is not None and resolution % (pixels * multiple):
            raise DataError(
                f"teacher.resolution {resolution} is not a multiple of {pixels * multiple}, as this teacher needs; the "
                f"nearest is {max(1, round(resolution / pixels / multiple)) * pixels * multiple}"
            )
        if resolution is None:
            resolution = _read_side(side) * pixels
        self.smallest = pixels * multiple
        self.latent_shape = (channels, resolution // pixels, resolution // pixels)
        self.resolution = resolution

    def check_resolution(self) -> None:
        """Check that the network can draw images of this size; some know only so many positions.

        Raises:
            DataError: it cannot.
        """

    @property
    def wide_targets(self) -> tuple[str, ...]:
        return list_linears(self.network, self.blocks)

    def check_unconditional(self, kind: Unconditional) -> None:
        if kind != "pipeline" and self.guidance_is_input:
            raise ConfigError(
                f"teacher.unconditional is {kind}, but this teacher's network takes the guidance scale as an input and "
                "runs no half without a prompt; drop it"
            )

    def encode_unconditional(self, kind: Unconditional) -> Item:
        """The row of the empty prompt; of most families the pipeline encodes the empty text."""
        self.check_unconditional(kind)
        return self.blank() if kind == "zeros" else self.encode([""])[0][0]

    @property
    def vae(self) -> AutoencoderKL:
        return self.pipe.vae

    @abstractmethod
    def _predict(self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        """The network's raw prediction, whatever its dtype."""

    @abstractmethod
    def encode(self, prompts: list[str]) -> tuple[list[Item], int]: ...

    @abstractmethod
    def blank(self) -> Item: ...

    @abstractmethod
    def student_times(self, few: FewSteps) -> torch.Tensor: ...

    @abstractmethod
    def student_scheduler(self, few: FewSteps) -> StudentScheduler: ...

    def check_student(self, few: FewSteps) -> None:
        """Check that the network can be told the student's times.

        Raises:
            ConfigError: it cannot.
        """

    def student_arguments(self, few: FewSteps) -> TimesArguments:
        return TimesArguments() if few.timesteps is None else TimesArguments(sigmas=list_sigmas(few))

    def predict(self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        """The raw prediction of `network`, shaped as x_t (B, C, H, W) and in its dtype: all arithmetic outside of the
        networks stays in that dtype."""
        with use_attention(self.attention):
            if self.compute == torch.float32:
                return self._predict(network, x_t, t, c)
            # autocast keeps its casts of the weights until it is left, and the weights change between two calls
            with torch.autocast(x_t.device.type, self.compute):
                return self._predict(network, x_t, t, c).to(x_t.dtype)

    def predict_x0(self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        return self.path.to_x0(x_t, self.predict(network, x_t, t, c), t)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decode_by(self.vae, latents)

    @staticmethod
    def decode_by(vae: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
        scaling: float = vae.config["scaling_factor"]
        shift: float = vae.config["shift_factor"] or 0.0
        images: torch.Tensor = vae.decode(latents.to(vae.dtype) / scaling + shift).sample
        return (images / 2 + 0.5).clamp(0, 1)

    def student_timesteps(self, few: FewSteps) -> torch.Tensor:
        timesteps: int = self.student_scheduler(few).config["num_train_timesteps"]
        return self.student_times(few)[:-1] * timesteps

    def to_pipeline(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def from_pipeline(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def _check_autoencoder(vae: AutoencoderKL, channels: int) -> None:
    """Raises DataError if the latents are not those of the network, or are normalised in a way that we do not know."""
    config = vae.config
    if config["latent_channels"] != channels:
        raise DataError(
            f"teacher's network takes {channels} channels, but the latents of its VAE have "
            f"{config['latent_channels']}; a model for inpainting, editing or control is no text-to-image teacher: "
            "give another"
        )
    if config["in_channels"] != 3 or config["out_channels"] != 3:
        raise DataError("teacher's VAE is not one of RGB images (in_channels, out_channels); give another teacher")
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise DataError(
            "teacher's VAE has latents_mean and latents_std, which DMDR does not know; give another teacher"
        )
    if not isinstance(config["scaling_factor"], (int, float)) or not config["scaling_factor"]:
        raise DataError(f"teacher's VAE has scaling_factor {config['scaling_factor']!r}; fetch the teacher again")


def _read_side(side: int | list[int] | tuple[int, ...] | None) -> int:
    """The side of a latent that a network's sample_size gives. Raises DataError if it gives none, or two."""
    sides = {*side} if isinstance(side, (list, tuple)) else {side}
    found = sides.pop() if len(sides) == 1 else None
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise DataError(
            f"teacher's network has sample_size {side!r}, which gives no side of a square image; set teacher.resolution"
        )
    return found


def compute_shift(scheduler: FlowMatchEulerDiscreteScheduler, mu: float) -> float:
    """s of t -> s t / (1 + (s - 1) t). mu: what the pipeline gives a scheduler with dynamic shifting."""
    config = scheduler.config
    if not config["use_dynamic_shifting"]:
        return float(config["shift"])
    return math.exp(mu) if config["time_shift_type"] == "exponential" else mu


def compute_mu(scheduler: FlowMatchEulerDiscreteScheduler, tokens: int) -> float:
    """What pipelines give a scheduler with dynamic shifting: linear in the number of image tokens."""
    few, many, least, most = (
        float(scheduler.config[key]) for key in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    )
    return least + (most - least) * (tokens - few) / (many - few)


def list_sigmas(few: FewSteps) -> list[float]:
    """A flow student's own timesteps as diffusers' pipelines take them."""
    return [timestep / TIMESTEPS for timestep in few.timesteps or ()]


def build_flow_scheduler(
    few: FewSteps, shift: float, *, shift_terminal: float | None = None
) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a flow student: Euler steps, or, with eta 1, x0 renoised with fresh noise.

    shift: of its times. With timesteps of its own, the pipeline's call names them, and the scheduler keeps them.
    """
    if few.timesteps is not None:
        return FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=few.is_stochastic)
    return FlowMatchEulerDiscreteScheduler(
        shift=shift, shift_terminal=shift_terminal, stochastic_sampling=few.is_stochastic
    )


class ShiftedFlowBackbone(LatentBackbone[Pipe, Network]):
    """Flow matching whose pipeline gives the scheduler the times 1, 1 - 1 / N, ..., 1 / N, which the latter shifts."""

    path = FlowPath()

    @property
    def mu(self) -> float:
        return compute_mu(self.pipe.scheduler, (self.latent_shape[1] // 2) * (self.latent_shape[2] // 2))

    @property
    def shift(self) -> float:
        return compute_shift(self.pipe.scheduler, self.mu)

    def _times(self, scheduler: FlowMatchEulerDiscreteScheduler, sigmas: list[float]) -> torch.Tensor:
        scheduler.set_timesteps(sigmas=sigmas, mu=self.mu)
        return scheduler.sigmas

    def teacher_times(self, steps: int) -> torch.Tensor:
        return self._times(FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config), _space(steps))

    def student_times(self, few: FewSteps) -> torch.Tensor:
        return self._times(self.student_scheduler(few), list_sigmas(few) or _space(few.steps))

    def student_scheduler(self, few: FewSteps) -> FlowMatchEulerDiscreteScheduler:
        """Without timesteps of its own it draws any number of steps."""
        return build_flow_scheduler(few, few.shift or self.shift)


def _space(steps: int) -> list[float]:
    """The times that the pipelines give their scheduler."""
    spaced: list[float] = np.linspace(1.0, 1 / steps, steps).tolist()
    return spaced


@contextmanager
def silence_diffusers() -> Iterator[None]:
    """Suppress diffusers' warnings: of each prompt that it cuts (we report their number), of float32 converted to
    float32, of text encoders that a LoRA does not change."""
    logger = logging.get_logger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
