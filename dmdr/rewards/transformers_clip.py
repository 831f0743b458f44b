"""A CLIP in transformers' layout, for the rewards whose authors published theirs that way."""

from __future__ import annotations

from pathlib import Path

import torch

from dmdr.errors import DataError
from dmdr.rewards.preprocess import normalize, resize_and_crop


def read_sizes(text: tuple[int, int, int], vision: tuple[int, int, int]) -> dict:
    """A CLIPConfig's keywords from (width, layers, heads) of both encoders, patches of 14 of an image of 224; the text
    encoder's width is that of the features, and an inner layer is four times as wide as its own."""
    width, layers, heads = zip(text, vision, strict=True)
    common = [
        {
            "hidden_size": width[n],
            "num_hidden_layers": layers[n],
            "num_attention_heads": heads[n],
            "intermediate_size": 4 * width[n],
            "projection_dim": width[0],
        }
        for n in (0, 1)
    ]
    return {"text_config": common[0], "vision_config": {**common[1], "patch_size": 14}, "projection_dim": width[0]}


class TransformersCLIP:
    """Both encoders of a CLIPModel folder, frozen, in float32.

    Args:
        folder: None for the device "meta", which has no weights.
        published: how the model that was published is built, for that device.

    Raises:
        DataError: the folder is damaged, lacks a tensor or is another model's.
    """

    def __init__(self, folder: Path | None, device: str, published: dict) -> None:
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

        if folder is None:
            self.tokenizer = None
            with torch.device(device):
                self.model = CLIPModel(CLIPConfig(**published)).requires_grad_(False).eval()
            return
        try:
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            self.model, found = CLIPModel.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())[:200]
            raise DataError(f"weights {folder} are not a CLIPModel that loads ({said}); fetch them again") from error
        if found["missing_keys"]:
            raise DataError(f"weights {folder} lack the tensor {min(found['missing_keys'])}; fetch them again")
        self.model.requires_grad_(False).eval().to(device)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D)."""
        pixels = normalize(resize_and_crop(images, self.model.config.vision_config.image_size))
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        """-> (B, D); a prompt is cut where the encoder ends."""
        longest = self.model.config.text_config.max_position_embeddings
        if self.tokenizer is None:
            blank = torch.zeros(len(prompts), longest, dtype=torch.int64, device=self.model.device)
            return self.model.get_text_features(blank, torch.ones_like(blank)).pooler_output
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return self.model.get_text_features(**tokens.to(self.model.device)).pooler_output
