"""Rewards by open_clip models: DFN-CLIP and HPSv2.1, on which DMDR trains, and the CLIP score of its tables.

1. Each score is 100 times a cosine, as in the paper's tables.
2. Plain open_clip reads HPSv2.1. The images are preprocessed as HPSv2 does it, not as open_clip does. The hpsv2 package
   is not needed; its pinned requirements break others.
3. clip-score is the score of ViT-g/14 trained on LAION-2B, on the prompt itself. clip-score-dmd2 has the same weights
   and puts "A photo depicts " before the prompt, as DMD2's compute_clip_score (read at 4e54501) does. That function
   also cuts images to a square and resizes them by LANCZOS to 256x256 before 224x224; neither figure here does.
4. For a folder in open_clip's own layout, the architecture is read from the open_clip_config.json beside the weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from dmdr.errors import DataError, InputMissing
from dmdr.rewards.checkpoint import fill_module, read_tensors
from dmdr.rewards.dual_encoder import DualEncoder
from dmdr.rewards.preprocess import normalize, resize_and_crop, resize_and_pad, resize_to_square
from dmdr.transfer import send_to

SCALE = 100.0
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Kind:
    """The architecture and the preprocessing of an open_clip reward.

    architecture: its name in open_clip's list. resize: (images, size) -> square images of that size. resizing: a word
    for `resize` that scorecards print.
    """

    architecture: str
    resize: Callable[[torch.Tensor, int], torch.Tensor]
    resizing: str


@dataclass(frozen=True)
class Prefixed:
    """A reward that has the weights of the reward `kind`, and puts `prefix` before each prompt."""

    kind: str
    prefix: str


KINDS = {
    "dfn-clip": Kind("ViT-H-14-quickgelu", resize_to_square, "squashed"),
    "hpsv2.1": Kind("ViT-H-14", resize_and_pad, "padded"),
    "clip-score": Kind("ViT-g-14", resize_and_crop, "cropped"),
}
PREFIXED = {"clip-score-dmd2": Prefixed("clip-score", "A photo depicts ")}


class ImageTextModel(Protocol):
    """The methods of open_clip.CLIP that are called here; open_clip has no type annotations for mypy."""

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W), normalised -> (B, D)."""

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) -> (B, D)."""


@dataclass(frozen=True)
class OpenClip:
    """A frozen open_clip model. tokenize: B texts -> tokens (B, L). size: the side of its images, in pixels."""

    model: ImageTextModel
    tokenize: Callable[[list[str]], torch.Tensor]
    size: int


def load_open_clip(name: str, path: Path | None, device: str) -> DualEncoder:
    """The reward of that name. path: a file of weights or a folder of open_clip; None on the device "meta".

    Raises:
        DataError: the weights are damaged, or belong to another model.
        InputMissing: the folder lacks its configuration or its weights.
    """
    prefixed = PREFIXED.get(name, Prefixed(name, ""))
    kind = KINDS[prefixed.kind]
    clip = build_clip(name, kind.architecture, path, device)

    def encode_images(images: torch.Tensor) -> torch.Tensor:
        return clip.model.encode_image(normalize(kind.resize(images, clip.size)))

    def encode_prompts(prompts: list[str]) -> torch.Tensor:
        if prefixed.prefix:
            tokens = tokenize_prefixed(prompts, prefixed.prefix, clip.tokenize)
        else:
            tokens = clip.tokenize(prompts)
        return clip.model.encode_text(send_to(tokens, torch.device(device)))

    return DualEncoder(name, encode_images, encode_prompts, SCALE)


def build_clip(name: str, architecture: str, path: Path | None, device: str) -> OpenClip:
    """Build an open_clip model, frozen. path, device and errors are as for `load_open_clip`; name: for the messages."""
    import open_clip

    if path is None:
        with torch.device("meta"):
            model = open_clip.CLIP(**open_clip.get_model_config(architecture)).requires_grad_(False)
    else:
        config, file = read_folder(path) if path.is_dir() else (open_clip.get_model_config(architecture), path)
        weights = read_tensors(file)  # before the model is built, which takes a while
        model = open_clip.CLIP(**config)
        fill_module(model, weights, file, f"{name}'s {'open_clip_config.json' if path.is_dir() else architecture}")
    model.to(device)
    size = model.visual.image_size
    return OpenClip(
        model,
        open_clip.SimpleTokenizer(context_length=model.context_length),
        size[0] if isinstance(size, tuple) else size,
    )


def tokenize_prefixed(prompts: list[str], prefix: str, tokenize: Callable[[list[str]], torch.Tensor]) -> torch.Tensor:
    """Tokens (B, L) of prompts, with the tokens of the prefix behind the begin token.

    A row that becomes too long is cut to L tokens, and the last of them becomes the end token.
    """
    tokens, prefix_row = tokenize(prompts), tokenize([prefix])[0]
    end = prefix_row.max()  # the end token is the last of CLIP's vocabulary
    prefix_tokens = prefix_row[1 : int(prefix_row.argmax())]
    rows = torch.cat([tokens[:, :1], prefix_tokens.expand(len(tokens), -1), tokens[:, 1:]], dim=1)
    rows = rows[:, : tokens.shape[1]]
    rows[:, -1] = torch.where(rows[:, -1] > 0, end, rows[:, -1])
    return rows


def read_folder(folder: Path) -> tuple[dict[str, object], Path]:
    """The model's configuration from open_clip_config.json, and the file of its weights."""
    try:
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
    except FileNotFoundError as error:
        raise InputMissing(
            f"weights {folder} have no open_clip_config.json; give the file of weights instead of the folder"
        ) from error
    except (ValueError, KeyError) as error:
        raise DataError(
            f"weights {folder}: open_clip_config.json has no model_cfg ({error}); fetch it again"
        ) from error
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise InputMissing(f"weights {folder} have none of the files {', '.join(FILES)}; fetch one of them")
    return config, file
