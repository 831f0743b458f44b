"""ImageReward (Xu et al. 2023): a BLIP whose text encoder looks at the image, and an MLP on its first token.

1. The author's package asks for functions that transformers no longer has. Its BLIP is transformers' own, so that only
   the tensors' names are changed here (`make parity-imagereward` compares the two on shared weights).
2. The MLP has no activations (its dropouts are off), so it is one affine map, with the published mean and standard
   deviation of the scores in it: about -2 to 2.
3. Image and prompt meet in every layer, so no features of a prompt can be kept.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from dmdr.errors import DataError
from dmdr.rewards.checkpoint import fill_module, read_linear, read_tensors
from dmdr.rewards.preprocess import normalize, resize_and_crop

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores (THUDM/ImageReward, ImageReward.py)
LONGEST = 35  # tokens of a prompt
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "encoder_hidden_size": 1024,
    "vocab_size": 30524,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
}
NAMES = (  # BLIP's names of tensors, and transformers'
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
        self.vision = BlipVisionModel(BlipVisionConfig(**VISION))
        self.text = BlipTextModel(BlipTextConfig(**TEXT, is_decoder=True), add_pooling_layer=False)

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """pixels (B, 3, S, S), ids and mask (B, L) -> the text's first token, (B, D)."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen)
        return read.last_hidden_state[:, 0]


class ImageReward:
    """The normalised score of an image under its prompt.

    Args:
        file, vocabulary: the checkpoint, and BERT's vocab.txt; None for the device "meta", which has no weights.

    Raises:
        DataError: the weights or the vocabulary are damaged, or are another model's.
    """

    name, differentiable = "imagereward", True

    def __init__(self, file: Path | None, vocabulary: Path | None, device: str) -> None:
        self.device, self.tokenizer = torch.device(device), None
        if file is None or vocabulary is None:
            with self.device:
                self.blip = Blip().requires_grad_(False).eval()
            weight, bias = torch.zeros(TEXT["hidden_size"]), torch.zeros(())
        else:
            self.tokenizer, found = build_tokenizer(vocabulary), read_tensors(file)
            weight, bias = read_linear(found, "mlp.layers.", file)
            self.blip = Blip()
            fill_module(self.blip, rename_keys(found), file, "ImageReward's BLIP")
            self.blip.to(device)
        self.weight = (weight / STD).float().to(device)
        self.bias = ((bias - MEAN) / STD).float().to(device)

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """images (B, 3, H, W) in [0, 1] -> (B,) float32; a prompt is cut after LONGEST tokens."""
        ids, mask = self.tokens(prompts)
        half = images.is_cuda and torch.is_grad_enabled()  # a gradient follows the reward and does not report it
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            features = self.blip(normalize(resize_and_crop(images, VISION["image_size"])), ids, mask)
        return features.float() @ self.weight + self.bias

    def tokens(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ids and mask of the prompts, (B, L), L at most LONGEST; no mask: nothing is padded."""
        if self.tokenizer is None:
            return torch.ones(len(prompts), LONGEST, dtype=torch.long, device=self.device), None
        found = self.tokenizer(prompts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        return found.input_ids.to(self.device), found.attention_mask.to(self.device)


def build_tokenizer(vocabulary: Path):
    """BERT's, from its list of words.

    Raises:
        DataError: the file is not one.
    """
    from transformers import BertTokenizer

    words = vocabulary.read_text(encoding="utf-8", errors="replace").splitlines()
    if not {"[PAD]", "[UNK]", "[CLS]", "[SEP]"} <= set(words):
        raise DataError(f"weights {vocabulary} are not a vocabulary of BERT ({len(words):,} lines); fetch them again")
    if len(words) > TEXT["vocab_size"]:
        raise DataError(
            f"weights {vocabulary} have {len(words):,} words, ImageReward knows {TEXT['vocab_size']:,}; give "
            "bert-base-uncased's vocab.txt"
        )
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)})


def rename_keys(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The BLIP's tensors under transformers' names."""
    names = {}
    for name, tensor in found.items():
        if not UNUSED.match(name):
            for old, new in NAMES:
                name = re.sub(old, new, name)
            names[name] = tensor
    return names


def load_imagereward(file: Path | None, vocabulary: Path | None, device: str) -> ImageReward:
    """None: without weights, for the device "meta"."""
    return ImageReward(file, vocabulary, device)
