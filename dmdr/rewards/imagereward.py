"""ImageReward (Xu et al. 2023): a BLIP whose text encoder looks at the image, and an MLP on its first token.

1. The authors' package needs functions that transformers no longer has. transformers has the same BLIP, so this file
   only renames the tensors (`make parity-imagereward` compares the two on shared weights).
2. The MLP has no activations and its dropouts are off, so it is one affine map. The published mean and standard
   deviation of the scores are multiplied into it: scores lie in about -2 to 2.
3. Image and prompt meet in every layer of the text encoder, so no features of a prompt can be kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from dmdr.config.prompt_record import PromptRecord
from dmdr.errors import DataError
from dmdr.rewards.checkpoint import fill_module, read_linear, read_tensors
from dmdr.rewards.preprocess import normalize, resize_and_crop
from dmdr.transfer import send_to

if TYPE_CHECKING:
    from transformers import BertTokenizer

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores (THUDM/ImageReward, ImageReward.py)
LONGEST = 35  # tokens of a prompt


@dataclass(frozen=True)
class VisionSizes:
    """The image encoder: a ViT-L/16 on images of 224 pixels."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 16


@dataclass(frozen=True)
class TextSizes:
    """The text encoder: BERT base, with cross-attention to the states of the image encoder."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    encoder_hidden_size: int = 1024
    vocab_size: int = 30524
    max_position_embeddings: int = 512


VISION, TEXT = VisionSizes(), TextSizes()
RENAMES = (  # BLIP's names of tensors, and those of transformers
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm(\d)\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^blip\.text_encoder\.", "text."),
)
UNUSED = re.compile(r"^(blip\.(vision|text)_proj\.|blip\.text_encoder\.embeddings\.position_ids$|mlp\.)")


class Blip(nn.Module):
    """Both encoders, as transformers has them, with fresh weights."""

    def __init__(self) -> None:
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipTextModel, BlipVisionModel

        super().__init__()
        vision = BlipVisionConfig(
            hidden_size=VISION.hidden_size,
            intermediate_size=VISION.intermediate_size,
            num_hidden_layers=VISION.num_hidden_layers,
            num_attention_heads=VISION.num_attention_heads,
            image_size=VISION.image_size,
            patch_size=VISION.patch_size,
            layer_norm_eps=1e-6,
        )
        text = BlipTextConfig(
            hidden_size=TEXT.hidden_size,
            intermediate_size=TEXT.intermediate_size,
            num_hidden_layers=TEXT.num_hidden_layers,
            num_attention_heads=TEXT.num_attention_heads,
            encoder_hidden_size=TEXT.encoder_hidden_size,
            vocab_size=TEXT.vocab_size,
            max_position_embeddings=TEXT.max_position_embeddings,
            layer_norm_eps=1e-12,
            is_decoder=True,
        )
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """pixels (B, 3, S, S), ids and mask (B, L) -> the state of the text's first token, (B, D)."""
        image_states = self.vision(pixel_values=pixels).last_hidden_state
        output = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=image_states)
        return output.last_hidden_state[:, 0]


class ImageReward:
    """The normalised score of an image under its prompt.

    Args:
        file: the checkpoint; vocabulary: BERT's vocab.txt. Both are None on the device "meta", which needs no weights.

    Raises:
        DataError: the weights or the vocabulary are damaged, or belong to another model.
    """

    name, differentiable = "imagereward", True
    tokenizer: BertTokenizer | None  # None on the device "meta"

    def __init__(self, file: Path | None, vocabulary: Path | None, device: str) -> None:
        self.device = torch.device(device)
        if file is None or vocabulary is None:
            self.tokenizer = None
            with self.device:
                self.blip = Blip().requires_grad_(False).eval()
            weight, bias = torch.zeros(TEXT.hidden_size), torch.zeros(())
        else:
            self.tokenizer, weights = build_tokenizer(vocabulary), read_tensors(file)
            weight, bias = read_linear(weights, "mlp.layers.", file)
            self.blip = Blip()
            fill_module(self.blip, rename_keys(weights), file, "ImageReward's BLIP")
            self.blip.to(device)
        self.weight = (weight / STD).float().to(device)
        self.bias = ((bias - MEAN) / STD).float().to(device)

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[PromptRecord] = ()) -> torch.Tensor:
        """images (B, 3, H, W) in [0, 1] -> (B,) float32. A prompt is cut after LONGEST tokens."""
        ids, mask = self.tokenize(prompts)
        half = images.is_cuda and torch.is_grad_enabled()  # training does not report these scores
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            features = self.blip(normalize(resize_and_crop(images, VISION.image_size)), ids, mask)
        return features.float() @ self.weight + self.bias

    def tokenize(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ids and mask of the prompts, (B, L) with L at most LONGEST. On "meta" nothing is padded: the mask is None."""
        if self.tokenizer is None:
            return torch.ones(len(prompts), LONGEST, dtype=torch.long, device=self.device), None
        batch = self.tokenizer(prompts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        return send_to(batch.input_ids, self.device), send_to(batch.attention_mask, self.device)


def build_tokenizer(vocabulary: Path) -> BertTokenizer:
    """BERT's tokenizer from its vocabulary, a word a line.

    Raises:
        DataError: the file is no vocabulary of BERT, or has more words than ImageReward's text encoder.
    """
    from transformers import BertTokenizer

    words = vocabulary.read_text(encoding="utf-8", errors="replace").splitlines()
    if not {"[PAD]", "[UNK]", "[CLS]", "[SEP]"} <= set(words):
        raise DataError(f"weights {vocabulary} are not a vocabulary of BERT ({len(words):,} lines); fetch them again")
    if len(words) > TEXT.vocab_size:
        raise DataError(
            f"weights {vocabulary} have {len(words):,} words, but ImageReward knows {TEXT.vocab_size:,}; give "
            "bert-base-uncased's vocab.txt"
        )
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)})


def rename_keys(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint's BLIP, under the names of transformers."""
    renamed = {}
    for key, tensor in weights.items():
        if not UNUSED.match(key):
            name = key
            for pattern, replacement in RENAMES:
                name = re.sub(pattern, replacement, name)
            renamed[name] = tensor
    return renamed


def load_imagereward(file: Path | None, vocabulary: Path | None, device: str) -> ImageReward:
    """file: the checkpoint; vocabulary: BERT's vocab.txt. Both are None on the device "meta"."""
    return ImageReward(file, vocabulary, device)
