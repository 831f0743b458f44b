"""make parity-hpsv2: our HPSv2.1 beside the hpsv2 package, on shared random weights of the real architecture.

The package wants old versions of what DMDR uses, so it lies in a folder of its own, without what it asks for, and lacks
a file that open_clip has. It needs 12 GiB of memory, 4 GiB of disk and two minutes.

usage: python tests/parity/hpsv2_package.py FOLDER (where `pip install --no-deps --target FOLDER hpsv2 clint args` went)
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

import dmdr  # noqa: F401  before open_clip, which imports torchvision

# isort: split
import open_clip
import torch
from PIL import Image

from dmdr.rewards.load import load_reward
from dmdr.rewards.open_clip import KINDS, SCALE
from dmdr.rewards.sources import RewardSources

TOLERANCE = 1e-5
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
PICTURES = {(512, 512): "a photo of a fox in the snow", (300, 200): "水彩画 of a lighthouse", (224, 224): "cat " * 100}


def picture(height: int, width: int, rng: np.random.Generator) -> Image.Image:
    small = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def package(folder: Path):
    """hpsv2.img_score, which would first fetch weights that it then replaces."""
    sys.path.append(str(folder))
    shutil.copy(Path(open_clip.__file__).parent / VOCABULARY, folder / "hpsv2" / "src" / "open_clip" / VOCABULARY)
    from hpsv2 import img_score

    make = img_score.create_model_and_transforms
    img_score.create_model_and_transforms = lambda name, pretrained, **options: make(name, None, **options)
    return img_score


def main(folder: Path) -> int:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "HPS_v2.1_compressed.pt"
        weights = open_clip.CLIP(**open_clip.get_model_config(KINDS["hpsv2.1"].architecture)).state_dict()
        torch.save({"state_dict": weights}, file)
        del weights
        pictures = [(picture(*size, rng), prompt) for size, prompt in PICTURES.items()]
        reward = load_reward("hpsv2.1", sources=RewardSources({"hpsv2.1": str(file)}))
        with torch.no_grad():
            ours = [
                reward(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255, [prompt]).item() / SCALE
                for image, prompt in pictures
            ]
        del reward
        score = package(folder).score
        theirs = [float(score(image, prompt, cp=str(file), hps_version="v2.1")[0]) for image, prompt in pictures]
    for (size, prompt), own, their in zip(PICTURES.items(), ours, theirs, strict=True):
        shown = prompt if len(prompt) < 40 else f"{prompt[:37]}..."
        print(f"{size[0]}x{size[1]} {shown!r}: ours {own:.8f}, hpsv2 {their:.8f}, differ by {abs(own - their):.1e}")
    most = max(abs(own - their) for own, their in zip(ours, theirs, strict=True))
    print(f"greatest difference {most:.1e}, allowed {TOLERANCE:.0e}")
    return int(not most <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
