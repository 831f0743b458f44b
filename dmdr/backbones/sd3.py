"""Stable Diffusion 3 and 3.5: SD3Transformer2DModel, flow matching, two CLIP encoders and an optional T5.

1. If the last context tokens of a prompt are equal (without T5, diffusers appends 256 zeros), we store one of them and
   their number (`null_tokens.py`); the images are the same.
2. The student's times are those that the exported FlowMatchEulerDiscreteScheduler itself computes for
   `num_inference_steps=N`. We choose shift and shift_terminal such that these times are the official demo's shifted
   linspace(1, 0, N + 1) to within 0.002 (1, .9, .75, .5 for N = 4 and shift 3). Training and export share one source.
"""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from dmdr.backbones.latent import (
    TIMESTEPS,
    LatentBackbone,
    build_flow_scheduler,
    compute_mu,
    compute_shift,
    list_sigmas,
    silence_diffusers,
)
from dmdr.backbones.null_tokens import NullTokenAttention
from dmdr.backbones.protocol import Conditioning, Item, Unconditional
from dmdr.backbones.zero_t5 import build_zero_t5
from dmdr.config.few_steps import FewSteps
from dmdr.path import FlowPath
from dmdr.transfer import send_to

T5_TOKENS = 256  # max_sequence_length, the default of StableDiffusion3Pipeline.__call__


class SD3(LatentBackbone[StableDiffusion3Pipeline, SD3Transformer2DModel]):
    """A StableDiffusion3Pipeline as the method sees it."""

    family = "sd3"
    path = FlowPath()
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
    blocks = ("transformer_blocks",)

    def __init__(self, pipe: StableDiffusion3Pipeline, resolution: int | None = None) -> None:
        transformer: SD3Transformer2DModel = pipe.transformer
        super().__init__(
            pipe,
            transformer,
            channels=transformer.config["in_channels"],
            side=transformer.config["sample_size"],
            multiple=transformer.config["patch_size"],
            resolution=resolution,
        )
        transformer.set_attn_processor(NullTokenAttention())  # type: ignore[arg-type]  # it lists diffusers' own only
        self.context_tokens: int = pipe.tokenizer_max_length + T5_TOKENS

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[list[Item], int]:
        """{"context": (L, D), "pooled": (1, P)} for each prompt. Of equal tokens at the end of context, one remains."""
        pipe = self.pipe
        with silence_diffusers():
            context, _, pooled, _ = pipe.encode_prompt(
                prompts, prompts, prompts, do_classifier_free_guidance=False, device=pipe.text_encoder.device
            )
        items = [{"context": fold(c).cpu(), "pooled": p[None].cpu()} for c, p in zip(context, pooled, strict=True)]
        return items, self.count_truncated(prompts)

    def count_truncated(self, prompts: list[str]) -> int:
        pipe = self.pipe
        return sum(len(ids) > pipe.tokenizer_max_length for ids in pipe.tokenizer(prompts, verbose=False).input_ids)

    def collate(self, items: list[Item]) -> Conditioning:
        """context (B, L, D), pooled (B, P). The last context token stands for all tokens up to `context_tokens`."""
        device, dtype = self.network.device, self.network.dtype
        longest = max(len(item["context"]) for item in items)
        context = [torch.cat([c, c[-1:].expand(longest - len(c), -1)]) for c in (item["context"] for item in items)]
        pooled = torch.cat([item["pooled"] for item in items])
        return {"context": send_to(torch.stack(context), device, dtype), "pooled": send_to(pooled, device, dtype)}

    def encode_unconditional(self, kind: Unconditional) -> Item:
        item = super().encode_unconditional(kind)
        return {**item, "context": fold(item["context"])}

    def blank(self) -> Item:
        config = self.network.config
        context = torch.zeros(self.context_tokens, config["joint_attention_dim"])
        return {"context": context, "pooled": torch.zeros(1, config["pooled_projection_dim"])}

    def _predict(self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        null_tokens = self.context_tokens - c["context"].shape[1] + 1
        return network(
            hidden_states=x_t,
            timestep=t * TIMESTEPS,
            encoder_hidden_states=c["context"],
            pooled_projections=c["pooled"],
            joint_attention_kwargs={"null_tokens": null_tokens},
        ).sample

    def teacher_times(self, steps: int) -> torch.Tensor:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(steps, mu=self.mu if scheduler.config.use_dynamic_shifting else None)
        return scheduler.sigmas

    @property
    def mu(self) -> float:
        patch: int = self.network.config["patch_size"]
        return compute_mu(self.pipe.scheduler, (self.latent_shape[1] // patch) * (self.latent_shape[2] // patch))

    def student_times(self, few: FewSteps) -> torch.Tensor:
        scheduler = self.student_scheduler(few)
        scheduler.set_timesteps(few.steps, sigmas=list_sigmas(few) or None)
        return scheduler.sigmas

    def student_scheduler(self, few: FewSteps) -> FlowMatchEulerDiscreteScheduler:
        """The scheduler of `few.steps` steps.

        We want the times shift(1 - k / N), k < N. diffusers shifts linspace(1, 0, N) and then stretches it. Both are
        Moebius maps of k with 1 - t = 0 at k = 0, so that two numbers make them equal: shift c s N / (N - 1) and
        terminal 1 - c, with c = (N - 1) / (s + N - 1).
        """
        shift, steps = few.shift or compute_shift(self.pipe.scheduler, self.mu), few.steps
        if steps == 1:
            return build_flow_scheduler(few, shift)
        last = (steps - 1) / (shift + steps - 1)  # 1 - t of the last step
        return build_flow_scheduler(few, last * shift * steps / (steps - 1), shift_terminal=1 - last)

    def build_student_pipeline(self, network: torch.nn.Module, few: FewSteps) -> StableDiffusion3Pipeline:
        parts = {**self.pipe.components, "transformer": network, "scheduler": self.student_scheduler(few)}
        if parts["text_encoder_3"] is None:  # plain diffusers would not load the folder
            parts["text_encoder_3"], parts["tokenizer_3"] = build_zero_t5(self.network.config["joint_attention_dim"])
        return StableDiffusion3Pipeline(**parts)


def fold(context: torch.Tensor) -> torch.Tensor:
    """Context (T, D) without the repeats of its last token: (L, D), L <= T."""
    differs = (context != context[-1]).any(dim=1).nonzero()
    return context[: int(differs[-1]) + 2] if len(differs) else context[:1]
