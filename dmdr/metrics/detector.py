"""The object detector of GenEval: Mask2Former with a Swin-S backbone, trained on COCO's instances.

1. It is transformers' (facebook/mask2former-swin-small-coco-instance), the same network as GenEval's mmdet 2 checkpoint
   but another training run's export; a few detections differ, so a score says which detector it is from.
2. Boxes are those of the masks, as mmdet's Mask2Former has them.
3. Images are resized as its processor says, for this checkpoint to 384 x 384; mmdet fits them into 1333 x 800, so
   GenEval's own finds smaller things. Masks are cut at 384 x 384 and enlarged; mmdet's are cut at the image's size.
4. Scores have six digits. Which of equal ones is first is chance there and here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dmdr.errors import DataError, InputMissing
from dmdr.metrics.geneval_rules import THRESHOLD, Detection

NAMES = (  # of COCO's 80 classes in its order, as GenEval's prompts call them
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
    """From a folder that transformers saved.

    Raises:
        InputMissing: there is no such folder.
        DataError: it does not load, or detects other classes than COCO's 80.
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
            said = " ".join(str(error).split())[:200]
            raise DataError(f"weights.mask2former {folder} does not load: {said}") from error
        self.network.to(device).requires_grad_(False).eval()
        labels = self.network.config.id2label
        if (len(labels), labels.get(0), labels.get(len(NAMES) - 1)) != (len(NAMES), NAMES[0], NAMES[-1]):
            raise DataError(
                f"weights.mask2former {folder} detects {len(labels)} classes from {labels.get(0)} on, GenEval asks for "
                f"COCO's {len(NAMES)} from person to toothbrush; give facebook/mask2former-swin-small-coco-instance"
            )

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> list[dict[str, list[Detection]]]:
        """images (B, 3, H, W) in [0, 1] -> of each, class -> objects from GenEval's lower threshold on."""
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
        given = self.processor(images=list(pixels.cpu()), return_tensors="pt")
        out = self.network(pixel_values=given["pixel_values"].to(self.network.device))
        size = tuple(images.shape[-2:])
        found = self.processor.post_process_instance_segmentation(
            out, threshold=THRESHOLD, target_sizes=[size] * len(images), return_binary_maps=True
        )
        return [_objects(each) for each in found]


def _objects(found: dict) -> dict[str, list[Detection]]:
    objects: dict[str, list[Detection]] = {}
    for number, segment in enumerate(found["segments_info"]):
        mask = found["segmentation"][number].cpu().numpy() > 0
        objects.setdefault(NAMES[segment["label_id"]], []).append(Detection(box_of(mask), segment["score"], mask))
    return objects


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 around a mask (H, W) with at least one pixel; x2 and y2 are one past it."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
