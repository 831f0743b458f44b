"""A small CNN that classifies grey garments, and its training on the train split of Fashion-MNIST.

It is a part of the judge. It is never used to train a teacher, a reward or a student.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from dmdr.lab.fashion.garments import read_garments
from dmdr.lab.fashion.vocabulary import CLASSES
from dmdr.lab.fitting import Log

FOLDER = Path(__file__).parent
NAME = "classifier"  # its files are NAME.safetensors (float16) and NAME.json (recipe, accuracy)


class ClassifierRecipe(TypedDict):
    """The recipe of the classifier. smoothing: of the labels. noise: largest standard deviation of the pixel noise."""

    seed: int
    epochs: int
    batch: int
    lr: float
    weight_decay: float
    smoothing: float
    noise: float


RECIPE: ClassifierRecipe = {
    "seed": 3,
    "epochs": 4,
    "batch": 128,
    "lr": 4e-3,
    "weight_decay": 0.05,
    "smoothing": 0.05,
    "noise": 0.06,
}


class Classifier(nn.Module):
    """Four convolutions, 0.1 M parameters: garments (B, 1, 32, 32) in [0, 1] -> logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        widths, strides, layers = (1, 24, 48, 64, 96), (1, 2, 2, 1), []
        for before, after, stride in zip(widths, widths[1:], strides, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3))
        self.out = nn.Linear(96 * 16, len(CLASSES))

    def forward(self, garments: torch.Tensor) -> torch.Tensor:
        return self.out(self.net(garments))


def load_classifier(folder: Path = FOLDER) -> Classifier:
    """Load a classifier, frozen, in float32; by default the one that comes with DMDR."""
    classifier = Classifier()
    state = load_file(folder / f"{NAME}.safetensors")
    classifier.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return classifier.requires_grad_(False).eval()


def build_classifier(folder: Path, log: Log, recipe: ClassifierRecipe = RECIPE) -> None:
    """Train by the recipe, and save NAME.safetensors and NAME.json, with the accuracy on the 10,000 test images.

    Generated garments are smoother or rougher than real ones. So half of the images are blurred, and all get noise.

    Raises:
        InputMissing: Fashion-MNIST is not installed.
    """
    torch.manual_seed(recipe["seed"])
    images, labels = map(torch.from_numpy, read_garments("train"))
    classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=recipe["lr"], weight_decay=recipe["weight_decay"])
    steps = recipe["epochs"] * (len(images) // recipe["batch"])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], steps, pct_start=0.2)
    order = torch.cat([torch.randperm(len(images)) for _ in range(recipe["epochs"])])
    for step, indices in enumerate(order.split(recipe["batch"])[:steps]):
        batch = images[indices, None].float() / 255
        blurred = F.avg_pool2d(F.pad(batch, (1, 1, 1, 1)), 3, 1)
        batch = torch.lerp(batch, blurred, (2 * torch.rand(len(batch), 1, 1, 1) - 1).clamp(min=0))
        batch = batch + torch.randn_like(batch) * recipe["noise"] * torch.rand(len(batch), 1, 1, 1)
        loss = F.cross_entropy(classifier(batch), labels[indices].long(), label_smoothing=recipe["smoothing"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            log(f"{NAME} {step}/{steps} loss {loss.item():.3f}")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half() if v.is_floating_point() else v for k, v in classifier.state_dict().items()}
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / f"{NAME}.safetensors")
    report = {"recipe": recipe, "test_accuracy": measure_accuracy(load_classifier(folder))}
    (folder / f"{NAME}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    log(f"{NAME}: {report['test_accuracy']:.4f} of the test images are classified correctly")


@torch.no_grad()
def measure_accuracy(classifier: Classifier) -> float:
    """The share of Fashion-MNIST's test images that are classified correctly."""
    images, labels = map(torch.from_numpy, read_garments("test"))
    predicted = torch.cat([classifier(part[:, None].float() / 255).argmax(1) for part in images.split(500)])
    return float((predicted == labels).float().mean())
