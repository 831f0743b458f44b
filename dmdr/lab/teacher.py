"""How the lab's flow teacher was built: a complete, tiny StableDiffusion3Pipeline, trained on renders of the world.

1. Tokenizer and text encoders that already understand the captions, as Stable Diffusion 3's do (`captions.py`).
2. An AutoencoderKL, 32x32x3 -> 8x8x8, L1 plus a KL strong enough that its decoder draws crisp shapes from imprecise
   latents: a small transformer learns to place and name shapes long before it learns to draw their edges.
3. SD3Transformer2DModel by conditional flow matching on a fixed set of encoded renders of training prompts, with
   prompts dropped one time in ten. Text and latents are encoded once: a step costs the transformer alone.
4. A silent T5, because plain `from_pretrained` refuses a folder without one.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.training_utils import EMAModel

from dmdr.backbones.sd3 import SD3
from dmdr.backbones.silent_t5 import silent_t5
from dmdr.lab.captions import build_tokenizer, train_text_encoders
from dmdr.lab.renders import drawn

WIDTH = 96
RECIPE = {
    "seed": 0,
    "renders": 65536,
    "text": {"steps": 800, "batch": 128, "lr": 3e-3},
    "vae": {"steps": 3000, "batch": 32, "lr": 3e-3, "warmup": 100, "kl": 1e-5},
    "transformer": {
        "steps": 16000, "batch": 64, "lr": 2e-3, "warmup": 100, "betas": [0.9, 0.99], "weight_decay": 0.01,
        "clip": 1.0, "ema": 0.999, "drop_prompt": 0.1, "t_logit_mean": 0.5, "t_logit_std": 1.2,
    },
}  # fmt: skip


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=8, sample_size=32, block_out_channels=(16, 32, 32),
        norm_num_groups=8, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


@torch.no_grad()
def transformer() -> SD3Transformer2DModel:
    """1.3 M parameters; blocks and output start at zero (adaLN-Zero, Peebles & Xie 2023), not as in diffusers."""
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=8, out_channels=8, num_layers=4, attention_head_dim=WIDTH // 4,
        num_attention_heads=4, joint_attention_dim=WIDTH, caption_projection_dim=WIDTH, pooled_projection_dim=WIDTH,
        pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    norms = [norm for block in network.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for layer in (network.proj_out, *(norm.linear for norm in (*norms, network.norm_out))):
        layer.weight.zero_()
        layer.bias.zero_()
    return network


def schedule(recipe: dict, count: int) -> Iterator[tuple[int, float, torch.Tensor]]:
    """(step, learning rate, indices (batch,) into `count` renders): a linear warm-up, then a cosine down to 0."""
    for step in range(recipe["steps"]):
        factor = min((step + 1) / recipe["warmup"], 0.5 * (1 + math.cos(math.pi * step / recipe["steps"])))
        yield step, recipe["lr"] * factor, torch.randint(count, (recipe["batch"],))


def train_vae(images: torch.Tensor, recipe: dict, log) -> AutoencoderKL:
    """The autoencoder, with the shift and scale that give its active latent channels zero mean and unit variance.

    images: (R, 3, 32, 32) uint8.
    """
    vae = autoencoder()
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0.0, fused=True)
    for step, rate, chosen in schedule(recipe, len(images)):
        optimizer.param_groups[0]["lr"] = rate
        pixels = images[chosen].float() / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
        loss = F.l1_loss(vae.decode(posterior.sample()).sample, pixels) + recipe["kl"] * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            log(f"vae {step}/{recipe['steps']} loss {loss.item():.4f}")
    means = encoded(vae.eval(), images[:512])
    spread = means.std(dim=(0, 2, 3))
    active = means[:, spread > 0.25 * spread.max()]  # the KL leaves some channels without information
    vae.register_to_config(shift_factor=float(active.mean()), scaling_factor=float(1 / active.std()))
    return vae


@torch.no_grad()
def encoded(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Means of the latents (R, 8, 8, 8), neither shifted nor scaled, of images (R, 3, 32, 32) uint8."""
    return torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.mode() for part in images.split(256)])


def train_transformer(
    pipe: StableDiffusion3Pipeline, records: list[dict], images: torch.Tensor, recipe: dict, log
) -> None:
    """The pipeline's transformer in place; afterwards it holds its exponential moving average."""
    config = pipe.vae.config
    x0_all = (encoded(pipe.vae, images) - config.shift_factor) * config.scaling_factor
    backbone = SD3(pipe)
    captions = ["", *sorted({record["prompt"] for record in records})]
    items = [item for start in range(0, len(captions), 64) for item in backbone.encode(captions[start : start + 64])[0]]
    number = {prompt: index for index, prompt in enumerate(captions)}
    prompt_of = torch.tensor([number[record["prompt"]] for record in records])

    network = backbone.network.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(
        network.parameters(), betas=recipe["betas"], weight_decay=recipe["weight_decay"], fused=True
    )
    ema = EMAModel(network.parameters(), decay=recipe["ema"], foreach=True)
    started = time.monotonic()
    for step, rate, chosen in schedule(recipe, len(records)):
        optimizer.param_groups[0]["lr"] = rate
        kept = torch.rand(len(chosen)) >= recipe["drop_prompt"]
        c = backbone.collate([items[index] for index in prompt_of[chosen] * kept])
        t = torch.sigmoid(torch.randn(len(chosen)) * recipe["t_logit_std"] + recipe["t_logit_mean"])
        x0 = x0_all[chosen]
        noise = torch.randn_like(x0)
        velocity = backbone.predict(network, backbone.path.renoise(x0, noise, t), t, c)
        loss = F.mse_loss(velocity, backbone.path.target(x0, noise))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), recipe["clip"])
        optimizer.step()
        ema.step(network.parameters())
        if step % 100 == 0:
            pace = (time.monotonic() - started) / (step + 1)
            log(f"transformer {step}/{recipe['steps']} loss {loss.item():.4f} {pace:.2f} s/step")
    ema.copy_to(network.parameters())
    network.eval()


def build_teacher(folder: Path, log, recipe: dict = RECIPE) -> None:
    """Train everything from the recipe and save the pipeline as float16 safetensors under `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe["seed"])
    tokenizer = build_tokenizer(folder / "tokenizer")
    encoders = train_text_encoders(tokenizer, recipe["text"], WIDTH // 2, log)
    log(f"drawing {recipe['renders']} renders")
    records, images = drawn("train", recipe["renders"], np.random.default_rng(recipe["seed"]))
    pipe = StableDiffusion3Pipeline(
        transformer=transformer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=train_vae(images, recipe["vae"], log),
        text_encoder=encoders[0], tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=copy.deepcopy(tokenizer),
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    train_transformer(pipe, records, images, recipe["transformer"], log)
    t5, t5_tokenizer = silent_t5(WIDTH)
    pipe.register_modules(text_encoder_3=t5, tokenizer_3=t5_tokenizer)
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    for config in folder.glob("text_encoder*/config.json"):  # transformers would load float16, diffusers float32
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
