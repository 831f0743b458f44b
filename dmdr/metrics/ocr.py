"""Read the text in an image, and score it against the text that the prompt quotes. A metric, and a verifier.

1. RapidOCR with the models in its wheel (`dmdr.rewards.ocr_package`). It runs on the CPU.
2. Images whose shorter side is below SIDE are enlarged to it before lines are looked for.
3. Text is read upright: the classifier that turns lines by 180 degrees is off, so that mirrored letters do not pass.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dmdr.config.prompt_record import PromptRecord
from dmdr.errors import ConfigError
from dmdr.metrics.quoted_text import list_quotes, score_text
from dmdr.rewards.ocr_package import find_models

SIDE = 480  # pixels


class TextReader:
    """Reads the lines of text in an image, from top to bottom.

    Raises:
        InputMissing: the package is not installed.
    """

    def __init__(self) -> None:
        detector, recogniser = find_models()
        from rapidocr import RapidOCR

        files: dict[str, str | int | bool] = {"Det.model_path": str(detector), "Rec.model_path": str(recogniser)}
        settings = {"Det.limit_side_len": SIDE, "Global.use_cls": False, "Global.log_level": "critical"}
        self.engine = RapidOCR(params={**files, **settings})
        logging.getLogger("RapidOCR").setLevel(logging.CRITICAL)

    def __call__(self, image: np.ndarray) -> list[str]:
        """image (H, W, 3) uint8, RGB -> its lines."""
        from rapidocr.utils.output import RapidOCROutput

        reading = self.engine(np.ascontiguousarray(image[:, :, ::-1]))  # which takes BGR, as OpenCV does
        if not isinstance(reading, RapidOCROutput):  # it found lines, and could read none
            return []
        return list(reading.txts or ())


@dataclass(frozen=True)
class ReadingLine:
    """What was asked for and what was read. read: None if the image is broken."""

    prompt: str
    quoted: list[str]
    read: list[str] | None

    def mark_broken(self) -> ReadingLine:
        """The line of an image with values that are not numbers."""
        return replace(self, read=None)

    def to_json(self) -> dict[str, object]:
        """The line as JSON, for the file of readings."""
        return asdict(self)


class OCR:
    """Judges images of the prompts that quote a text: 1 is all of it and nothing else, 0 is nothing of it."""

    figures = ("ocr",)
    writes = "readings"

    def __init__(self, reader: TextReader) -> None:
        self.reader = reader

    @classmethod
    def load(cls, weights: dict[str, Path], device: str) -> OCR:
        """weights: none. device: not used, for it runs on the CPU."""
        return cls(TextReader())

    @staticmethod
    def judges(record: PromptRecord) -> bool:
        """Whether the prompt quotes a text."""
        return bool(list_quotes(record["prompt"]))

    @classmethod
    def check_prompts(cls, records: list[PromptRecord]) -> None:
        """Refuse prompts that it cannot judge.

        Raises:
            ConfigError: no prompt quotes a text.
        """
        if not any(map(cls.judges, records)):
            raise ConfigError(
                f"evaluate.metrics has ocr, but none of the {len(records)} evaluation prompts has a text in quotation "
                'marks, such as: a sign that says "OPEN"; evaluate on others, or drop ocr'
            )

    def __call__(
        self, images: torch.Tensor, records: list[PromptRecord]
    ) -> tuple[dict[str, np.ndarray], list[ReadingLine]]:
        """Scores (B,) and lines of images (B, 3, H, W) in [0, 1]."""
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        lines = []
        for image, record in zip(pixels, records, strict=True):
            lines.append(ReadingLine(record["prompt"], list_quotes(record["prompt"]), self.reader(image)))
        return {"ocr": np.array([score_text(line.quoted, line.read or []) for line in lines])}, lines
