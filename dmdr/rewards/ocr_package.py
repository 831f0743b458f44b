"""The package that reads text: RapidOCR on onnxruntime, whose wheel brings its models. No torch, and nothing imported.

PP-OCRv6 small: a detector of lines and a recogniser of their characters, both Apache-2.0. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

from dmdr.errors import InputMissing
from dmdr.teacher.digests import digest

PACKAGE, RUNTIME = "rapidocr", "onnxruntime"
DETECTOR, RECOGNISER = "PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"


def find_models() -> tuple[Path, Path]:
    """The files of the detector and the recogniser.

    Raises:
        InputMissing: the packages are not installed, or have other models.
    """
    for package in (PACKAGE, RUNTIME):
        if importlib.util.find_spec(package) is None:
            raise InputMissing(f"ocr reads text with {package}, which is not installed; pip install 'dmdr[ocr]'")
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None, "found above"
    detector, recogniser = (Path(spec.origin).parent / "models" / name for name in (DETECTOR, RECOGNISER))
    if not detector.is_file() or not recogniser.is_file():
        version = importlib.metadata.version(PACKAGE)
        raise InputMissing(f"{PACKAGE} {version} has no {DETECTOR} and {RECOGNISER}; pip install 'dmdr[ocr]'")
    return detector, recogniser


def digest_ocr() -> str:
    """sha256 of what reads: both models, and the version of the package around them. Raises as `find_models`."""
    parts = [importlib.metadata.version(PACKAGE), *map(digest, find_models())]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def describe_ocr() -> str:
    """What reads, for a scorecard."""
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return f"{PACKAGE} (not installed)"
    return f"{PACKAGE} {version}, {DETECTOR}, {RECOGNISER}"
