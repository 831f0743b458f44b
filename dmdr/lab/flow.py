"""Build the lab's flow teacher: a complete, tiny StableDiffusion3Pipeline, trained on renders of the world of shapes.

1. A tokenizer and text encoders that already understand captions, as those of Stable Diffusion 3 do (`captions.py`).
2. An AutoencoderKL (`autoencoder.py`).
3. An SD3Transformer2DModel, by conditional flow matching on a fixed set of encoded renders of training prompts.
4. A T5 whose states are all zero, because plain `from_pretrained` refuses a folder without a T5.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from dmdr.backbones.sd3 import SD3
from dmdr.backbones.zero_t5 import build_zero_t5
from dmdr.lab.autoencoder import VaeRecipe, encode_images, train_vae
from dmdr.lab.captions import Captions, TextRecipe, build_lab_captions, build_tokenizer, train_text_encoders
from dmdr.lab.fitting import Log, NetworkRecipe, fit_network
from dmdr.lab.renders import sample_renders

WIDTH = 96  # of the text states


class TransformerRecipe(NetworkRecipe):
    """The recipe of the transformer: also its width, and the logit-normal distribution of the noise levels."""

    width: int
    t_logit_mean: float
    t_logit_std: float


class PipelineRecipe(TypedDict):
    """The recipe of a pipeline of the flow family. shift: of the scheduler's times."""

    seed: int
    shift: float
    text: TextRecipe
    vae: VaeRecipe
    transformer: TransformerRecipe


class FlowRecipe(PipelineRecipe):
    """The recipe of the flow teacher. renders: number of training images."""

    renders: int


RECIPE: FlowRecipe = {
    "seed": 0,
    "renders": 65536,
    # Four steps are then at 1, 0.75, 0.5, 0.25. Students scored 0.457 to 0.477; with shift 3, 0.430 (398 prompts).
    "shift": 1.0,
    "text": {"steps": 800, "batch": 128, "lr": 3e-3},
    "vae": {"steps": 3000, "batch": 32, "lr": 3e-3, "warmup": 100, "kl": 1e-5},
    "transformer": {
        "width": 128,
        "steps": 14000,
        "stop": 9001,
        "batch": 64,
        "lr": 1.5e-3,
        "warmup": 100,
        "betas": [0.9, 0.99],
        "weight_decay": 0.01,
        "clip": 1.0,
        "ema": 0.999,
        "drop_prompt": 0.1,
        "t_logit_mean": 0.5,
        "t_logit_std": 1.2,
        "dtype": "bfloat16",
    },
}


@torch.no_grad()
def build_transformer(width: int) -> SD3Transformer2DModel:
    """An untrained transformer, 2.3 M parameters at width 128.

    Unlike in diffusers, blocks and output start at zero (adaLN-Zero, Peebles & Xie 2023).
    """
    network = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=width // 4,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    norms = [norm for block in network.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for layer in (network.proj_out, *(norm.linear for norm in (*norms, network.norm_out))):
        layer.weight.zero_()
        layer.bias.zero_()
    return network


def fit_transformer(
    pipe: StableDiffusion3Pipeline, prompts: list[str], images: torch.Tensor, recipe: TransformerRecipe, log: Log
) -> None:
    """Train the transformer by flow matching with logit-normal levels, on images (R, 3, 32, 32) uint8."""
    config = pipe.vae.config
    x0 = (encode_images(pipe.vae, images) - config.shift_factor) * config.scaling_factor

    def sample_levels(count: int) -> torch.Tensor:
        return torch.sigmoid(torch.randn(count) * recipe["t_logit_std"] + recipe["t_logit_mean"])

    fit_network(SD3(pipe), prompts, x0, recipe, log, sample_levels=sample_levels)


def build_flow(folder: Path, log: Log, recipe: FlowRecipe = RECIPE) -> None:
    """Train all parts by the recipe and save the pipeline as float16 safetensors in `folder`."""
    log(f"drawing {recipe['renders']} renders")
    records, images = sample_renders("train", recipe["renders"], np.random.default_rng(recipe["seed"]))
    build_pipeline(folder, [record["prompt"] for record in records], images, build_lab_captions(), recipe, log)


def build_pipeline(
    folder: Path, prompts: list[str], images: torch.Tensor, captions: Captions, recipe: PipelineRecipe, log: Log
) -> None:
    """Train all parts of a pipeline and save it in `folder`.

    prompts, images (R, 3, 32, 32) uint8: the training images and their prompts. captions: those of their world.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe["seed"])
    tokenizer = build_tokenizer(folder / "tokenizer", captions.records)
    encoders = train_text_encoders(tokenizer, captions, recipe["text"], WIDTH // 2, log)
    pipe = StableDiffusion3Pipeline(
        transformer=build_transformer(recipe["transformer"]["width"]),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=recipe["shift"]),
        vae=train_vae(images, recipe["vae"], log),
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=copy.deepcopy(tokenizer),
        text_encoder_3=None,  # type: ignore[arg-type]  # None is allowed, as its loader says
        tokenizer_3=None,
    )
    fit_transformer(pipe, prompts, images, recipe["transformer"], log)
    t5, t5_tokenizer = build_zero_t5(WIDTH)
    pipe.register_modules(text_encoder_3=t5, tokenizer_3=t5_tokenizer)
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    for config in folder.glob("text_encoder*/config.json"):  # transformers would load float16, diffusers float32
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
