"""Detect objects for GenEval, by Mask2Former with a Swin-S backbone, trained on COCO's instances.

1. The network comes from transformers (facebook/mask2former-swin-small-coco-instance). GenEval's mmdet 2 checkpoint is
   the same network from another training run. A few detections differ, so the scorecard names the detector.
2. Boxes are drawn around the masks, as in mmdet's Mask2Former.
3. The processor resizes images, for this checkpoint to 384 x 384. mmdet fits them into 1333 x 800, so
   GenEval's detector finds smaller things. Masks are cut at 384 x 384 and enlarged; mmdet cuts them at full size.
4. Scores have six digits. The order of two equal scores is arbitrary, in mmdet and here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch

from dmdr.errors import DataError, InputMissing
from dmdr.metrics.geneval_rules import THRESHOLD, Detection
from dmdr.rewards.checkpoint import shorten

NAMES = (  # COCO's 80 classes in COCO's order, as GenEval's prompts call them
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "computer mouse",
    "tv remote",
    "computer keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)


class Detector:
    """Mask2Former, from a folder that transformers saved.

    Raises:
        InputMissing: there is no such folder.
        DataError: the folder cannot be loaded, or its model detects other classes than COCO's 80.
    """

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        if not (folder / "config.json").is_file():
            raise InputMissing(
                f"weights.mask2former {folder} has no config.json; give a folder that transformers saved"
            )
        try:
            self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            self.network = Mask2FormerForUniversalSegmentation.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"weights.mask2former {folder} cannot be loaded ({shorten(error)}); fetch the folder again"
            ) from error
        self.network.requires_grad_(False).eval().to(device)
        labels = {int(number): label for number, label in (self.network.config.id2label or {}).items()}
        first, last = labels.get(0), labels.get(len(NAMES) - 1)
        if (len(labels), first, last) != (len(NAMES), NAMES[0], NAMES[-1]):
            raise DataError(
                f"weights.mask2former {folder} detects {len(labels)} classes from {first} on, but GenEval needs "
                f"COCO's {len(NAMES)} from person to toothbrush; give facebook/mask2former-swin-small-coco-instance"
            )

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> list[dict[str, list[Detection]]]:
        """images (B, 3, H, W) in [0, 1] -> for each image, class -> its objects above GenEval's lower threshold."""
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
        inputs = self.processor(images=list(pixels.cpu()), return_tensors="pt")
        output = self.network(pixel_values=inputs["pixel_values"].to(self.network.device))
        size = tuple(images.shape[-2:])
        segmented = self.processor.post_process_instance_segmentation(
            output, threshold=THRESHOLD, target_sizes=[size] * len(images), return_binary_maps=True
        )
        return [_list_detections(each["segmentation"], each["segments_info"]) for each in segmented]


class Segment(TypedDict):
    """The facts that transformers returns with a mask."""

    label_id: int
    score: float


def _list_detections(masks: Sequence[torch.Tensor], segments: list[Segment]) -> dict[str, list[Detection]]:
    """class -> the objects of one image. masks: (H, W) of each segment, 0 outside of it."""
    objects: dict[str, list[Detection]] = {}
    for number, segment in enumerate(segments):
        mask = masks[number].cpu().numpy() > 0
        detection = Detection(enclose_mask(mask), segment["score"], mask)
        objects.setdefault(NAMES[segment["label_id"]], []).append(detection)
    return objects


def enclose_mask(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The box x1, y1, x2, y2 around a mask (H, W) with at least one pixel; x2 and y2 lie one pixel past it."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
