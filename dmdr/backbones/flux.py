"""FLUX.1: FluxTransformer2DModel, flow matching, a CLIP encoder for the pooled state and a T5 for the context.

1. FLUX.1-dev is guidance-distilled: the scale is an input of the network, and a step is one forward. The real score
   runs at the teacher's scale. Student and fake score run at 1; in the other families they run without CFG.
2. Its pipeline packs 2x2 patches of a latent into tokens; the method never sees these tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel

from dmdr.backbones.latent import ShiftedFlowBackbone, silence_diffusers
from dmdr.backbones.protocol import Conditioning, Item
from dmdr.config.few_steps import FewSteps
from dmdr.transfer import send_to

TOKENS = 512  # max_sequence_length, the default of FluxPipeline.__call__


class Flux(ShiftedFlowBackbone[FluxPipeline, FluxTransformer2DModel]):
    """A FluxPipeline as the method sees it."""

    family = "flux"
    lora_targets: tuple[str, ...] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    )
    blocks = ("transformer_blocks", "single_transformer_blocks")

    def __init__(self, pipe: FluxPipeline, resolution: int | None = None) -> None:
        transformer: FluxTransformer2DModel = pipe.transformer
        super().__init__(
            pipe,
            transformer,
            channels=transformer.config["in_channels"] // 4,
            side=pipe.default_sample_size,
            multiple=2,
            resolution=resolution,
        )
        self.guidance_is_input = transformer.config["guidance_embeds"]

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[list[Item], int]:
        """{"context": (TOKENS, D), "pooled": (1, P)} for each prompt."""
        pipe = self.pipe
        with silence_diffusers():
            context, pooled, _ = pipe.encode_prompt(prompts, device=pipe.text_encoder.device)
        items = [{"context": c.cpu(), "pooled": p[None].cpu()} for c, p in zip(context, pooled, strict=True)]
        return items, self.count_truncated(prompts)

    def count_truncated(self, prompts: list[str]) -> int:
        """How many prompts T5 cuts."""
        with silence_diffusers():
            return sum(len(ids) > TOKENS for ids in self.pipe.tokenizer_2(prompts, verbose=False).input_ids)

    def collate(self, items: list[Item]) -> Conditioning:
        """context (B, TOKENS, D), pooled (B, P), guidance (B,)."""
        device, dtype = self.network.device, self.network.dtype
        context = torch.stack([item["context"] for item in items])
        pooled = torch.cat([item["pooled"] for item in items])
        guidance = torch.ones(len(items), device=device, dtype=dtype)
        return {
            "context": send_to(context, device, dtype),
            "pooled": send_to(pooled, device, dtype),
            "guidance": guidance,
        }

    def blank(self) -> Item:
        config = self.network.config
        context = torch.zeros(TOKENS, config["joint_attention_dim"])
        return {"context": context, "pooled": torch.zeros(1, config["pooled_projection_dim"])}

    def _predict(self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        rows, columns = x_t.shape[2] // 2, x_t.shape[3] // 2
        sides = (torch.arange(n, device=x_t.device, dtype=x_t.dtype) for n in (rows, columns))
        grid = torch.cartesian_prod(x_t.new_zeros(1), *sides)
        tokens: torch.Tensor = network(
            hidden_states=self.to_pipeline(x_t),
            timestep=t,
            encoder_hidden_states=c["context"],
            pooled_projections=c["pooled"],
            guidance=c["guidance"] if self.guidance_is_input else None,
            img_ids=grid,
            txt_ids=grid.new_zeros(c["context"].shape[1], 3),
        ).sample
        return self.from_pipeline(tokens)

    def to_pipeline(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to tokens (B, H W / 4, 4 C)."""
        return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2).contiguous()

    def from_pipeline(self, latents: torch.Tensor) -> torch.Tensor:
        side = self.latent_shape[1] // 2
        return F.pixel_shuffle(latents.transpose(1, 2).unflatten(2, (side, side)), 2)

    def build_student_pipeline(self, network: torch.nn.Module, few: FewSteps) -> FluxPipeline:
        parts = {**self.pipe.components, "transformer": network, "scheduler": self.student_scheduler(few)}
        return FluxPipeline(**parts)
