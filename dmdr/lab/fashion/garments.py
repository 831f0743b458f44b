"""Read Fashion-MNIST from its Debian package: 70,000 grey photos of garments, 28x28 (Xiao et al. 2017; licence: Expat).

The package is needed to build the teacher, the rewards and the judge's classifier again, but not to use them.
"""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np

from dmdr.errors import DataError, InputMissing

FOLDER = Path("/usr/share/datasets/fashion-mnist")
FILES = {"train": "train", "test": "t10k"}
IMAGES, LABELS = 3, 1  # number of dimensions in the two kinds of file
PAD = 2  # pixels added on each side: 28 -> 32


def read_garments(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32) uint8, 0 where there is no garment, and classes (N,) uint8.

    split: "train" or "test".

    Raises:
        InputMissing: the Debian package is not installed.
        DataError: a file is damaged.
    """
    images = read_idx(FOLDER / f"{FILES[split]}-images-idx3-ubyte.gz", IMAGES)
    labels = read_idx(FOLDER / f"{FILES[split]}-labels-idx1-ubyte.gz", LABELS)
    return np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD))), labels


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes: 0, 0, 8, the number of dimensions, their big-endian sizes, the values.

    Raises:
        InputMissing: there is no such file.
        DataError: the file is cut short, or is not such an idx file.
    """
    if not path.is_file():
        raise InputMissing(f"Fashion-MNIST file {path} does not exist; apt-get install dataset-fashion-mnist")
    start = 4 + 4 * dimensions
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{path} is not a complete gzip file: {error}; install dataset-fashion-mnist again") from error
    shape = tuple(int(size) for size in np.frombuffer(raw[4 : min(start, len(raw) // 4 * 4)], ">u4"))
    if raw[:4] != bytes((0, 0, 8, dimensions)) or len(raw) != start + math.prod(shape):
        raise DataError(f"{path} is not an idx file of {dimensions} dimensions; install dataset-fashion-mnist again")
    return (
        np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy()
    )  # a copy, because torch needs writable memory
