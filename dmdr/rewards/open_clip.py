"""Rewards that are open_clip models: DFN-CLIP and HPSv2.1, which DMDR trains on, and the CLIP score of its tables.

1. Each is 100 times a cosine, the scale on which the paper's tables print them.
2. HPSv2.1 is read by plain open_clip with HPSv2's own preprocessing, which is not open_clip's; the hpsv2 package, whose
   pins break others, is not needed.
3. The CLIP score is that of ViT-g/14 trained on LAION-2B, on the prompt itself. clip-score-dmd2 is of the same weights
   and puts "A photo depicts " before it as DMD2's compute_clip_score (read at 4e54501) does; that cuts images to a
   square and has them at 256x256 by LANCZOS on their way to 224x224, which neither figure here does.
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
from dmdr.rewards.checkpoint import fill_module, read_tensors
from dmdr.rewards.dual_encoder import DualEncoder
from dmdr.rewards.preprocess import normalize, resize_and_crop, resize_and_pad, resize_to_square

SCALE = 100.0
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Kind:
    """The architecture in open_clip's list, and how images become its size."""

    architecture: str
    shape: Callable[[torch.Tensor, int], torch.Tensor]


KINDS = {
    "dfn-clip": Kind("ViT-H-14-quickgelu", resize_to_square),
    "hpsv2.1": Kind("ViT-H-14", resize_and_pad),
    "clip-score": Kind("ViT-g-14", resize_and_crop),
}
PREFIXED = {"clip-score-dmd2": ("clip-score", "A photo depicts ")}  # name -> the kind whose weights it has, its prefix


def load_open_clip(name: str, path: Path | None, device: str) -> DualEncoder:
    """The reward of that name from a file of weights, or a folder of them; None: without, for the device "meta".

    Raises:
        DataError: the weights are damaged, or are another model's.
        InputMissing: the folder holds none.
    """
    of, prefix = PREFIXED.get(name, (name, ""))
    kind = KINDS[of]
    model, tokenizer, size = build_clip(name, kind.architecture, path, device)

    def encode_images(images: torch.Tensor) -> torch.Tensor:
        return model.encode_image(normalize(kind.shape(images, size)))

    def encode_prompts(prompts: list[str]) -> torch.Tensor:
        tokens = tokenize_prefixed(prompts, prefix, tokenizer) if prefix else tokenizer(prompts)
        return model.encode_text(tokens.to(device))

    return DualEncoder(name, encode_images, encode_prompts, SCALE)


def build_clip(name: str, architecture: str, path: Path | None, device: str) -> tuple[torch.nn.Module, Callable, int]:
    """An open_clip model, frozen, with its tokenizer and the side of its images; arguments and errors as of `load`."""
    import open_clip

    if path is None:
        with torch.device("meta"):
            model = open_clip.CLIP(**open_clip.get_model_config(architecture)).requires_grad_(False)
    else:
        config, file = read_folder(path) if path.is_dir() else (open_clip.get_model_config(architecture), path)
        found = read_tensors(file)  # before the model, which takes a while to make
        model = open_clip.CLIP(**config)
        fill_module(model, found, file, f"{name}'s {'open_clip_config.json' if path.is_dir() else architecture}")
    model.to(device)
    size = model.visual.image_size
    size = size[0] if isinstance(size, tuple) else size
    return model, open_clip.SimpleTokenizer(context_length=model.context_length), size


def tokenize_prefixed(prompts: list[str], prefix: str, tokenizer: Callable[[list[str]], torch.Tensor]) -> torch.Tensor:
    """Tokens (B, L) of prompts, those of the prefix behind the begin; what becomes too long is cut to L and ends with
    the end."""
    tokens, own = tokenizer(prompts), tokenizer([prefix])[0]
    end = own.max()  # of all tokens the last in CLIP's vocabulary
    own = own[1 : int(own.argmax())]
    cut = torch.cat([tokens[:, :1], own.expand(len(tokens), -1), tokens[:, 1:]], dim=1)[:, : tokens.shape[1]]
    cut[:, -1] = torch.where(cut[:, -1] > 0, end, cut[:, -1])
    return cut


def read_folder(folder: Path) -> tuple[dict, Path]:
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


LOADERS = {name: partial(load_open_clip, name) for name in (*KINDS, *PREFIXED)}
