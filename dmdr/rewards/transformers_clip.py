"""A CLIP in the format of transformers, for the rewards that were published in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dmdr.rewards.checkpoint import load_pretrained, refuse_unreadable
from dmdr.rewards.preprocess import normalize, resize_and_crop

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer


@dataclass(frozen=True)
class EncoderSizes:
    """The sizes of one of CLIP's encoders."""

    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class CLIPSizes:
    """The sizes of a published CLIP, on images of 224 pixels in patches of 14.

    The features are as wide as the text encoder. The inner layer of an MLP is four times as wide as its encoder.
    """

    text: EncoderSizes
    vision: EncoderSizes

    def to_config(self) -> CLIPConfig:
        from transformers import CLIPConfig

        text, vision = (
            {
                "hidden_size": each.width,
                "num_hidden_layers": each.layers,
                "num_attention_heads": each.heads,
                "intermediate_size": 4 * each.width,
                "projection_dim": self.text.width,
            }
            for each in (self.text, self.vision)
        )
        return CLIPConfig(text_config=text, vision_config={**vision, "patch_size": 14}, projection_dim=self.text.width)


class TransformersCLIP:
    """Both encoders of a CLIPModel folder, frozen, in float32.

    Args:
        folder: None on the device "meta", which needs no weights.
        published: the sizes of the published model, which are built on that device.

    Raises:
        DataError: the folder is damaged, lacks a tensor or holds another model.
    """

    model: CLIPModel
    tokenizer: CLIPTokenizer | None  # None on the device "meta"
    width: int  # D, of the features
    image_size: int  # side in pixels
    longest: int  # tokens of a prompt that the encoder reads

    def __init__(self, folder: Path | None, device: str, published: CLIPSizes) -> None:
        from transformers import CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

        if folder is None:
            self.tokenizer = None
            with torch.device(device):
                self.model = CLIPModel(published.to_config()).requires_grad_(False).eval()
        else:
            with refuse_unreadable(CLIPModel, folder):
                self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            self.model = load_pretrained(CLIPModel, folder, device)
        config = self.model.config
        assert isinstance(config.vision_config, CLIPVisionConfig) and isinstance(config.text_config, CLIPTextConfig)
        assert isinstance(config.vision_config.image_size, int) and config.projection_dim is not None
        self.width, self.image_size = config.projection_dim, config.vision_config.image_size
        self.longest = config.text_config.max_position_embeddings

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D)."""
        pixels = normalize(resize_and_crop(images, self.image_size))
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        """B prompts -> (B, D). A prompt that is longer than the encoder reads is cut."""
        if self.tokenizer is None:
            blank = torch.zeros(len(prompts), self.longest, dtype=torch.int64, device=self.model.device)
            return self.model.get_text_features(blank).pooler_output  # no mask: meta has no values to look at
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        return self.model.get_text_features(**tokens.to(self.model.device)).pooler_output
