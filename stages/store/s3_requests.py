"""The types of a request to S3 and of its answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict


class FolderEntry(TypedDict):
    Prefix: str


class ObjectEntry(TypedDict):
    Key: str


class UploadEntry(TypedDict):
    Key: str
    UploadId: str


class S3Answer(TypedDict, total=False):
    """The keys of S3's answers that DMDR reads. The operation decides which of them an answer has."""

    UploadId: str
    Uploads: list[UploadEntry]
    ETag: str
    CommonPrefixes: list[FolderEntry]
    Contents: list[ObjectEntry]
    IsTruncated: bool
    NextContinuationToken: str


S3Call = Callable[..., S3Answer]  # an operation of S3 by name, with its parameters
