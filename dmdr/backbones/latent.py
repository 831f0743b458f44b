"""What every family does alike: hold a frozen pipeline, predict x0, turn latents into images, fix the images' size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging

from dmdr.backbones.protocol import Conditioning
from dmdr.errors import DataError
from dmdr.path import FlowPath, Path


class Latent:
    """A diffusers pipeline as the method sees it. Frozen; on the device of its network.

    Args:
        channels: of a latent.
        side: of a latent, where no resolution is asked for.
        multiple: the latent sides that the network takes.
        resolution: of the images, in pixels a side.

    Raises:
        DataError: the family has no images of that resolution.
    """

    path: Path
    plain_guidance = 1.0  # the guidance_scale at which the family's pipeline runs no guidance
    compute = torch.float32  # in which the networks run; bfloat16 leaves weights, times and latents as they are
    guidance_is_input = False  # guidance was distilled into the network, which takes the scale; CFG is not run

    def __init__(
        self,
        pipe: DiffusionPipeline,
        network: torch.nn.Module,
        *,
        channels: int,
        side: int,
        multiple: int,
        resolution: int | None,
    ) -> None:
        self.pipe, self.network = pipe, network.requires_grad_(False).eval()
        pipe.vae.requires_grad_(False).eval()
        pixels = pipe.vae_scale_factor
        if resolution is not None and resolution % (pixels * multiple):
            raise DataError(
                f"teacher.resolution {resolution} is not a multiple of {pixels * multiple}, as this teacher needs; the "
                f"nearest is {max(1, round(resolution / pixels / multiple)) * pixels * multiple}"
            )
        side = side if resolution is None else resolution // pixels
        self.latent_shape, self.resolution = (channels, side, side), side * pixels

    def predict(self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        """The raw prediction of `network`, like x_t (B, C, H, W) and in its dtype, in which all arithmetic outside of
        networks is done."""
        if self.compute == torch.float32:
            return self._predict(network, x_t, t, c)
        with torch.autocast(x_t.device.type, self.compute):  # left after each call: its casts are of these weights
            return self._predict(network, x_t, t, c).to(x_t.dtype)

    def predict_x0(self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        return self.path.to_x0(x_t, self.predict(network, x_t, t, c), t)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decode_by(self.pipe.vae, latents)

    @staticmethod
    def decode_by(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
        """`decode` by another autoencoder of the same latents."""
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)

    def student_timesteps(self, steps: int) -> torch.Tensor:
        scheduler = self.student_scheduler(steps)
        return self.student_times(steps)[:-1] * scheduler.config.num_train_timesteps

    def to_pipeline(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, H, W) as the family's pipeline takes them."""
        return latents

    def from_pipeline(self, latents: torch.Tensor) -> torch.Tensor:
        """The reverse of `to_pipeline`."""
        return latents


class Shifted(Latent):
    """Flow matching whose pipeline hands the scheduler 1, 1 - 1 / N, ..., 1 / N, to be shifted."""

    path = FlowPath()

    @property
    def mu(self) -> float:
        """What the pipeline hands a scheduler with dynamic shifting: linear in the number of image tokens."""
        config, tokens = self.pipe.scheduler.config, (self.latent_shape[1] // 2) * (self.latent_shape[2] // 2)
        few, many = config.base_image_seq_len, config.max_image_seq_len
        return config.base_shift + (config.max_shift - config.base_shift) * (tokens - few) / (many - few)

    @property
    def shift(self) -> float:
        """s of t -> s t / (1 + (s - 1) t)."""
        config = self.pipe.scheduler.config
        if not config.use_dynamic_shifting:
            return config.shift
        return math.exp(self.mu) if config.time_shift_type == "exponential" else self.mu

    def _times(self, scheduler: FlowMatchEulerDiscreteScheduler, steps: int) -> torch.Tensor:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=self.mu)
        return scheduler.sigmas

    def teacher_times(self, steps: int) -> torch.Tensor:
        return self._times(FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config), steps)

    def student_times(self, steps: int) -> torch.Tensor:
        return self._times(self.student_scheduler(steps), steps)

    def student_scheduler(self, steps: int) -> FlowMatchEulerDiscreteScheduler:
        """Predict x0, renoise with fresh noise to the next time (stochastic_sampling); any number of steps."""
        return FlowMatchEulerDiscreteScheduler(shift=self.shift, stochastic_sampling=True)


@contextmanager
def unheard() -> Iterator[None]:
    """Without diffusers' warnings: of each prompt that it cuts (the count is reported instead), of float32 given as
    float32, of text encoders that a LoRA leaves alone."""
    logger = logging.get_logger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
