"""Rewards' models, small and random, in the files that the real ones come as; and pictures to score."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from dmdr.rewards import imagereward

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "cat", "two", "dogs", "under", "table", "of", "fox"]
WIDTH, SEEN = 24, 32  # of the text states and the image states of a tiny ImageReward


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with a hard edge: what antialiasing and padding get wrong is visible.

    Neither black nor white: where a bicubic overshoots, bytes would clamp it.
    """
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(64, 192, (7, 5, 3), dtype=np.uint8))
    picture = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    picture[height // 3 : height // 2, : width // 2] = 200
    return Image.fromarray(picture)


def tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def predictor(width: int, seed: int = 0) -> torch.nn.Sequential:
    """LAION's MLP, whose dropouts are off."""
    torch.manual_seed(seed)
    widths = (width, 1024, 128, 64, 16, 1)
    layers = [torch.nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    drop = torch.nn.Dropout
    return torch.nn.Sequential(layers[0], drop(0.2), layers[1], drop(0.2), layers[2], drop(0.1), *layers[3:]).eval()


@pytest.fixture
def tiny_open_clip(tmp_path):
    """A folder in open_clip's layout, and the model in it."""

    def make(seed: int = 0, name: str = "clip", width: int = 32):
        config = {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "layers": 2, "width": width, "head_width": 16, "patch_size": 8},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
        }
        torch.manual_seed(seed)
        model = open_clip.CLIP(**config).eval()
        folder = tmp_path / name
        folder.mkdir()
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        torch.save({"state_dict": model.state_dict()}, folder / "open_clip_pytorch_model.bin")
        return folder, model

    return make


@pytest.fixture
def tiny_transformers_clip(tmp_path):
    """A CLIPModel folder of transformers, with open_clip's vocabulary as the real ones have."""

    def make(name: str = "hf", seed: int = 0):
        torch.manual_seed(seed)
        text = CLIPTextConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=16,
            vocab_size=49408,
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )
        vision_tower = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=16,
            image_size=32,
            patch_size=8,
        )
        config = CLIPConfig(text_config=text.to_dict(), vision_config=vision_tower.to_dict(), projection_dim=16)
        model = CLIPModel(config).eval()
        folder = tmp_path / name
        model.save_pretrained(folder)
        tokenizer = open_clip.SimpleTokenizer()
        merges = "\n".join(" ".join(pair) for pair in tokenizer.bpe_ranks)
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
        (folder / "vocab.json").write_text(json.dumps(specials(tokenizer.encoder)), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
        return folder, model

    return make


def specials(vocabulary: dict[str, int]) -> dict[str, int]:
    """open_clip's names of the two special tokens to transformers'."""
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return {names.get(word, word): number for word, number in vocabulary.items()}


@pytest.fixture
def tiny_imagereward(tmp_path, monkeypatch) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Addresses of a checkpoint and a vocabulary, and the tensors under the package's names."""
    vision = imagereward.VisionSizes(
        hidden_size=SEEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    text_sizes = imagereward.TextSizes(
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        encoder_hidden_size=SEEN,
        vocab_size=len(WORDS) + 2,
        max_position_embeddings=40,
    )
    monkeypatch.setattr(imagereward, "VISION", vision)
    monkeypatch.setattr(imagereward, "TEXT", text_sizes)
    generator = torch.Generator().manual_seed(11)
    found: dict[str, torch.Tensor] = {}

    def layer(name: str, out: int, *into: int) -> None:
        found[f"{name}.weight"] = 0.3 * torch.randn(out, *into, generator=generator)
        found[f"{name}.bias"] = 0.3 * torch.randn(out, generator=generator)

    image, text = "blip.visual_encoder", "blip.text_encoder"
    found[f"{image}.cls_token"] = torch.randn(1, 1, SEEN, generator=generator)
    found[f"{image}.pos_embed"] = torch.randn(1, 17, SEEN, generator=generator)
    layer(f"{image}.patch_embed.proj", SEEN, 3, 8, 8)
    layer(f"{image}.norm", SEEN)
    for n in range(2):
        for norm in ("norm1", "norm2"):
            layer(f"{image}.blocks.{n}.{norm}", SEEN)
        for name, out, into in (
            ("attn.qkv", 3 * SEEN, SEEN),
            ("attn.proj", SEEN, SEEN),
            ("mlp.fc1", 48, SEEN),
            ("mlp.fc2", SEEN, 48),
        ):
            layer(f"{image}.blocks.{n}.{name}", out, into)
        for attention, into in (("attention", WIDTH), ("crossattention", SEEN)):
            at = f"{text}.encoder.layer.{n}.{attention}"
            layer(f"{at}.self.query", WIDTH, WIDTH)
            layer(f"{at}.self.key", WIDTH, into)
            layer(f"{at}.self.value", WIDTH, into)
            layer(f"{at}.output.dense", WIDTH, WIDTH)
            layer(f"{at}.output.LayerNorm", WIDTH)
        layer(f"{text}.encoder.layer.{n}.intermediate.dense", 40, WIDTH)
        layer(f"{text}.encoder.layer.{n}.output.dense", WIDTH, 40)
        layer(f"{text}.encoder.layer.{n}.output.LayerNorm", WIDTH)
    found[f"{text}.embeddings.word_embeddings.weight"] = torch.randn(len(WORDS) + 2, WIDTH, generator=generator)
    found[f"{text}.embeddings.position_embeddings.weight"] = torch.randn(40, WIDTH, generator=generator)
    found[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
    layer(f"{text}.embeddings.LayerNorm", WIDTH)
    for name, into in (("vision_proj", SEEN), ("text_proj", WIDTH)):  # which its score does not use
        layer(f"blip.{name}", 256, into)
    found |= {f"mlp.layers.{key}": 3 * value for key, value in predictor(WIDTH, 12).state_dict().items()}
    torch.save(found, tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return {"imagereward": str(tmp_path / "ImageReward.pt"), "bert-vocabulary": str(tmp_path / "vocab.txt")}, found
