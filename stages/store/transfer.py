"""Large files to and from S3: several parts at once, each tried again on its own, in bounded memory.

s3fs alone would give a whole download up for one body that was cut short, wait for the slowest of ten parts before it
begins the next ten, hold 500 MB of them, and take a completed upload whose answer got lost for a failed one.
"""

from __future__ import annotations

import base64
import math
import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from stages.store.s3_errors import retry

T = TypeVar("T")
R = TypeVar("R")
Read = Callable[[int, int], bytes]  # the bytes of an object from the first on and before the second, fewer at its end

PART = 16 * 2**20  # bytes
AT_ONCE = 8  # parts; there are at most about two copies of each in memory
MOST_PARTS = 10_000  # of one object, by S3


def map_in_parallel(do: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`do` of every item. After the first error no other is begun; it is raised when the ones under way have ended."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        begun = [pool.submit(do, item) for item in items]
        try:
            wait(begun, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(cancel_futures=True)
    return [each.result() for each in begun]


def download(read: Read, size: Callable[[], int], target: Path) -> Path:
    """Fill `target` and return it. A file that fits into one part costs one request."""
    first = read(0, PART)
    with target.open("wb") as file:
        file.write(first)
        file.flush()
        if len(first) == PART:
            map_in_parallel(lambda at: os.pwrite(file.fileno(), read(at, at + PART), at), range(PART, size(), PART))
    return target


def is_same(read: Read, size: Callable[[], int], source: Path) -> bool:
    """Whether the object has the bytes of the file: an upload that was refused may be our own, its answer lost."""
    if size() != source.stat().st_size:
        return False
    with source.open("rb") as file:
        while part := file.read(PART):
            if read(file.tell() - len(part), file.tell()) != part:
                return False
    return True


def upload(call: Callable[..., dict], bucket: str, key: str, source: Path, *, create: bool) -> None:
    """Put a file there in parts. If anything fails, what was uploaded is given back and nothing becomes visible.

    call: an S3 operation by name, with its parameters. create: refuse to replace an object.
    """

    def ask(operation: str, **parameters: object) -> dict:
        return retry(call, operation, Bucket=bucket, Key=key, **parameters)

    size = source.stat().st_size
    length = max(PART, math.ceil(size / MOST_PARTS))
    begun = ask("create_multipart_upload", ChecksumAlgorithm="CRC32")["UploadId"]
    try:
        with source.open("rb") as file:

            def send(number: int) -> dict:
                body = os.pread(file.fileno(), length, (number - 1) * length)
                # The library would do this too, but in the one thread that all parts share.
                proof = {"ChecksumCRC32": base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()}
                told = ask("upload_part", UploadId=begun, PartNumber=number, Body=body, **proof)
                return {"PartNumber": number, "ETag": told["ETag"], **proof}

            parts = map_in_parallel(send, range(1, math.ceil(size / length) + 1))
        condition = {"IfNoneMatch": "*"} if create else {}
        ask("complete_multipart_upload", UploadId=begun, MultipartUpload={"Parts": parts}, **condition)
    except BaseException:
        with suppress(Exception):  # the first error is the one to tell
            ask("abort_multipart_upload", UploadId=begun)
        raise
