"""Model families behind one small protocol. A new family is one file here and one line in `dmdr.teacher`."""

from __future__ import annotations

from typing import Protocol

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from dmdr.path import Path

Item = dict[str, torch.Tensor]  # one prompt's conditioning, unpadded: each tensor's first dimension is its own
Conditioning = dict[str, torch.Tensor]  # a batch of them, batch first


class Backbone(Protocol):
    """A teacher's network with the conventions of its family."""

    family: str
    path: Path
    network: torch.nn.Module  # the frozen transformer or UNet
    latent_shape: tuple[int, int, int]  # C, H, W
    resolution: int  # of the images, in pixels a side
    lora_targets: tuple[str, ...]  # module names that a LoRA adapts
    guidance_is_input: bool  # the network takes the guidance scale, as "guidance" (B,) of its conditioning; no CFG
    plain_guidance: float  # the guidance_scale at which the family's own pipeline runs no guidance

    def encode(self, prompts: list[str]) -> tuple[list[Item], int]:
        """Text to conditioning, as the family's own pipeline does it, less the padding that `collate` can rebuild.

        The empty prompt stands for no prompt: it gives what the pipeline uses as the unconditional half of CFG.
        Returns the items and how many prompts were longer than the encoder reads.
        """

    def collate(self, items: list[Item]) -> Conditioning:
        """Items to one batch on the network's device."""

    def blank(self) -> Item:
        """Zeros in the shape of a typical prompt's conditioning: what a plan runs."""

    def predict(self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        """The raw prediction of `network` (velocity or noise), like x_t (B, C, H, W); t (B,) in [0, 1]."""

    def predict_x0(self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        """`predict`, turned into x0 by the path."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, H, W) to images (B, 3, h, w) in [0, 1], differentiable."""

    def decode_by(self, vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
        """`decode` by another autoencoder of the same latents."""

    def teacher_times(self, steps: int) -> torch.Tensor:
        """(steps + 1,) times at which the teacher's own scheduler samples, descending to 0."""

    def student_times(self, steps: int) -> torch.Tensor:
        """(steps + 1,) student_timesteps and a final 0: exactly what the exported scheduler hands to diffusers."""

    def student_timesteps(self, steps: int) -> torch.Tensor:
        """(steps,) the times at which the student predicts, as the exported scheduler counts them."""

    def student_scheduler(self, steps: int) -> SchedulerMixin:
        """The scheduler of the exported pipeline."""

    def to_pipeline(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, H, W) as the family's own pipeline takes them."""

    def from_pipeline(self, latents: torch.Tensor) -> torch.Tensor:
        """The reverse of `to_pipeline`."""

    def pipeline(self, network: torch.nn.Module, scheduler: SchedulerMixin) -> DiffusionPipeline:
        """The teacher's pipeline with another network and scheduler."""
