"""Build the lab's denoising teacher: a complete, tiny StableDiffusionXLPipeline.

1. The text encoders and the autoencoder are those of the flow teacher, so that the two model families differ only in
   the network. As in SDXL, the contexts of the encoders are concatenated, and the second gives the pooled state.
2. SDXL's pipeline does not support a shift of the latents. The 1x1 convolutions around the latents apply it instead.
3. A UNet2DConditionModel learns to predict noise in SDXL's own schedule, at uniform timesteps (DDPM, Ho et al. 2020).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dmdr.backbones.sdxl import SDXL
from dmdr.lab.autoencoder import encode_images
from dmdr.lab.fitting import Log, NetworkRecipe, fit_network
from dmdr.lab.renders import sample_renders
from dmdr.teacher.load import find_teacher, load_teacher

PARTS = "lab:flow"


class DenoisingRecipe(TypedDict):
    """The recipe of the denoising teacher.

    parts: the teacher that gives the text encoders and the autoencoder. renders: number of training images.
    """

    seed: int
    parts: str
    renders: int
    unet: NetworkRecipe


RECIPE: DenoisingRecipe = {
    "seed": 1,
    "parts": PARTS,
    "renders": 65536,
    "unet": {
        "steps": 14000,
        "stop": 9000,
        "batch": 64,
        "lr": 2e-3,
        "warmup": 200,
        "betas": [0.9, 0.99],
        "weight_decay": 0.01,
        "clip": 1.0,
        "ema": 0.999,
        "drop_prompt": 0.1,
    },
}


def build_unet(context: int, pooled: int) -> UNet2DConditionModel:
    """An untrained UNet: 2.5 M parameters, two levels (8x8 and 4x4) with attention.

    context, pooled: widths of the conditioning.
    """
    size_width = 8  # of the embedding of each of the six numbers of size conditioning
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=4,
        norm_num_groups=8,
        cross_attention_dim=context,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=size_width,
        projection_class_embeddings_input_dim=6 * size_width + pooled,
    )


@torch.no_grad()
def remove_shift(vae: AutoencoderKL) -> AutoencoderKL:
    """The same autoencoder, but its latents need only a scaling factor and no shift."""
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    moved = AutoencoderKL(**{**config, "use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": None})
    channels, shift = config["latent_channels"], config["shift_factor"]
    before, after = torch.zeros(2 * channels), torch.full((channels,), shift)
    before[:channels] = -shift  # shifts the means, leaves the log variances
    moved.load_state_dict(
        {
            **vae.state_dict(),
            "quant_conv.weight": torch.eye(2 * channels)[..., None, None],
            "quant_conv.bias": before,
            "post_quant_conv.weight": torch.eye(channels)[..., None, None],
            "post_quant_conv.bias": after,
        }
    )
    return moved.eval()


def remove_projection(encoder: CLIPTextModelWithProjection) -> CLIPTextModel:
    """The same encoder, as the class that SDXL's first text encoder has."""
    plain = CLIPTextModel(encoder.config)
    plain.load_state_dict(encoder.text_model.state_dict())
    return plain.eval()


def build_denoising(folder: Path, log: Log, recipe: DenoisingRecipe = RECIPE) -> None:
    """Train the UNet by the recipe and save the pipeline as float16 safetensors in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe["seed"])
    parts = load_teacher(find_teacher(recipe["parts"])).pipe
    pipe = StableDiffusionXLPipeline(
        vae=remove_shift(parts.vae),
        text_encoder=remove_projection(parts.text_encoder),
        tokenizer=parts.tokenizer,
        text_encoder_2=parts.text_encoder_2,
        tokenizer_2=parts.tokenizer_2,
        unet=build_unet(2 * parts.text_encoder.config.hidden_size, parts.text_encoder_2.config.projection_dim),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),  # stabilityai/stable-diffusion-xl-base-1.0
    )
    log(f"drawing {recipe['renders']} renders")
    records, images = sample_renders("train", recipe["renders"], np.random.default_rng(recipe["seed"]))
    x0 = encode_images(pipe.vae, images) * pipe.vae.config.scaling_factor

    def sample_levels(count: int) -> torch.Tensor:
        return torch.randint(1, 1001, (count,)) / 1000

    prompts = [record["prompt"] for record in records]
    fit_network(SDXL(pipe), prompts, x0, recipe["unet"], log, sample_levels=sample_levels)
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    for config in folder.glob("text_encoder*/config.json"):  # transformers would load float16, diffusers float32
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
