"""Z-Image: ZImageTransformer2DModel, flow matching, a language model (Qwen3) as its only text encoder.

1. Its conventions turned into ours: the network's time is 1 - t and it predicts x0 - noise, our velocity with the
   sign reversed. It takes lists, an image and a caption of its own length each.
2. Its pipeline guides by c + g (c - u): its guidance_scale g is ours less 1, and 0 runs no guidance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

from dmdr.backbones.latent import Shifted
from dmdr.backbones.protocol import Conditioning, Item

TYPICAL = 96  # tokens of a middling prompt, chat template included
TOKENS = 512  # max_sequence_length, the default of ZImagePipeline.__call__
PIXELS = 1024  # the default size of its images


class ZImage(Shifted):
    """A ZImagePipeline as the method sees it."""

    family = "z-image"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    plain_guidance = 0.0

    def __init__(self, pipe: ZImagePipeline, resolution: int | None = None) -> None:
        super().__init__(
            pipe,
            pipe.transformer,
            channels=pipe.transformer.config.in_channels,
            side=PIXELS // pipe.vae_scale_factor,
            multiple=2,
            resolution=resolution,
        )

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[list[Item], int]:
        """{"context": (L, D)} for each prompt, L the tokens of its chat."""
        pipe = self.pipe
        chats = [
            pipe.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for prompt in prompts
        ]
        truncated = sum(len(ids) > TOKENS for ids in pipe.tokenizer(chats, verbose=False).input_ids)
        contexts, _ = pipe.encode_prompt(  # which writes into the list it is given
            list(prompts), device=pipe.text_encoder.device, do_classifier_free_guidance=False
        )
        return [{"context": context.cpu()} for context in contexts], truncated

    def collate(self, items: list[Item]) -> Conditioning:
        """context (B, TOKENS, D), zeros after each prompt's own; tokens (B,), how many those are."""
        device = self.network.device
        context = [F.pad(item["context"], (0, 0, 0, TOKENS - len(item["context"]))) for item in items]
        tokens = torch.tensor([len(item["context"]) for item in items], device=device)
        return {"context": torch.stack(context).to(device, self.network.dtype), "tokens": tokens}

    def blank(self) -> Item:
        return {"context": torch.zeros(TYPICAL, self.network.config.cap_feat_dim)}

    def _predict(self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        counts = [TYPICAL] * len(x_t) if x_t.is_meta else c["tokens"].tolist()  # on meta there are no numbers
        captions = [context[:tokens] for context, tokens in zip(c["context"], counts, strict=True)]
        found = network(list(x_t.unsqueeze(2).unbind()), 1 - t, captions).sample  # (C, 1, H, W) each: one frame
        return -torch.stack(found).squeeze(2)

    def pipeline(self, network: torch.nn.Module, scheduler: FlowMatchEulerDiscreteScheduler) -> ZImagePipeline:
        return ZImagePipeline(**{**self.pipe.components, "transformer": network, "scheduler": scheduler})
