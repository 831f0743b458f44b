"""Transfer large files to and from S3 in parallel parts, in bounded memory. A failed part is repeated on its own.

s3fs alone has four faults. It gives up a whole download when one body is cut short. It waits for the slowest of ten
parts before it begins the next ten. It holds 500 MB in memory. And it reports a completed upload as failed if the
answer gets lost.
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
from stages.store.s3_requests import S3Answer, S3Call

T = TypeVar("T")
R = TypeVar("R")
Read = Callable[[int, int], bytes]  # (start, end) -> the bytes start to end - 1 of an object, or fewer at its end

PART = 16 * 2**20  # bytes
AT_ONCE = 8  # parts in flight, each at most about twice in memory
MOST_PARTS = 10_000  # of one object; S3's limit


def map_in_parallel(do: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The results of `do` for all items, in their order.

    After the first error no new item is started. The error is raised when the running items have ended.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = [pool.submit(do, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(cancel_futures=True)
    return [each.result() for each in futures]


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
    """Whether the object has the bytes of the file.

    If the answer to an upload got lost, the store refuses to write the same object again. Then the bytes are the same.
    """
    if size() != source.stat().st_size:
        return False
    with source.open("rb") as file:
        while part := file.read(PART):
            if read(file.tell() - len(part), file.tell()) != part:
                return False
    return True


def upload(call: S3Call, bucket: str, key: str, source: Path, *, create: bool) -> None:
    """Store a file in parts. If anything fails, the uploaded parts are deleted and nothing becomes visible.

    create: refuse to replace an object.
    """

    def send_request(operation: str, **parameters: object) -> S3Answer:
        return retry(call, operation, Bucket=bucket, Key=key, **parameters)

    size = source.stat().st_size
    length = max(PART, math.ceil(size / MOST_PARTS))
    upload_id = send_request("create_multipart_upload", ChecksumAlgorithm="CRC32")["UploadId"]
    try:
        with source.open("rb") as file:

            def send_part(number: int) -> dict[str, object]:
                body = os.pread(file.fileno(), length, (number - 1) * length)
                # botocore would compute the checksum in the single thread that all parts share.
                proof = {"ChecksumCRC32": base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()}
                answer = send_request("upload_part", UploadId=upload_id, PartNumber=number, Body=body, **proof)
                return {"PartNumber": number, "ETag": answer["ETag"], **proof}

            parts = map_in_parallel(send_part, range(1, math.ceil(size / length) + 1))
        condition = {"IfNoneMatch": "*"} if create else {}
        send_request("complete_multipart_upload", UploadId=upload_id, MultipartUpload={"Parts": parts}, **condition)
    except BaseException:
        with suppress(Exception):  # the first error is the one to report
            send_request("abort_multipart_upload", UploadId=upload_id)
        raise


def end_uploads(call: S3Call, bucket: str, prefix: str) -> None:
    """Delete every unfinished upload of an object whose key begins with the prefix."""
    ended: set[str] = set()  # some stores list an upload for a while after it has ended
    while True:
        found = retry(call, "list_multipart_uploads", Bucket=bucket, Prefix=prefix).get("Uploads", [])
        if ended.issuperset(upload["UploadId"] for upload in found):
            return
        for upload in found:
            ended.add(upload["UploadId"])
            with suppress(FileNotFoundError):  # it has ended in the meantime
                retry(call, "abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
