"""A shard of one model's images as a tar file; unpacked, they lie as the benchmarks' own scripts read them.

{place:05d}/metadata.jsonl         the prompt's record, a line of JSON: GenEval's layout
{place:05d}/samples/{n:04d}.png    its images
dpg/{item_id}.png                  of a DPG-Bench prompt: its image, or its four in a grid of 2 x 2
hps/{style}/{index:05d}.jpg        of an HPDv2 prompt: its first image
not-a-number.json                  names of images that were not numbers and are black; only where there are any
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dmdr.errors import DataError
from dmdr.promptset import PromptRecord

BROKEN = "not-a-number.json"


@dataclass(frozen=True)
class Sample:
    """One prompt's images. images: (S, H, W, 3) uint8; sound: (S,) whether each was a number."""

    place: int
    record: PromptRecord
    images: np.ndarray
    sound: np.ndarray

    def tensor(self) -> torch.Tensor:
        """(S, 3, H, W) in [0, 1]; NaN where an image was not a number."""
        images = torch.from_numpy(self.images).permute(0, 3, 1, 2).float() / 255
        images[~torch.from_numpy(self.sound)] = torch.nan
        return images


def build_sample(place: int, record: PromptRecord, images: torch.Tensor) -> Sample:
    """images (S, 3, H, W) in [0, 1] -> their pixels; what is not a number is black."""
    pixels = (images.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return Sample(place, record, pixels.cpu().numpy(), images.isfinite().flatten(1).all(dim=1).cpu().numpy())


def image_file(place: int, number: int) -> str:
    """Where GenEval looks for image `number` of a prompt."""
    return f"{place:05d}/samples/{number:04d}.png"


def pack(samples: list[Sample]) -> bytes:
    """The tar file; the same samples are the same bytes."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for each in samples:
            line = json.dumps(each.record, ensure_ascii=False) + "\n"
            _add(tar, f"{each.place:05d}/metadata.jsonl", line.encode())
            for number, image in enumerate(each.images):
                _add(tar, image_file(each.place, number), _png(image))
            if "item_id" in each.record and len(each.images) in (1, 4):
                _add(tar, f"dpg/{each.record['item_id']}.png", _png(grid_of(each.images)))
            if {"style", "index"} <= each.record.keys():
                _add(tar, f"hps/{each.record['style']}/{int(each.record['index']):05d}.jpg", _jpeg(each.images[0]))
        broken = [image_file(each.place, int(n)) for each in samples for n in np.flatnonzero(~each.sound)]
        if broken:
            _add(tar, BROKEN, json.dumps(broken).encode())
    return data.getvalue()


def unpack(path: Path, only: set[int] | None = None) -> Iterator[Sample]:
    """The samples of a shard, or those of some places, one prompt at a time.

    Raises:
        DataError: the file is not whole, or an image in it does not read; the message names it.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            members = {member.name: member for member in tar.getmembers()}
            if not members or tar.offset + tarfile.BLOCKSIZE > path.stat().st_size:
                raise EOFError("its end is missing")  # which tarfile takes for an end
            read = lambda name: tar.extractfile(members[name]).read()  # noqa: E731, a reader of this very file
            broken = set(json.loads(read(BROKEN))) if BROKEN in members else set()
            for place in [int(name.split("/")[0]) for name in members if name.endswith("/metadata.jsonl")]:
                if only is not None and place not in only:
                    continue
                names = sorted(name for name in members if name.startswith(f"{place:05d}/samples/"))
                images = [_pixels(path, name, read(name)) for name in names]
                record = json.loads(read(f"{place:05d}/metadata.jsonl"))
                yield Sample(place, record, np.stack(images), np.array([name not in broken for name in names]))
    except (tarfile.TarError, KeyError, ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is no whole shard of images ({error}); delete the stage and run it again") from error


def grid_of(images: np.ndarray) -> np.ndarray:
    """(1 or 4, H, W, 3) -> the image, or (2 H, 2 W, 3) in reading order, as DPG-Bench crops it."""
    return images[0] if len(images) == 1 else np.concatenate([np.concatenate(images[n : n + 2], 1) for n in (0, 2)], 0)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))


def _png(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="PNG", compress_level=1)  # 6 is five times as slow and 5 % smaller
    return data.getvalue()


def _jpeg(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="JPEG", quality=95, subsampling=0)
    return data.getvalue()


def _pixels(path: Path, name: str, data: bytes) -> np.ndarray:
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (OSError, SyntaxError) as error:  # Pillow raises the second for a broken chunk
        raise DataError(f"{path}: image {name} does not read ({error}); delete the stage and run it again") from error
