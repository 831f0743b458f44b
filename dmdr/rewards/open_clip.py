"""Rewards that are open_clip models: DFN-CLIP and HPSv2.1, which DMDR trains on, and the CLIP score of its tables.

1. Each is 100 times a cosine, the scale on which the paper's tables print them.
2. HPSv2.1 is read by plain open_clip with HPSv2's own preprocessing, which is not open_clip's; the hpsv2 package, whose
   pins break others, is not needed.
3. The CLIP score is that of ViT-g/14 trained on LAION-2B, on the prompt itself (DMD2 puts "A photo depicts" before it).
4. A folder in open_clip's own layout (open_clip_config.json beside the weights) says its architecture itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dmdr.errors import DataError, InputMissing
from dmdr.rewards.checkpoint import fill, tensors
from dmdr.rewards.dual_encoder import DualEncoder
from dmdr.rewards.preprocess import cropped, normalized, padded, squashed

SCALE = 100.0
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Kind:
    """The architecture in open_clip's list, and how images become its size."""

    architecture: str
    shape: Callable[[torch.Tensor, int], torch.Tensor]


KINDS = {
    "dfn-clip": Kind("ViT-H-14-quickgelu", squashed),
    "hpsv2.1": Kind("ViT-H-14", padded),
    "clip-score": Kind("ViT-g-14", cropped),
}


def load(name: str, path: Path | None, device: str) -> DualEncoder:
    """The reward of that name from a file of weights, or a folder of them; None: without, for the device "meta".

    Raises:
        DataError: the weights are damaged, or are another model's.
        InputMissing: the folder holds none.
    """
    kind = KINDS[name]
    model, tokenizer, size = clip(name, kind.architecture, path, device)

    def encode_images(images: torch.Tensor) -> torch.Tensor:
        return model.encode_image(normalized(kind.shape(images, size)))

    def encode_prompts(prompts: list[str]) -> torch.Tensor:
        return model.encode_text(tokenizer(prompts).to(device))

    return DualEncoder(name, encode_images, encode_prompts, SCALE)


def clip(name: str, architecture: str, path: Path | None, device: str) -> tuple[torch.nn.Module, Callable, int]:
    """An open_clip model, frozen, with its tokenizer and the side of its images; arguments and errors as of `load`."""
    import open_clip

    if path is None:
        with torch.device("meta"):
            model = open_clip.CLIP(**open_clip.get_model_config(architecture)).requires_grad_(False)
    else:
        config, file = read(path) if path.is_dir() else (open_clip.get_model_config(architecture), path)
        found = tensors(file)  # before the model, which takes a while to make
        model = open_clip.CLIP(**config)
        fill(model, found, file, f"{name}'s {'open_clip_config.json' if path.is_dir() else architecture}")
    model.to(device)
    size = model.visual.image_size
    size = size[0] if isinstance(size, tuple) else size
    return model, open_clip.SimpleTokenizer(context_length=model.context_length), size


def read(folder: Path) -> tuple[dict, Path]:
    """What open_clip_config.json says of the model, and the file of its weights."""
    try:
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
    except FileNotFoundError as error:
        raise InputMissing(
            f"weights {folder} hold no open_clip_config.json; give the file of weights itself"
        ) from error
    except (ValueError, KeyError) as error:
        raise DataError(
            f"weights {folder}: open_clip_config.json has no model_cfg ({error}); fetch it again"
        ) from error
    found = next((folder / file for file in FILES if (folder / file).is_file()), None)
    if found is None:
        raise InputMissing(f"weights {folder} hold none of {', '.join(FILES)}; fetch one")
    return config, found


LOADERS = {name: partial(load, name) for name in KINDS}
