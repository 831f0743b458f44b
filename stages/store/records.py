"""The JSON documents of a store: claims, records, promoted names, and the manifests of checkpoints and shards.

Each document is built in one place and never changed. Unknown keys, which an earlier or a later DMDR may have written,
are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from dmdr.config.identity import fingerprint

SCHEMA = 1
Json = dict[str, object]  # a JSON object whose keys its writer defines


class Document(BaseModel):
    """The base of all documents: frozen, strict, and read from JSON."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    @classmethod
    def from_json(cls, data: Json) -> Self:
        """Raises ValueError if a key is missing or a value has another type."""
        return cls.model_validate(data)

    def to_dict(self) -> Json:
        """The JSON object, without the keys whose value is the default."""
        return self.model_dump(by_alias=True, exclude_defaults=True)

    def to_json(self) -> bytes:
        return json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False).encode()


class FileDigest(Document):
    """The size and the digest of a file, by which its content is recognised."""

    size: int  # bytes
    sha256: str  # 64 hex digits


class StoredFile(FileDigest):
    """A file of an artifact."""

    stored_as: str | None = None  # its name at the address, if another process had taken the usual one


class Cost(Document):
    """The CPU time and memory that the last attempt of a stage used."""

    cpu_s: float  # seconds of CPU
    peak_memory_mib: float


class Provenance(Document):
    """The code, device, time and cost that made a result."""

    code: dict[str, str]  # dmdr's version, a digest of its sources, and the versions of the libraries
    device: str
    duration_s: float
    cost: Cost
    teacher: str | None = None  # its name; early records have none
    processes: int | None = None  # number of ranks, if a training stage ran in several
    adopted_from: str | None = None  # the run that made the result, if it was another one


class Claim(Document):
    """claim.json: the settings and inputs that an address belongs to."""

    version: int = Field(alias="schema")
    run: str
    stage: str
    identity: Json  # the settings that determine the result, flat: "student.steps": 4
    inputs: dict[str, str]  # name -> fingerprint


class Seal(Claim):
    """The keys that every record.json has."""

    files: dict[str, StoredFile]  # by name, relative to the address
    fingerprint: str  # of stage, identity, inputs and files


class Record(Seal):
    """The seal of a stage. In its JSON the provenance's keys stand beside the others."""

    facts: Json  # the stage's own description of its result
    provenance: Provenance

    @classmethod
    def from_json(cls, data: Json) -> Self:
        own = {field.alias or name for name, field in cls.model_fields.items()}
        provenance = {key: value for key, value in data.items() if key not in own}
        return cls.model_validate({**{key: data[key] for key in own & data.keys()}, "provenance": provenance})

    def to_dict(self) -> Json:
        own = self.model_dump(by_alias=True, exclude_defaults=True, exclude={"provenance"})
        return {**self.provenance.to_dict(), **own}


class TeacherRecord(Seal):
    """The seal of a published teacher."""

    published_at: str  # ISO 8601, UTC


class Promotion(Document):
    """A result that a promoted name pointed at, and since when."""

    run: str
    fingerprint: str
    promoted_at: str  # ISO 8601, UTC


class Pointer(Document):
    """The result that a promoted name points at, and the one that it pointed at before."""

    version: int = Field(alias="schema")
    run: str
    stage: str = "export"
    fingerprint: str
    promoted_at: str  # ISO 8601, UTC
    before: Promotion | None = None

    def as_promotion(self) -> Promotion:
        return Promotion(run=self.run, fingerprint=self.fingerprint, promoted_at=self.promoted_at)

    def to_json(self) -> bytes:
        return json.dumps(self.model_dump(by_alias=True), indent=1).encode()


class ShardManifest(FileDigest):
    """The manifest of a finished shard. about: figures that its writer stored beside it."""

    about: dict[str, int | float | list[float]]

    def to_json(self) -> bytes:
        return json.dumps(self.to_dict()).encode()


def parse_manifest(data: bytes) -> dict[str, FileDigest]:
    """The files of a checkpoint by name. Raises ValueError with one line."""
    manifest = json.loads(data)
    try:
        return {name: FileDigest.from_json(digest) for name, digest in manifest.items()}
    except (AttributeError, ValueError) as error:
        raise ValueError("its manifest lacks the size or sha256 of a file") from error


def fingerprint_result(claim: Claim, files: Mapping[str, FileDigest]) -> str:
    """A digest of a result: of its stage, its settings and inputs, and the contents of its files."""
    contents = {name: file.sha256 for name, file in files.items()}
    return fingerprint({"stage": claim.stage, "identity": claim.identity, "inputs": claim.inputs, "files": contents})
