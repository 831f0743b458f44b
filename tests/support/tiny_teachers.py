"""Teachers of each family with random weights, each a complete pipeline folder that diffusers wrote."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dmdr.backbones.protocol import Backbone


@cache
def _load_once(folder: Path) -> DiffusionPipeline:
    from dmdr.teacher.load import load_pipeline

    return load_pipeline(folder)


def copy_teacher(folder: Path, resolution: int | None = None) -> Backbone:
    """What `load_teacher` loads, but read from disk once a session: each call gives a copy of its own."""
    from dmdr.teacher.load import build_backbone

    return build_backbone(copy.deepcopy(_load_once(folder)), resolution)


@pytest.fixture(scope="session")
def tiny_sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusion3Pipeline with random weights (16x16 pixels, 8x8x4 latents), saved by diffusers itself."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            vae=_flow_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=_unprojected(_text_encoder(12, 12)),
            tokenizer=_byte_tokenizer(),
            text_encoder_2=_text_encoder(20, 20),
            tokenizer_2=_byte_tokenizer(),
            text_encoder_3=_t5_encoder(),
            tokenizer_3=_t5_tokenizer(),
        )
    folder = tmp_path_factory.mktemp("teacher") / "tiny-sd3"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd3_without_t5_folder(tiny_sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without T5, so that attention sees a quarter of the tokens: for tests that train and know of no text."""
    from diffusers import StableDiffusion3Pipeline

    folder = tmp_path_factory.mktemp("teacher") / "tiny-sd3-without-t5"
    without = {"text_encoder_3": None, "tokenizer_3": None}
    StableDiffusion3Pipeline.from_pretrained(tiny_sd3_folder, **without).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionXLPipeline with random weights (16x16 pixels, 8x8x4 latents), saved by diffusers itself."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 2),
            norm_num_groups=4,
            cross_attention_dim=32,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=40,
        )
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            sample_size=16,
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            scaling_factor=1.5,
        )
        first = _text_encoder(12)
        pipeline = StableDiffusionXLPipeline(
            unet=unet,
            vae=vae,
            text_encoder=CLIPTextModel(first.config),
            tokenizer=_byte_tokenizer(),
            text_encoder_2=_text_encoder(20),
            tokenizer_2=_byte_tokenizer(),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                timestep_spacing="leading",
                steps_offset=1,
            ),
        )
    folder = tmp_path_factory.mktemp("teacher") / "tiny-sdxl"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_z_image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ZImagePipeline with random weights (latents of 4 channels, half the size of the images)."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 64, 64],
        )
        with torch.no_grad():  # which diffusers leaves uninitialised or at zero
            for name, parameter in transformer.named_parameters():
                if name.endswith("pad_token"):
                    parameter.normal_()
        pipeline = ZImagePipeline(
            transformer=transformer,
            vae=_flow_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            text_encoder=_language_model(),
            tokenizer=_chat_tokenizer(),
        )
    folder = tmp_path_factory.mktemp("teacher") / "tiny-z-image"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guidance-distilled FluxPipeline with random weights (latents of 4 channels, half the size of the images)."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
        pipeline = FluxPipeline(
            transformer=transformer,
            vae=_flow_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            text_encoder=CLIPTextModel(_text_encoder().config),
            tokenizer=_byte_tokenizer(),
            text_encoder_2=_t5_encoder(),
            tokenizer_2=_t5_tokenizer(512),
        )
    folder = tmp_path_factory.mktemp("teacher") / "tiny-flux"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["sd3", "sdxl"])
def tiny_folder(request: pytest.FixtureRequest) -> Path:
    """A tiny teacher of each family in turn: flow, denoising."""
    return request.getfixturevalue(f"tiny_{request.param}_folder")


def _flow_vae():
    """An autoencoder of the flow families: no quantising convolutions, latents with a shift."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=16,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )


def _chat_tokenizer():
    """A Qwen2 tokenizer whose vocabulary is the 256 bytes, with a chat template."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": words[-2:]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    return tokenizer


def _language_model():
    """A two-layer Qwen3 of width 16 for `_chat_tokenizer`."""
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(
        Qwen3Config(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=1024,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()


def _byte_tokenizer():
    """A CLIPTokenizer whose vocabulary is the 256 bytes, inside and at the end of a word, and no merges."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=[],
        model_max_length=77,
        pad_token="<|endoftext|>",
    )


def _t5_tokenizer(longest: int = 256):
    """A T5 tokenizer that spells lower-case letters."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=longest)


def _t5_encoder():
    """A one-layer T5 encoder as wide as the transformer's context."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=30,
            d_model=32,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def _text_encoder(width: int = 16, projection: int = 16):
    """A two-layer CLIP text encoder for `_byte_tokenizer`; a family's two are told apart by their widths."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=width,
            intermediate_size=32,
            projection_dim=projection,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    )


def _unprojected(encoder):
    """With the identity for a projection, as the first text encoder of SD3 has it."""
    import torch

    with torch.no_grad():
        encoder.text_projection.weight.copy_(torch.eye(len(encoder.text_projection.weight)))
    return encoder
