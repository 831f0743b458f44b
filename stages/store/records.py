"""The JSON documents of a store: claims, records, promoted names and the manifests of finished parts.

Each is built in one place and never changed. Keys that this code does not know, as an earlier or a later DMDR may have
written them, are kept.
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
    """What all of them share."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    @classmethod
    def from_json(cls, data: Json) -> Self:
        """Raises ValueError if a key is missing or a value has another type."""
        return cls.model_validate(data)

    def to_dict(self) -> Json:
        """JSON without the keys that have no value."""
        return self.model_dump(by_alias=True, exclude_defaults=True)

    def to_json(self) -> bytes:
        return json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False).encode()


class FileDigest(Document):
    """By what a file is known."""

    size: int  # bytes
    sha256: str  # 64 hex digits


class StoredFile(FileDigest):
    """A file of an artifact."""

    stored_as: str | None = None  # its name at the address, where another copy of the stage had taken its own


class Cost(Document):
    """What the last attempt of a stage used."""

    cpu_s: float  # seconds of CPU
    peak_memory_mib: float


class Provenance(Document):
    """How a result was made."""

    code: dict[str, str]  # dmdr's version, a digest of its sources, and the versions of the libraries
    device: str
    duration_s: float
    cost: Cost
    teacher: str | None = None  # its name; early records have none
    processes: int | None = None  # of a training stage that ran as several
    adopted_from: str | None = None  # the run that made it, if not this one


class Claim(Document):
    """Which settings and inputs an address belongs to."""

    version: int = Field(alias="schema")
    run: str
    stage: str
    identity: Json  # the settings that name the result, flat: "student.steps": 4
    inputs: dict[str, str]  # name -> fingerprint


class Seal(Claim):
    """What every record.json says."""

    files: dict[str, StoredFile]  # by name, relative to the address
    fingerprint: str  # of stage, identity, inputs and files


class Record(Seal):
    """The seal of a stage. In its JSON the provenance's keys stand beside the others."""

    facts: Json  # what the stage says about its result
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
    """Which result a promoted name meant at some time."""

    run: str
    fingerprint: str
    promoted_at: str  # ISO 8601, UTC


class Pointer(Document):
    """Which result a promoted name means, and which one it meant before."""

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
    """A finished part of an open stage, and what its writer says about it."""

    about: dict[str, int | float]

    def to_json(self) -> bytes:
        return json.dumps(self.to_dict()).encode()


def parse_manifest(data: bytes) -> dict[str, FileDigest]:
    """The files of a checkpoint by name. Raises ValueError with one line."""
    manifest = json.loads(data)
    try:
        return {name: FileDigest.from_json(digest) for name, digest in manifest.items()}
    except (AttributeError, ValueError) as error:
        raise ValueError("its manifest does not say size and sha256 of each file") from error


def fingerprint_result(claim: Claim, files: Mapping[str, FileDigest]) -> str:
    """What a result is known by: the settings and inputs that it is made from, and the contents of its files."""
    contents = {name: file.sha256 for name, file in files.items()}
    return fingerprint({"stage": claim.stage, "identity": claim.identity, "inputs": claim.inputs, "files": contents})
