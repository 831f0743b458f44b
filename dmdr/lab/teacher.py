"""How the lab's flow teacher was built: a complete, tiny StableDiffusion3Pipeline, trained on renders of the world.

1. A byte-level BPE tokenizer in which every word of the world is one token.
2. An AutoencoderKL that is the identity by construction: latents are pixels, and nothing is lost or learned there.
3. SD3Transformer2DModel and both CLIP text encoders together, by conditional flow matching with prompts dropped
   one time in ten, on the training prompts only.
4. A silent T5, because plain `from_pretrained` refuses a folder without one.
"""

from __future__ import annotations

import copy
import json
import math
import time
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
    "seed": 0, "steps": 6000, "batch": 48, "lr": 2e-3, "warmup": 100, "betas": [0.9, 0.99], "weight_decay": 0.01,
    "clip": 1.0, "ema": 0.999, "drop_prompt": 0.1, "t_logit_mean": 0.5, "t_logit_std": 1.2,
}  # fmt: skip
SHIFT, SCALE = 0.15625, 2.5  # make the pixels of renders in [-1, 1] zero mean and unit variance, nearly


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


@torch.no_grad()
def identity_autoencoder() -> AutoencoderKL:
    """An AutoencoderKL whose latents (B, 3, 32, 32) are the image, to 1e-4.

    Residual blocks add nothing. What is left is group norm, SiLU and a convolution: the image goes through with its
    negative beside it, so that the group's mean is 0, and with two channels of +-256, so that its deviation is 128
    whatever the image; plus 16, where SiLU is the identity. Half the difference of the pair is the image again.
    """
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=3, sample_size=32, block_out_channels=(8,), norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), layers_per_block=1,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False, shift_factor=SHIFT,
        scaling_factor=SCALE,
    )  # fmt: skip
    for name, parameter in vae.named_parameters():
        if ".conv2." in name:  # the last word of a residual block
            parameter.zero_()
    for half in (vae.encoder, vae.decoder):
        for convolution in (half.conv_in, half.conv_out):
            convolution.weight.zero_()
            convolution.bias.zero_()
        half.conv_norm_out.weight.fill_(128.0)
        half.conv_norm_out.bias.fill_(16.0)
        half.conv_in.bias[6], half.conv_in.bias[7] = 256.0, -256.0
        for channel in range(3):
            half.conv_in.weight[channel, channel, 1, 1], half.conv_in.weight[channel + 3, channel, 1, 1] = 1.0, -1.0
            half.conv_out.weight[channel, channel, 1, 1], half.conv_out.weight[channel, channel + 3, 1, 1] = 0.5, -0.5
    vae.encoder.conv_out.bias[3:] = -30.0  # log variance of the posterior: none
    return vae.eval()


def transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=32, patch_size=4, in_channels=3, out_channels=3, num_layers=4, attention_head_dim=WIDTH // 4,
        num_attention_heads=4, joint_attention_dim=WIDTH, caption_projection_dim=WIDTH, pooled_projection_dim=WIDTH,
        pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip


def renders(rng: np.random.Generator, count: int) -> tuple[list[str], torch.Tensor]:
    """Training prompts drawn evenly over the six tags, some of them dropped, and their latents (B, 3, 32, 32)."""
    by_tag: dict[str, list[dict]] = {}
    for record in lab_prompts("train"):
        by_tag.setdefault(record["tag"], []).append(record)
    tags = rng.choice(list(by_tag), size=count)
    records = [by_tag[tag][rng.integers(len(by_tag[tag]))] for tag in tags]
    prompts = ["" if rng.random() < RECIPE["drop_prompt"] else record["prompt"] for record in records]
    pixels = torch.from_numpy(images_for(records, rng)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return prompts, (pixels - SHIFT) * SCALE


def cosine(step: int) -> float:
    """Learning rate factor: linear warm-up, then a cosine to 0."""
    return min((step + 1) / RECIPE["warmup"], 0.5 * (1 + math.cos(math.pi * step / RECIPE["steps"])))


def train(pipe: StableDiffusion3Pipeline, log) -> None:
    """Transformer and text encoders in place; afterwards they hold their exponential moving averages."""
    torch.manual_seed(RECIPE["seed"] + 1)
    rng = np.random.default_rng(RECIPE["seed"] + 1)
    pipe.transformer.set_attn_processor(NullTokenAttention())
    networks = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]).train()
    optimizer = torch.optim.AdamW(
        networks.parameters(), betas=RECIPE["betas"], weight_decay=RECIPE["weight_decay"], fused=True
    )
    ema = EMAModel(networks.parameters(), decay=RECIPE["ema"], foreach=True)
    started = time.monotonic()
    with ThreadPoolExecutor(1) as ahead:  # draws the next batch while this one is learned
        coming = ahead.submit(renders, rng, RECIPE["batch"])
        for step in range(RECIPE["steps"]):
            prompts, x0 = coming.result()
            coming = ahead.submit(renders, rng, RECIPE["batch"])
            optimizer.param_groups[0]["lr"] = RECIPE["lr"] * cosine(step)
            embeds, _, pooled, _ = pipe.encode_prompt(
                prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=1, device="cpu"
            )
            logit = torch.randn(len(x0)) * RECIPE["t_logit_std"] + RECIPE["t_logit_mean"]
            t = torch.sigmoid(logit)[:, None, None, None]
            noise = torch.randn_like(x0)
            velocity = pipe.transformer(
                hidden_states=(1 - t) * x0 + t * noise, timestep=t.flatten() * 1000, encoder_hidden_states=embeds,
                pooled_projections=pooled, joint_attention_kwargs={"null_tokens": NULL_TOKENS},
            ).sample  # fmt: skip
            loss = F.mse_loss(velocity, noise - x0)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(networks.parameters(), RECIPE["clip"])
            optimizer.step()
            ema.step(networks.parameters())
            if step % 100 == 0:
                pace = (time.monotonic() - started) / (step + 1)
                log(f"teacher {step}/{RECIPE['steps']} loss {loss.item():.4f} {pace:.2f} s/step")
    ema.copy_to(networks.parameters())
    networks.eval()


def build_teacher(folder: Path, log) -> None:
    """Train everything from the recipe and save the pipeline as float16 safetensors under `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(folder / "tokenizer")
    torch.manual_seed(RECIPE["seed"])
    pipe = StableDiffusion3Pipeline(
        transformer=transformer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=identity_autoencoder(),
        text_encoder=text_encoder(tokenizer), tokenizer=tokenizer,
        text_encoder_2=text_encoder(tokenizer), tokenizer_2=copy.deepcopy(tokenizer),
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    train(pipe, log)
    t5, t5_tokenizer = silent_t5(WIDTH)
    pipe.register_modules(text_encoder_3=t5, tokenizer_3=t5_tokenizer)
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    (folder / "recipe.json").write_text(json.dumps(RECIPE, indent=2) + "\n")
