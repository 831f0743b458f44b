"""The rewards of the lab's two worlds: the probability that image and caption match, by tiny dual encoders.

`lab-conv` and `fashion-conv` (convolutions and a GRU) are for training; `lab-mixer` and `fashion-mixer` (an MLP-Mixer
and word windows, another seed) are held out. `dmdr.lab.reward` and `dmdr.lab.fashion.reward` trained them. No reward
saw an image of a held-out prompt, or a held-out pair in any caption. The worlds' judges had no part in their training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from dmdr.config.prompt_record import PromptRecord
from dmdr.transfer import send_to

FOLDER = Path(__file__).parents[1] / "lab" / "rewards"
SIZE, LENGTH = 32, 14  # side of an image in pixels; words of a caption, the rest is cut
PAD, UNKNOWN = 0, 1


class WordTokenizer:
    """B captions -> the numbers of their words (B, LENGTH), padded with PAD. Words outside the list are UNKNOWN."""

    def __init__(self, vocabulary: list[str]) -> None:
        self.vocabulary = vocabulary
        self.number = {word: index for index, word in enumerate(vocabulary, start=2)}

    def __call__(self, captions: list[str]) -> torch.Tensor:
        rows = [[self.number.get(word, UNKNOWN) for word in caption.lower().split()[:LENGTH]] for caption in captions]
        return torch.tensor([row + [PAD] * (LENGTH - len(row)) for row in rows])


class ConvImage(nn.Module):
    """Four convolutions, three of them strided. The last map is flattened, which keeps number and place of objects."""

    def __init__(self, out: int) -> None:
        super().__init__()
        widths = (3, 32, 48, 64, 96)
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            stride = 1 if before == 3 else 2
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, 128), nn.SiLU(), nn.Linear(128, out))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)


class RecurrentText(nn.Module):
    """A GRU over the words, read at its last state."""

    def __init__(self, words: int, out: int) -> None:
        super().__init__()
        self.embedding, self.gru = nn.Embedding(words, 48, padding_idx=PAD), nn.GRU(48, 96, batch_first=True)
        self.out = nn.Linear(96, out)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        states, _ = self.gru(self.embedding(words))
        last = (words != PAD).sum(1).clamp(min=1) - 1
        return self.out(states[torch.arange(len(words), device=words.device), last])


class Mixer(nn.Module):
    """One MLP-Mixer layer: over the tokens, then over the channels (Tolstikhin et al. 2021)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm_tokens, self.norm_channels = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.tokens(self.norm_tokens(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm_channels(x))


class MixerImage(nn.Module):
    """A strided stem to 64 patches, three mixer layers, and an MLP on all patches at once."""

    def __init__(self, out: int, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 4, 2, 1), nn.GELU(), nn.Conv2d(32, width, 2, 2))
        self.mixers = nn.Sequential(*(Mixer(64, width) for _ in range(3)), nn.LayerNorm(width))
        self.out = nn.Sequential(nn.Flatten(), nn.Linear(64 * width, 96), nn.GELU(), nn.Linear(96, out))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.out(self.mixers(self.stem(images).flatten(2).transpose(1, 2)))


class WindowText(nn.Module):
    """Convolutions over three words at a time, and an MLP on all places at once."""

    def __init__(self, words: int, out: int, width: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=PAD)
        self.windows = nn.Sequential(
            nn.Conv1d(width, 96, 3, padding=1), nn.GELU(), nn.Conv1d(96, 96, 3, padding=1), nn.GELU()
        )
        self.out = nn.Sequential(nn.Flatten(), nn.Linear(96 * LENGTH, 128), nn.GELU(), nn.Linear(128, out))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.out(self.windows(self.embedding(words).transpose(1, 2)))


class LabReward(nn.Module):
    """sigmoid(scale cos(image, caption) + bias) in [0, 1]. Images of any size are resized to 32x32, differentiably.

    name: ends in the architecture, -conv or -mixer.
    """

    differentiable = True

    def __init__(self, name: str, vocabulary: list[str], scale: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.name, self.tokenize, self.scale, self.bias = name, WordTokenizer(vocabulary), scale, bias
        count, out = len(vocabulary) + 2, 96
        conv = name.endswith("-conv")
        self.image = ConvImage(out) if conv else MixerImage(out)
        self.text = RecurrentText(count, out) if conv else WindowText(count, out)
        self.log_temperature = nn.Parameter(torch.tensor(2.5))  # of the contrastive loss alone

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D), of length 1."""
        if images.shape[-2:] != (SIZE, SIZE):
            images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        return F.normalize(self.image(images * 2 - 1), dim=-1)

    def embed_captions(self, captions: list[str]) -> torch.Tensor:
        """B captions -> (B, D), of length 1."""
        return F.normalize(self.text(send_to(self.tokenize(captions), self.log_temperature.device)), dim=-1)

    def forward(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[PromptRecord] = ()) -> torch.Tensor:
        cosine_B = (self.embed_images(images) * self.embed_captions(prompts)).sum(-1)
        return torch.sigmoid(self.scale * cosine_B + self.bias)


def load_lab_reward(name: str, device: str) -> LabReward:
    """A reward that ships with DMDR, frozen, in float32."""
    settings = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    reward = LabReward(name, settings["vocabulary"], settings["scale"], settings["bias"])
    reward.load_state_dict({key: value.float() for key, value in load_file(FOLDER / f"{name}.safetensors").items()})
    return reward.requires_grad_(False).eval().to(device)
