"""A shard of one model's images as a tar file; unpacked, they lie as the benchmarks' own scripts read them.

{place:05d}/metadata.jsonl         the prompt's record, a line of JSON: GenEval's layout
{place:05d}/samples/{n:04d}.png    its images
dpg/{item_id}.png                  of a DPG-Bench prompt: its image, or its four images in a grid of 2 x 2
hps/{style}/{index:05d}.jpg        of an HPDv2 prompt: its first image
not-a-number.json                  names of the images that were not numbers and are black; only if there are any
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

from dmdr.config.prompt_record import PromptRecord, is_file_name
from dmdr.errors import DataError

BROKEN = "not-a-number.json"


@dataclass(frozen=True)
class Sample:
    """One prompt's images. images: (S, H, W, 3) uint8. finite: (S,), whether all values of an image were finite."""

    place: int
    record: PromptRecord
    images: np.ndarray
    finite: np.ndarray

    def tensor(self) -> torch.Tensor:
        """(S, 3, H, W) in [0, 1]; NaN where an image was not a number."""
        images = torch.from_numpy(self.images).permute(0, 3, 1, 2).float() / 255
        images[~torch.from_numpy(self.finite)] = torch.nan
        return images


def build_sample(place: int, record: PromptRecord, images: torch.Tensor) -> Sample:
    """Round images (S, 3, H, W) in [0, 1] to 8 bits. A value that is not a number becomes black."""
    pixels = (images.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return Sample(place, record, pixels.cpu().numpy(), images.isfinite().flatten(1).all(dim=1).cpu().numpy())


def image_file(place: int, number: int) -> str:
    """Where GenEval looks for image `number` of a prompt."""
    return f"{place:05d}/samples/{number:04d}.png"


def pack(samples: list[Sample]) -> bytes:
    """The tar file. The same samples give the same bytes."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            _add_sample(tar, sample)
        broken = [image_file(sample.place, int(n)) for sample in samples for n in np.flatnonzero(~sample.finite)]
        if broken:
            _add(tar, BROKEN, json.dumps(broken).encode())
    return data.getvalue()


def unpack(path: Path, only: set[int] | None = None) -> Iterator[Sample]:
    """The samples of a shard, or only those of some places, one prompt at a time.

    Raises:
        DataError: the file is not whole, or an image in it does not read. The message names it.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            members = {member.name: member for member in tar.getmembers()}
            if not members or tar.offset + tarfile.BLOCKSIZE > path.stat().st_size:
                raise EOFError("its end is missing")  # tarfile takes a cut file for a whole one
            broken = set(json.loads(_read(tar, members[BROKEN]))) if BROKEN in members else set()
            for place in [int(name.split("/")[0]) for name in members if name.endswith("/metadata.jsonl")]:
                if only is not None and place not in only:
                    continue
                names = sorted(name for name in members if name.startswith(f"{place:05d}/samples/"))
                images = [_decode(path, name, _read(tar, members[name])) for name in names]
                record = json.loads(_read(tar, members[f"{place:05d}/metadata.jsonl"]))
                yield Sample(place, record, np.stack(images), np.array([name not in broken for name in names]))
    except DataError:
        raise
    except (tarfile.TarError, KeyError, ValueError, EOFError) as error:
        raise DataError(f"{path} is no whole shard of images ({error}); delete the stage and run it again") from error


def build_grid(images: np.ndarray) -> np.ndarray:
    """(1 or 4, H, W, 3) -> the image, or (2 H, 2 W, 3) in reading order, as DPG-Bench crops it."""
    return images[0] if len(images) == 1 else np.concatenate([np.concatenate(images[n : n + 2], 1) for n in (0, 2)], 0)


def _add_sample(tar: tarfile.TarFile, sample: Sample) -> None:
    """A prompt's record and images, and the images again as the benchmark that the prompt is from wants them."""
    record, images = sample.record, sample.images
    _add(tar, f"{sample.place:05d}/metadata.jsonl", (json.dumps(record, ensure_ascii=False) + "\n").encode())
    for number, image in enumerate(images):
        _add(tar, image_file(sample.place, number), _encode_png(image))
    if is_file_name(record.get("item_id")) and len(images) in (1, 4):
        _add(tar, f"dpg/{record['item_id']}.png", _encode_png(build_grid(images)))
    if is_file_name(record.get("style")) and isinstance(record.get("index"), int):
        _add(tar, f"hps/{record['style']}/{record['index']:05d}.jpg", _encode_jpeg(images[0]))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} is no file")
    return file.read()


def _encode_png(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="PNG", compress_level=1)  # 6 is five times as slow and 5 % smaller
    return data.getvalue()


def _encode_jpeg(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="JPEG", quality=95, subsampling=0)
    return data.getvalue()


def _decode(path: Path, name: str, data: bytes) -> np.ndarray:
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (OSError, SyntaxError) as error:  # Pillow raises the second for a broken chunk
        raise DataError(f"{path}: image {name} does not read ({error}); delete the stage and run it again") from error
