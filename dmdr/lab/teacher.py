"""How the lab's flow teacher was built: a complete, tiny StableDiffusion3Pipeline, trained on renders of the world.

1. A byte-level BPE tokenizer in which every word of the world is one token.
2. An AutoencoderKL, 32x32x3 -> 8x8x8, L1 plus a KL strong enough that its decoder draws crisp shapes from imprecise
   latents: a small transformer learns to place and name shapes long before it learns to draw their edges.
3. SD3Transformer2DModel and both CLIP text encoders together, by conditional flow matching with prompts dropped
   one time in ten, on the training prompts only.
4. A silent T5, because plain `from_pretrained` refuses a folder without one.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from dmdr.backbones.null_tokens import NullTokenAttention
from dmdr.backbones.silent_t5 import silent_t5
from dmdr.lab.prompts import lab_prompts
from dmdr.lab.world import images_for

TOKENS = 16  # prompt length, start and end included; the longest lab prompt has 13
NULL_TOKENS = 256  # T5's length in StableDiffusion3Pipeline
WIDTH = 96
RECIPE = {
    "seed": 0,
    "vae": {"steps": 2000, "batch": 32, "lr": 3e-3, "warmup": 100, "kl": 1e-5},
    "transformer": {
        "steps": 4000, "batch": 48, "lr": 2e-3, "warmup": 100, "betas": [0.9, 0.99], "weight_decay": 0.01, "clip": 1.0,
        "ema": 0.999, "drop_prompt": 0.1, "t_logit_mean": 0.5, "t_logit_std": 1.2,
    },
}  # fmt: skip


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer over bytes whose merges make each word of the training prompts one token."""
    words = sorted({word for record in lab_prompts("train") for word in record["prompt"].split()})
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"], show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(words * 2, trainer)
    state = json.loads(bpe.to_str())["model"]
    vocab = state["vocab"]
    for letter in pre_tokenizers.ByteLevel.alphabet():
        vocab.setdefault(letter + "</w>", len(vocab))
    tokenizer = CLIPTokenizer(
        vocab=vocab, merges=[tuple(pair) for pair in state["merges"]], model_max_length=TOKENS,
        pad_token="<|endoftext|>",
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    lengths = [len(tokenizer(word).input_ids) for word in words]
    assert set(lengths) == {3}, f"a word of the world is not one token: {words[int(np.argmax(lengths))]}"
    return tokenizer


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH // 2, intermediate_size=WIDTH, projection_dim=WIDTH // 2,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


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


def renders(rng: np.random.Generator, count: int, drop: float = 0.0) -> tuple[list[str], torch.Tensor]:
    """Training prompts drawn evenly over the tags, a share of them dropped, and images (B, 3, 32, 32) in [-1, 1]."""
    by_tag: dict[str, list[dict]] = {}
    for record in lab_prompts("train"):
        by_tag.setdefault(record["tag"], []).append(record)
    tags = rng.choice(list(by_tag), size=count)
    records = [by_tag[tag][rng.integers(len(by_tag[tag]))] for tag in tags]
    prompts = ["" if rng.random() < drop else record["prompt"] for record in records]
    return prompts, torch.from_numpy(images_for(records, rng)).permute(0, 3, 1, 2).float() / 127.5 - 1


def batches(recipe: dict, seed: int, drop: float = 0.0) -> Iterator[tuple[float, list[str], torch.Tensor]]:
    """(learning rate, prompts, images) for each step; the next batch is drawn while this one is learned.

    The rate warms up linearly, then falls by a cosine to 0.
    """
    rng, steps = np.random.default_rng(seed), recipe["steps"]
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(renders, rng, recipe["batch"], drop)
        for step in range(steps):
            prompts, images = coming.result()
            coming = ahead.submit(renders, rng, recipe["batch"], drop)
            factor = min((step + 1) / recipe["warmup"], 0.5 * (1 + math.cos(math.pi * step / steps)))
            yield recipe["lr"] * factor, prompts, images


def train_vae(log) -> AutoencoderKL:
    """The autoencoder, with the shift and scale that give its active latent channels zero mean and unit variance."""
    recipe, seed = RECIPE["vae"], RECIPE["seed"]
    torch.manual_seed(seed)
    vae = autoencoder()
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0.0, fused=True)
    for step, (rate, _, images) in enumerate(batches(recipe, seed)):
        optimizer.param_groups[0]["lr"] = rate
        posterior = vae.encode(images).latent_dist
        loss = F.l1_loss(vae.decode(posterior.sample()).sample, images) + recipe["kl"] * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            log(f"vae {step}/{recipe['steps']} loss {loss.item():.4f}")
    with torch.no_grad():
        means = vae.encode(renders(np.random.default_rng(seed), 512)[1]).latent_dist.mean
    spread = means.std(dim=(0, 2, 3))
    active = means[:, spread > 0.25 * spread.max()]  # the KL leaves some channels without information
    vae.register_to_config(shift_factor=float(active.mean()), scaling_factor=float(1 / active.std()))
    return vae.eval()


def train_transformer(pipe: StableDiffusion3Pipeline, log) -> None:
    """Transformer and text encoders in place; afterwards they hold their exponential moving averages."""
    recipe, seed, vae = RECIPE["transformer"], RECIPE["seed"] + 1, pipe.vae
    torch.manual_seed(seed)
    pipe.transformer.set_attn_processor(NullTokenAttention())
    networks = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]).train()
    optimizer = torch.optim.AdamW(
        networks.parameters(), betas=recipe["betas"], weight_decay=recipe["weight_decay"], fused=True
    )
    ema = EMAModel(networks.parameters(), decay=recipe["ema"], foreach=True)
    started = time.monotonic()
    for step, (rate, prompts, images) in enumerate(batches(recipe, seed, recipe["drop_prompt"])):
        optimizer.param_groups[0]["lr"] = rate
        with torch.no_grad():
            x0 = (vae.encode(images).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=1, device="cpu"
        )
        t = torch.sigmoid(torch.randn(len(x0)) * recipe["t_logit_std"] + recipe["t_logit_mean"])[:, None, None, None]
        noise = torch.randn_like(x0)
        velocity = pipe.transformer(
            hidden_states=(1 - t) * x0 + t * noise, timestep=t.flatten() * 1000, encoder_hidden_states=embeds,
            pooled_projections=pooled, joint_attention_kwargs={"null_tokens": NULL_TOKENS},
        ).sample  # fmt: skip
        loss = F.mse_loss(velocity, noise - x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), recipe["clip"])
        optimizer.step()
        ema.step(networks.parameters())
        if step % 100 == 0:
            pace = (time.monotonic() - started) / (step + 1)
            log(f"teacher {step}/{recipe['steps']} loss {loss.item():.4f} {pace:.2f} s/step")
    ema.copy_to(networks.parameters())
    networks.eval()


def build_teacher(folder: Path, log) -> None:
    """Train everything from the recipe and save the pipeline as float16 safetensors under `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(folder / "tokenizer")
    vae = train_vae(log)
    torch.manual_seed(RECIPE["seed"])
    pipe = StableDiffusion3Pipeline(
        transformer=transformer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
        text_encoder=text_encoder(tokenizer), tokenizer=tokenizer,
        text_encoder_2=text_encoder(tokenizer), tokenizer_2=copy.deepcopy(tokenizer),
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    train_transformer(pipe, log)
    t5, t5_tokenizer = silent_t5(WIDTH)
    pipe.register_modules(text_encoder_3=t5, tokenizer_3=t5_tokenizer)
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    for config in folder.glob("text_encoder*/config.json"):  # transformers would load float16, diffusers float32
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    (folder / "recipe.json").write_text(json.dumps(RECIPE, indent=2) + "\n")
