"""A CLIP in transformers' layout, for the rewards whose authors published theirs that way."""

from __future__ import annotations

from pathlib import Path

import torch

from dmdr.errors import DataError
from dmdr.rewards.preprocess import cropped, normalized


class TransformersCLIP:
    """Both encoders of a CLIPModel folder, frozen, in float32.

    Raises:
        DataError: the folder is damaged, lacks a tensor or is another model's.
    """

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import CLIPModel, CLIPTokenizer

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
        pixels = normalized(cropped(images, self.model.config.vision_config.image_size))
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        """-> (B, D); a prompt is cut where the encoder ends."""
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return self.model.get_text_features(**tokens.to(self.model.device)).pooler_output
