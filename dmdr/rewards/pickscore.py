"""PickScore (Kirstain et al. 2023): CLIP ViT-H/14 tuned on which of two images people picked.

Its score is logit_scale times the cosine, about 20 to 23.
"""

from __future__ import annotations

from pathlib import Path

from dmdr.rewards.dual_encoder import DualEncoder
from dmdr.rewards.transformers_clip import TransformersCLIP, read_sizes

PUBLISHED = read_sizes(text=(1024, 24, 16), vision=(1280, 32, 16))


def load_pickscore(path: Path | None, device: str) -> DualEncoder:
    """From a folder of transformers; None: without weights, for the device "meta".

    Raises:
        DataError: the folder is damaged, or is another model's.
    """
    clip = TransformersCLIP(path, device, PUBLISHED)
    scale = 1.0 if path is None else clip.model.logit_scale.exp().item()
    return DualEncoder("pickscore", clip.encode_images, clip.encode_prompts, scale)
