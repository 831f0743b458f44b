"""FLUX.1: FluxTransformer2DModel, flow matching, a CLIP encoder for the pooled state and a T5 for the context.

1. FLUX.1-dev is guidance-distilled: the scale is an input of the network, one forward a step. The real score is asked
   at the teacher's scale; student and fake score at 1, as the other families run them without CFG.
2. Its pipeline packs 2x2 patches of a latent into tokens; the method never sees them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from dmdr.backbones.latent import Shifted, unheard
from dmdr.backbones.protocol import Conditioning, Item

TOKENS = 512  # max_sequence_length, the default of FluxPipeline.__call__


class Flux(Shifted):
    """A FluxPipeline as the method sees it."""

    family = "flux"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    def __init__(self, pipe: FluxPipeline, resolution: int | None = None) -> None:
        config = pipe.transformer.config
        super().__init__(
            pipe,
            pipe.transformer,
            channels=config.in_channels // 4,
            side=pipe.default_sample_size,
            multiple=2,
            resolution=resolution,
        )
        self.guidance_is_input = config.guidance_embeds

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[list[Item], int]:
        """{"context": (TOKENS, D), "pooled": (1, P)} for each prompt; cut prompts are those that T5 does not hold."""
        pipe = self.pipe
        with unheard():
            truncated = sum(len(ids) > TOKENS for ids in pipe.tokenizer_2(prompts, verbose=False).input_ids)
            context, pooled, _ = pipe.encode_prompt(prompts, device=pipe.text_encoder.device)
        return [{"context": c.cpu(), "pooled": p[None].cpu()} for c, p in zip(context, pooled, strict=True)], truncated

    def collate(self, items: list[Item]) -> Conditioning:
        """context (B, TOKENS, D), pooled (B, P), guidance (B,)."""
        like = {"device": self.network.device, "dtype": self.network.dtype}
        context = torch.stack([item["context"] for item in items])
        pooled = torch.cat([item["pooled"] for item in items])
        guidance = torch.ones(len(items), **like)
        return {"context": context.to(**like), "pooled": pooled.to(**like), "guidance": guidance}

    def blank(self) -> Item:
        config = self.network.config
        context = torch.zeros(TOKENS, config.joint_attention_dim)
        return {"context": context, "pooled": torch.zeros(1, config.pooled_projection_dim)}

    def _predict(self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        rows, columns = x_t.shape[2] // 2, x_t.shape[3] // 2
        grid = torch.cartesian_prod(x_t.new_zeros(1), *(torch.arange(n).to(x_t) for n in (rows, columns)))
        found = network(
            hidden_states=self.to_pipeline(x_t),
            timestep=t,
            encoder_hidden_states=c["context"],
            pooled_projections=c["pooled"],
            guidance=c["guidance"] if self.guidance_is_input else None,
            img_ids=grid,
            txt_ids=grid.new_zeros(c["context"].shape[1], 3),
        ).sample
        return self.from_pipeline(found)

    def to_pipeline(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to tokens (B, H W / 4, 4 C)."""
        return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2).contiguous()

    def from_pipeline(self, latents: torch.Tensor) -> torch.Tensor:
        side = self.latent_shape[1] // 2
        return F.pixel_shuffle(latents.transpose(1, 2).unflatten(2, (side, side)), 2)

    def pipeline(self, network: torch.nn.Module, scheduler: FlowMatchEulerDiscreteScheduler) -> FluxPipeline:
        return FluxPipeline(**{**self.pipe.components, "transformer": network, "scheduler": scheduler})
