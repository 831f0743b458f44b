"""The networks of published teachers, built from their configs on the meta device, without their weights.

The meta device computes shapes but no numbers, so parameters and work are exact and cost nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
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

SD3_MEDIUM_LAYERS = 24
SD35_LARGE_LAYERS = 38
SDXL_LAYERS = (1, 2, 10)  # transformer layers in a block of each of the UNet's three levels

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
SD3_MEDIUM = {**SD3_COMMON, "num_layers": SD3_MEDIUM_LAYERS, "num_attention_heads": 24, "caption_projection_dim": 1536}
SD35_LARGE = {
    **SD3_COMMON,
    "num_layers": SD35_LARGE_LAYERS,
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
    "transformer_layers_per_block": SDXL_LAYERS,
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
Z_IMAGE: dict[str, object] = {}  # the published config equals diffusers' defaults
FLUX_DEV = {"guidance_embeds": True}  # all other values of the published config are diffusers' defaults

CLIP_L, CLIP_L_PROJECTION, CLIP_G = 123_060_480, 768 * 768, 694_659_840  # parameters; CLIP_G with its projection
T5_XXL, QWEN3_4B = 4_762_310_656, 4_022_468_096  # the encoder alone; without a head

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
    """A published teacher: how its network, its autoencoder and its pipeline are built without weights.

    hub: its repository, OWNER/NAME.
    config, vae: arguments of the network and of its AutoencoderKL.
    build_inputs: latent side, number of text tokens -> the arguments of the network's forward for one image.
    text_bytes: of all text encoders, by the shapes and dtypes that were published.
    tokens: the length to which the pipeline pads a prompt. Z-Image pads to a multiple of 32; 96 is a medium prompt.
    """

    hub: str
    pipeline: type[DiffusionPipeline]
    network: Callable[..., ModelMixin]
    config: Mapping[str, object]
    build_inputs: Callable[[int, int], dict[str, object]]
    tokens: int
    vae: Mapping[str, object]
    scheduler: SchedulerMixin
    text_bytes: int

    def build_network(self, **changes: object) -> ModelMixin:
        """The network on meta, frozen. changes: values that replace those of its config."""
        with torch.device("meta"):
            return self.network(**{**self.config, **changes}).requires_grad_(False)

    def build_pipeline(self, **changes: object) -> DiffusionPipeline:
        """The whole pipeline on meta, without text encoders. changes: as for `build_network`."""
        with torch.device("meta"):
            vae = AutoencoderKL(**self.vae)
        return assemble_pipeline(self.pipeline, self.build_network(**changes), vae, self.scheduler)

    def count_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.build_network().parameters())

    def count_flops(self, side: int = 128) -> int:
        """FLOPs of one forward of one image, attention included.

        side: of the latent; 128 for an image of 1,024 x 1,024 pixels.
        """
        network = self.build_network()
        with torch.device("meta"), KnownShapes(), FlopCounterMode(display=False) as counter, torch.no_grad():
            network(**self.build_inputs(side, self.tokens))
        return counter.get_total_flops()


def _build_sd3_inputs(side: int, tokens: int) -> dict[str, object]:
    return {
        "hidden_states": torch.empty(1, 16, side, side),
        "timestep": torch.empty(1),
        "encoder_hidden_states": torch.empty(1, tokens, 4096),
        "pooled_projections": torch.empty(1, 2048),
    }


def _build_sdxl_inputs(side: int, tokens: int) -> dict[str, object]:
    added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
    return {
        "sample": torch.empty(1, 4, side, side),
        "timestep": torch.empty(1),
        "encoder_hidden_states": torch.empty(1, tokens, 2048),
        "added_cond_kwargs": added,
    }


def _build_flux_inputs(side: int, tokens: int) -> dict[str, object]:
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


def _build_z_image_inputs(side: int, tokens: int) -> dict[str, object]:
    return {
        "x": [torch.empty(16, 1, side, side)],
        "t": torch.empty(1),
        "cap_feats": [torch.empty(tokens, 2560)],
    }


def assemble_pipeline(
    pipeline: type[DiffusionPipeline], network: ModelMixin, vae: AutoencoderKL, scheduler: SchedulerMixin
) -> DiffusionPipeline:
    """A pipeline with these parts and without text encoders and tokenizers."""
    names = inspect.signature(pipeline.__init__).parameters.keys() - {"self"}
    text_parts = dict.fromkeys(name for name in names if name.startswith(("text_encoder", "tokenizer")))
    parts = {"vae": vae, "scheduler": scheduler, "unet" if "unet" in names else "transformer": network}
    return pipeline(**text_parts, **parts)


ARCHITECTURES = {
    "SDXL": Architecture(
        "stabilityai/stable-diffusion-xl-base-1.0",
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
        SDXL,
        _build_sdxl_inputs,
        77,
        VAE_4,
        EulerDiscreteScheduler(**EULER),
        4 * (CLIP_L + CLIP_G),
    ),
    "SD3-Medium": Architecture(
        "stabilityai/stable-diffusion-3-medium-diffusers",
        StableDiffusion3Pipeline,
        SD3Transformer2DModel,
        SD3_MEDIUM,
        _build_sd3_inputs,
        77 + 256,
        VAE_16,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        2 * (CLIP_L + CLIP_L_PROJECTION + CLIP_G + T5_XXL),
    ),
    "SD3.5-Large": Architecture(
        "stabilityai/stable-diffusion-3.5-large",
        StableDiffusion3Pipeline,
        SD3Transformer2DModel,
        SD35_LARGE,
        _build_sd3_inputs,
        77 + 256,
        VAE_16,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        2 * (CLIP_L + CLIP_L_PROJECTION + CLIP_G + T5_XXL),
    ),
    "Z-Image": Architecture(
        "Tongyi-MAI/Z-Image",
        ZImagePipeline,
        ZImageTransformer2DModel,
        Z_IMAGE,
        _build_z_image_inputs,
        96,
        VAE_16,
        FlowMatchEulerDiscreteScheduler(shift=6.0),
        2 * QWEN3_4B,
    ),
    "FLUX.1-dev": Architecture(
        "black-forest-labs/FLUX.1-dev",
        FluxPipeline,
        FluxTransformer2DModel,
        FLUX_DEV,
        _build_flux_inputs,
        512,
        VAE_16,
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        2 * (CLIP_L + T5_XXL),
    ),
}
