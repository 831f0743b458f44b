"""Z-Image: ZImageTransformer2DModel, flow matching, a language model (Qwen3) as its only text encoder.

1. We convert its conventions into ours: the network's time is 1 - t, and it predicts x0 - noise, which is our velocity
   with the sign reversed. It takes a list of images and a list of captions, each caption of its own length.
2. Its pipeline guides by c + g (c - u): its guidance_scale g is ours minus 1, and 0 runs no guidance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ZImagePipeline, ZImageTransformer2DModel

from dmdr.backbones.latent import ShiftedFlowBackbone
from dmdr.backbones.protocol import Conditioning, Item, Unconditional
from dmdr.config.few_steps import FewSteps
from dmdr.errors import ConfigError, DataError
from dmdr.transfer import send_to

TYPICAL_TOKENS = 96  # of a prompt of medium length with its chat template
TOKENS = 512  # max_sequence_length, the default of ZImagePipeline.__call__
PIXELS = 1024  # the default size of its images
PATCH = 2  # latent pixels a side of a patch, as all_patch_size of its config


class ZImage(ShiftedFlowBackbone[ZImagePipeline, ZImageTransformer2DModel]):
    """A ZImagePipeline as the method sees it."""

    family = "z-image"
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    blocks = ("noise_refiner", "context_refiner", "layers")
    plain_guidance = 0.0
    fixed_tokens = False

    def __init__(self, pipe: ZImagePipeline, resolution: int | None = None) -> None:
        transformer: ZImageTransformer2DModel = pipe.transformer
        super().__init__(
            pipe,
            transformer,
            channels=transformer.config["in_channels"],
            side=PIXELS // pipe.vae_scale_factor,
            multiple=2,
            resolution=resolution,
        )

    def check_resolution(self) -> None:
        side, most = self.latent_shape[-1] // PATCH, min(self.network.config["axes_lens"][1:])
        if side > most:
            raise DataError(
                f"teacher.resolution is {self.resolution}, but this Z-Image knows positions for {most} patches a side "
                f"(axes_lens); set it to {most * PATCH * self.pipe.vae_scale_factor} or less"
            )

    def check_unconditional(self, kind: Unconditional) -> None:
        super().check_unconditional(kind)
        if kind == "zeros":
            raise ConfigError(
                "teacher.unconditional is zeros, but Z-Image reads as many tokens as a prompt has, and zeros have no "
                "length; set encoded"
            )

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[list[Item], int]:
        """{"context": (L, D)} for each prompt, where L is the number of tokens of its chat."""
        pipe = self.pipe
        contexts, _ = pipe.encode_prompt(
            list(prompts),  # a copy, into which it writes
            device=pipe.text_encoder.device,
            do_classifier_free_guidance=False,
        )
        return [{"context": context.cpu()} for context in contexts], self.count_truncated(prompts)

    def count_truncated(self, prompts: list[str]) -> int:
        tokenizer = self.pipe.tokenizer
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for prompt in prompts
        ]
        return sum(len(ids) > TOKENS for ids in tokenizer(chats, verbose=False).input_ids)

    def collate(self, items: list[Item]) -> Conditioning:
        """context (B, TOKENS, D), zeros after a prompt's own tokens; tokens (B,), the number of those, on the CPU."""
        context = [F.pad(item["context"], (0, 0, 0, TOKENS - len(item["context"]))) for item in items]
        tokens = torch.tensor([len(item["context"]) for item in items])  # which the CPU reads in each forward
        return {"context": send_to(torch.stack(context), self.network.device, self.network.dtype), "tokens": tokens}

    def blank(self) -> Item:
        return {"context": torch.zeros(TYPICAL_TOKENS, self.network.config["cap_feat_dim"])}

    def _predict(self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        counts = [TYPICAL_TOKENS] * len(x_t) if x_t.is_meta else c["tokens"].tolist()  # meta tensors have no values
        captions = [context[:tokens] for context, tokens in zip(c["context"], counts, strict=True)]
        images = list(x_t.unsqueeze(2).unbind())  # (C, 1, H, W) each: one frame
        predictions: list[torch.Tensor] = network(images, 1 - t, captions).sample
        return -torch.stack(predictions).squeeze(2)

    def build_student_pipeline(self, network: torch.nn.Module, few: FewSteps) -> ZImagePipeline:
        parts = {**self.pipe.components, "transformer": network, "scheduler": self.student_scheduler(few)}
        return ZImagePipeline(**parts)
