"""The networks of the real teachers without their weights: from their published configs, on the meta device.

Shapes are computed there and numbers are not, so that parameters and work are exact and cost nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    ModelMixin,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch.utils.flop_counter import FlopCounterMode

from dmdr.planning.shapes import KnownShapes

SD3_COMMON = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SD3_MEDIUM = {**SD3_COMMON, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
SD35_LARGE = {
    **SD3_COMMON,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
Z_IMAGE: dict = {}  # diffusers' defaults are its config
FLUX_DEV = {"guidance_embeds": True}  # the rest of it are diffusers' defaults

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
VAE_4 = {**VAE, "latent_channels": 4, "scaling_factor": 0.13025}
VAE_16 = {
    **VAE,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "shift_factor": 0.1159,
    "scaling_factor": 0.3611,
}
EULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Architecture:
    """A published teacher. inputs: (latent side, text tokens) -> what its network's forward takes for one image."""

    hub: str  # OWNER/NAME
    pipeline: type[DiffusionPipeline]
    network: type[ModelMixin]
    config: dict
    inputs: Callable[[int, int], dict]
    tokens: int  # of a prompt, as its pipeline pads it; of Z-Image's, which pads to 32s, a middling prompt
    vae: dict
    scheduler: SchedulerMixin

    def on_meta(self, **changes: object) -> ModelMixin:
        """The network, frozen, without weights; `changes` to its config."""
        with torch.device("meta"):
            return self.network(**{**self.config, **changes}).requires_grad_(False)

    def pipe(self) -> DiffusionPipeline:
        """The whole pipeline without weights and without text encoders."""
        with torch.device("meta"):
            vae = AutoencoderKL(**self.vae)
        return assemble_pipeline(self.pipeline, self.on_meta(), vae, self.scheduler)

    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.on_meta().parameters())

    def flops(self, side: int = 128) -> int:
        """Of one forward of one image, attention counted; 128 is the latent side of 1,024 pixels."""
        network = self.on_meta()
        with torch.device("meta"), KnownShapes(), FlopCounterMode(display=False) as counter, torch.no_grad():
            network(**self.inputs(side, self.tokens))
        return counter.get_total_flops()


def _sd3(side: int, tokens: int) -> dict:
    return {
        "hidden_states": torch.empty(1, 16, side, side),
        "timestep": torch.empty(1),
        "encoder_hidden_states": torch.empty(1, tokens, 4096),
        "pooled_projections": torch.empty(1, 2048),
    }


def _sdxl(side: int, tokens: int) -> dict:
    added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
    return {
        "sample": torch.empty(1, 4, side, side),
        "timestep": torch.empty(1),
        "encoder_hidden_states": torch.empty(1, tokens, 2048),
        "added_cond_kwargs": added,
    }


def _flux(side: int, tokens: int) -> dict:
    patches = (side // 2) ** 2
    return {
        "hidden_states": torch.empty(1, patches, 64),
        "timestep": torch.empty(1),
        "encoder_hidden_states": torch.empty(1, tokens, 4096),
        "pooled_projections": torch.empty(1, 768),
        "guidance": torch.empty(1),
        "img_ids": torch.empty(patches, 3),
        "txt_ids": torch.empty(tokens, 3),
    }


def _z_image(side: int, tokens: int) -> dict:
    return {
        "x": [torch.empty(16, 1, side, side)],
        "t": torch.empty(1),
        "cap_feats": [torch.empty(tokens, 2560)],
    }


def assemble_pipeline(
    pipeline: type[DiffusionPipeline], network: ModelMixin, vae: AutoencoderKL, scheduler: SchedulerMixin
) -> DiffusionPipeline:
    """A pipeline of these parts and nothing that reads text."""
    parts = inspect.signature(pipeline.__init__).parameters.keys() - {"self"}
    given = {"vae": vae, "scheduler": scheduler, "unet" if "unet" in parts else "transformer": network}
    wanted = {name for name in parts if name.startswith(("text_encoder", "tokenizer"))}
    return pipeline(**dict.fromkeys(wanted), **given)


ARCHITECTURES = {
    "SDXL": Architecture(
        "stabilityai/stable-diffusion-xl-base-1.0",
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
        SDXL,
        _sdxl,
        77,
        VAE_4,
        EulerDiscreteScheduler(**EULER),
    ),
    "SD3-Medium": Architecture(
        "stabilityai/stable-diffusion-3-medium-diffusers",
        StableDiffusion3Pipeline,
        SD3Transformer2DModel,
        SD3_MEDIUM,
        _sd3,
        77 + 256,
        VAE_16,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ),
    "SD3.5-Large": Architecture(
        "stabilityai/stable-diffusion-3.5-large",
        StableDiffusion3Pipeline,
        SD3Transformer2DModel,
        SD35_LARGE,
        _sd3,
        77 + 256,
        VAE_16,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ),
    "Z-Image": Architecture(
        "Tongyi-MAI/Z-Image",
        ZImagePipeline,
        ZImageTransformer2DModel,
        Z_IMAGE,
        _z_image,
        96,
        VAE_16,
        FlowMatchEulerDiscreteScheduler(shift=6.0),
    ),
    "FLUX.1-dev": Architecture(
        "black-forest-labs/FLUX.1-dev",
        FluxPipeline,
        FluxTransformer2DModel,
        FLUX_DEV,
        _flux,
        512,
        VAE_16,
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    ),
}
