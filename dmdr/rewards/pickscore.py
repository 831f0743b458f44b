"""PickScore (Kirstain et al. 2023): CLIP ViT-H/14, fine-tuned on the choices of people between two images.

Its score is logit_scale times the cosine, about 20 to 23.
"""

from __future__ import annotations

from pathlib import Path

from dmdr.rewards.dual_encoder import DualEncoder
from dmdr.rewards.transformers_clip import CLIPSizes, EncoderSizes, TransformersCLIP

VIT_H_14 = CLIPSizes(text=EncoderSizes(1024, 24, 16), vision=EncoderSizes(1280, 32, 16))


def load_pickscore(path: Path | None, device: str) -> DualEncoder:
    """path: a folder that transformers saved; None on the device "meta", which needs no weights.

    Raises:
        DataError: the folder is damaged, or holds another model.
    """
    clip = TransformersCLIP(path, device, VIT_H_14)
    scale = 1.0 if path is None else clip.model.logit_scale.exp().item()
    return DualEncoder("pickscore", clip.encode_images, clip.encode_prompts, scale)
