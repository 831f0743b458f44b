"""What the method needs of a model family. A new family is one file here and one line in `dmdr/teacher/load.py`."""

from __future__ import annotations

from typing import Literal, Protocol, TypedDict

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    ModelMixin,
)

from dmdr.config.execution import AttentionKernel
from dmdr.config.few_steps import FewSteps
from dmdr.path import Path

Item = dict[str, torch.Tensor]  # one prompt's conditioning without padding; a tensor's first dimension is its length
Conditioning = dict[str, torch.Tensor]  # a batch of items, batch dimension first
StudentScheduler = FlowMatchEulerDiscreteScheduler | LCMScheduler | DDIMScheduler | EulerDiscreteScheduler
Autoencoder = AutoencoderKL | AutoencoderTiny
Unconditional = Literal["pipeline", "encoded", "zeros"]  # teacher.unconditional of a config


class TimesArguments(TypedDict, total=False):
    """What a pipeline's call needs besides num_inference_steps where the scheduler cannot know a student's times."""

    sigmas: list[float]
    timesteps: list[int]


class Backbone(Protocol):
    """A teacher's network with the conventions of its family."""

    family: str
    latent_shape: tuple[int, int, int]  # C, H, W
    resolution: int  # side of the images in pixels
    smallest: int  # the side of the smallest image that the network takes; others are multiples of it
    lora_targets: tuple[str, ...]  # names of the modules that a LoRA of the preset attention adapts
    guidance_is_input: bool  # the network takes the guidance scale, as "guidance" (B,) of its conditioning; no CFG
    plain_guidance: float  # the guidance_scale at which the family's own pipeline runs no guidance
    compute: torch.dtype  # in which the networks run; weights, times and latents keep their own dtype
    attention: AttentionKernel  # of the networks
    decoded_at_once: int | None  # the most images that are decoded together for a gradient; None: any number
    fixed_tokens: bool  # the blocks see as many tokens in every batch, whatever its prompts

    def __init__(self, pipe: DiffusionPipeline, resolution: int | None = None) -> None:
        """Freeze a pipeline of the family. resolution: side of the images in pixels; None: the family's own."""

    @property
    def pipe(self) -> DiffusionPipeline:
        """The teacher's own pipeline, frozen."""

    @property
    def network(self) -> ModelMixin:
        """The frozen transformer or UNet of `pipe`."""

    @property
    def vae(self) -> AutoencoderKL:
        """The frozen autoencoder of `pipe`."""

    @property
    def path(self) -> Path:
        """How the family mixes data and noise, and what its network predicts."""

    def check_resolution(self) -> None:
        """Check that the network can draw images of this size; raises DataError if it cannot."""

    @property
    def wide_targets(self) -> tuple[str, ...]:
        """Names of the modules that a LoRA of the preset wide adapts, of a network without adapters."""

    def check_unconditional(self, kind: Unconditional) -> None:
        """Check that the family has this kind of a row without a prompt; raises ConfigError if it has not."""

    def encode(self, prompts: list[str]) -> tuple[list[Item], int]:
        """Encode prompts as the family's own pipeline does, without the padding that `collate` can rebuild.

        The empty prompt stands for no prompt: it gives what the pipeline uses as the unconditional half of CFG.
        Returns the items and how many prompts were longer than the encoder reads.
        """

    def count_truncated(self, prompts: list[str]) -> int:
        """How many prompts are longer than the encoder reads."""

    def encode_unconditional(self, kind: Unconditional) -> Item:
        """The item of the unconditional half of CFG: what the pipeline takes, the empty text encoded, or zeros."""

    def collate(self, items: list[Item]) -> Conditioning:
        """Combine items into one batch on the network's device."""

    def blank(self) -> Item:
        """Zeros in the shape of a typical prompt's conditioning, for a plan, which needs shapes but no prompts."""

    def predict(self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        """The raw prediction of `network` (velocity or noise), shaped as x_t (B, C, H, W); t (B,) in [0, 1]."""

    def predict_x0(self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        """`predict`, which the path turns into x0."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents (B, C, H, W) to images (B, 3, h, w) in [0, 1], differentiably."""

    def decode_by(self, vae: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
        """`decode` with another autoencoder of the same latents."""

    def teacher_times(self, steps: int) -> torch.Tensor:
        """(steps + 1,) times at which the teacher's own scheduler samples, descending to 0."""

    def check_student(self, few: FewSteps) -> None:
        """Check that the network can be told these times; raises ConfigError if it cannot."""

    def student_times(self, few: FewSteps) -> torch.Tensor:
        """(steps + 1,) student_timesteps and a final 0: exactly what the exported scheduler gives diffusers."""

    def student_timesteps(self, few: FewSteps) -> torch.Tensor:
        """(steps,) the times at which the student predicts, in the units of the exported scheduler."""

    def student_scheduler(self, few: FewSteps) -> StudentScheduler:
        """The scheduler of the exported pipeline."""

    def student_arguments(self, few: FewSteps) -> TimesArguments:
        """What the exported pipeline's call needs besides the number of steps; mostly nothing."""

    def to_pipeline(self, latents: torch.Tensor) -> torch.Tensor:
        """Turn latents (B, C, H, W) into the layout of the family's own pipeline."""

    def from_pipeline(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_pipeline`."""

    def build_student_pipeline(self, network: torch.nn.Module, few: FewSteps) -> DiffusionPipeline:
        """The teacher's pipeline with `network` and the student's scheduler."""
