"""The JSON documents of a store: claims, records, promoted names, and the manifests of checkpoints and shards.

Each document is built in one place and never changed. Unknown keys, which an earlier or a later DMDR may have written,
are kept. Anybody may have written to a store, so a document is believed only as far as it proves itself: names of files
cannot leave their place, digests are digests, and a record's fingerprint is computed again from what it lists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Literal, NoReturn, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from dmdr.config.identity import fingerprint
from dmdr.config.names import NAME

SCHEMA = 1
CHECKPOINT_SCHEMA = 2  # the first manifests did not say whose the checkpoint is
TIMED = {"provenance.json", "README.md", "SHA256SUMS", "report.html", "speed.json", "model.sig"}  # in any folder
DIGITS = 12  # of the digest in the second name of a file
LONGEST_NAME = 1024  # letters of a file's name; the limit of S3's keys
Json = dict[str, object]  # a JSON object whose keys its writer defines


def parse_json(data: bytes | str) -> object:
    """The value of a JSON document from a store. Raises ValueError with one line, whatever the bytes are."""
    try:
        return json.loads(data, object_pairs_hook=_build_object, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _build_object(pairs: list[tuple[str, object]]) -> Json:
    built = dict(pairs)
    if len(built) < len(pairs):
        raise ValueError("it gives a key twice")
    return built


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def is_inside(name: str) -> bool:
    """Whether the name of a file stays below its address, on every system and in every terminal."""
    parts = name.split("/")
    return (
        0 < len(name) <= LONGEST_NAME
        and name.isprintable()
        and "\\" not in name
        and not any(part in ("", ".", "..") for part in parts)
    )


def _require_inside(name: str) -> str:
    if not is_inside(name):
        raise ValueError(f"{name[:40]!r} is a file outside this address")
    return name


FileName = Annotated[str, AfterValidator(_require_inside)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=NAME)]


def tells_time(name: str) -> bool:
    """Whether a file tells how long something took. That differs in every run, so the fingerprint leaves it out.

    SHA256SUMS and the signature are such files, because they hold the digests of the others.
    """
    return PurePosixPath(name).name in TIMED


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

    size: Annotated[int, Field(ge=0)]  # bytes
    sha256: Sha256


class StoredFile(FileDigest):
    """A file of an artifact."""

    stored_as: FileName | None = None  # its name at the address, if another process had taken the usual one

    def is_second_name_of(self, name: str) -> bool:
        """Whether it is stored under the name that a later process gives the file `name`."""
        return self.stored_as == f"{name}~{self.sha256[:DIGITS]}"


class Spent(Document):
    """What all attempts of a stage have used so far.

    device_s: kind of device, such as NVIDIA H100 80GB HBM3 or cpu -> seconds of all of them together; of a CPU, seconds
    of CPU. read_bytes, written_bytes: moved from and to a remote store by the first rank.
    """

    device_s: dict[str, float] = {}
    read_bytes: int = 0
    written_bytes: int = 0

    def __add__(self, other: Spent) -> Spent:
        devices = sorted({*self.device_s, *other.device_s})
        return Spent(
            device_s={each: round(self.device_s.get(each, 0) + other.device_s.get(each, 0), 3) for each in devices},
            read_bytes=self.read_bytes + other.read_bytes,
            written_bytes=self.written_bytes + other.written_bytes,
        )


class Cost(Document):
    """The CPU time and memory that the last attempt of a stage used, and what all of them used.

    spent: early records have none. money: what the devices cost, where the config has prices; currency: such as EUR.
    """

    cpu_s: float  # seconds of CPU
    peak_memory_mib: float
    spent: Spent | None = None
    money: float | None = None
    currency: str | None = None


class Provenance(Document):
    """The code, device, time and cost that made a result."""

    code: dict[str, str]  # dmdr's version, a digest of its sources, and the versions of the libraries
    device: str
    duration_s: float
    cost: Cost
    teacher: str | None = None  # its name; early records have none
    start: str | None = None  # the name of what the student started from, if that was not the teacher
    processes: int | None = None  # number of ranks, if a training stage ran in several
    adopted_from: str | None = None  # the run that made the result, if it was another one


class Claim(Document):
    """claim.json: the settings and inputs that an address belongs to."""

    version: int = Field(alias="schema")
    run: Name
    stage: Name
    identity: Json  # the settings that determine the result, flat: "student.steps": 4
    inputs: dict[str, str]  # name -> fingerprint

    @property
    def teacher_digest(self) -> str:
        """The digest of the teacher that the result is made with; empty if somebody took it out."""
        return self.inputs.get("teacher", "")


class Seal(Claim):
    """The keys that every record.json has."""

    files: dict[FileName, StoredFile]  # by name, relative to the address
    fingerprint: Sha256  # of stage, identity, inputs and files
    checksum: Sha256 | None = None  # of the record's other keys; early records have none

    def compute_fingerprint(self) -> str:
        """The fingerprint that follows from what the record lists."""
        return fingerprint_result(self, self.files)

    def with_checksum(self) -> Self:
        """The same record with its checksum."""
        return self.model_copy(update={"checksum": compute_checksum(self.to_dict())})


class Record(Seal):
    """The seal of a stage. In its JSON the provenance's keys stand beside the others."""

    facts: Json  # the stage's own description of its result
    provenance: Provenance

    def compute_fingerprint(self) -> str:
        """The fingerprint that follows from what the record lists, but for files that tell how long something took."""
        return fingerprint_result(self, {name: file for name, file in self.files.items() if not tells_time(name)})

    @classmethod
    def from_json(cls, data: Json) -> Self:
        own = {field.alias or name for name, field in cls.model_fields.items()}
        provenance = {key: value for key, value in data.items() if key not in own}
        return cls.model_validate({**{key: data[key] for key in own & data.keys()}, "provenance": provenance})

    def to_dict(self) -> Json:
        own = self.model_dump(by_alias=True, exclude_defaults=True, exclude={"provenance"})
        return {**self.provenance.to_dict(), **own}


class TeacherRecord(Seal):
    """The seal of a published teacher. pipeline: the digest by which runs know it; early records have none."""

    pipeline: Sha256 | None = None
    published_at: str  # ISO 8601, UTC

    @field_validator("inputs")
    @classmethod
    def _check_inputs(cls, inputs: dict[str, str]) -> dict[str, str]:
        """A folder of this machine is named by the digest."""
        if re.fullmatch("[0-9a-f]{64}", inputs.get("teacher", "")) is None:
            raise ValueError("inputs.teacher is no sha256")
        return inputs


class Promotion(Document):
    """A result that a promoted name pointed at, and since when."""

    run: Name
    fingerprint: Sha256
    promoted_at: str  # ISO 8601, UTC


class Pointer(Document):
    """A move of a promoted name: the result that it points at from then on, and the one that it pointed at before.

    back: the number of the move that an undo of this one goes back to; None where there is none. Of an undo itself:
    undoes, the run that it took the name from, and restores, the number of the promotion that holds again. token: of
    the process that made the move. Pointers of DMDR 0.1 have none of the four.
    """

    version: int = Field(alias="schema")
    run: Name
    stage: Literal["export"] = "export"
    fingerprint: Sha256
    promoted_at: str  # ISO 8601, UTC
    before: Promotion | None = None
    back: Annotated[int, Field(ge=0)] | None = None
    undoes: Name | None = None
    restores: Annotated[int, Field(ge=0)] | None = None
    token: str = ""

    def as_promotion(self) -> Promotion:
        return Promotion(run=self.run, fingerprint=self.fingerprint, promoted_at=self.promoted_at)

    def to_json(self) -> bytes:
        return json.dumps(self.model_dump(by_alias=True), indent=1).encode()


class MetricDecision(Document):
    """One metric of a decision: the student's mean less the carrier's, with the ends of its 95 % interval over prompts.

    All three are None where an image or a score is not a number. n: prompts.
    """

    metric: str
    difference: float | None
    low: float | None
    high: float | None
    n: int


class Decision(Document):
    """Whether a run was promoted under a name, and why. over: the run that carried the name; None if there was none.

    metrics: those that counted. not_counted: those that either run was trained on.
    """

    version: int = Field(alias="schema")
    name: Name
    run: Name
    fingerprint: Sha256  # of the run's export
    over: Name | None
    is_promoted: bool
    metrics: tuple[MetricDecision, ...] = Field((), strict=False)
    not_counted: tuple[str, ...] = Field((), strict=False)
    text: str  # the decision with its figures, in one line
    decided_at: str  # ISO 8601, UTC

    def to_json(self) -> bytes:
        return json.dumps(self.model_dump(by_alias=True), indent=1, allow_nan=False).encode()


class ShardManifest(FileDigest):
    """The manifest of a finished shard.

    owner: a digest of the claim that it was made under. about: figures that its writer stored beside it.
    """

    owner: Sha256
    about: dict[str, int | float | list[float]]

    def to_json(self) -> bytes:
        return json.dumps(self.to_dict()).encode()


class PartManifest(Document):
    """The manifest of a part of a result that was stored before the seal.

    owner: a digest of the claim that it was made under. about: figures that its writer stored beside it.
    """

    owner: Sha256
    files: dict[FileName, StoredFile]
    about: dict[str, int]

    def to_json(self) -> bytes:
        return json.dumps(self.to_dict()).encode()


class CheckpointManifest(Document):
    """The manifest of a checkpoint: whose it is, and its files by name."""

    version: int = Field(alias="schema")
    stage: Name
    identity: Json
    inputs: dict[str, str]
    files: dict[FileName, FileDigest]

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Raises ValueError with one line."""
        found = parse_json(data)
        if not isinstance(found, dict) or found.get("schema") != CHECKPOINT_SCHEMA:
            raise ValueError("its manifest does not say whose it is")
        try:
            return cls.from_json(found)
        except ValueError as error:
            raise ValueError("its manifest lacks the size or sha256 of a file") from error

    def to_json(self) -> bytes:
        return json.dumps(self.to_dict()).encode()


def compute_checksum(record: Mapping[str, object]) -> str:
    """A digest of a record's keys, its own checksum left out."""
    return fingerprint({key: value for key, value in record.items() if key != "checksum"})


def fingerprint_claim(claim: Claim) -> str:
    """A digest of what a claim is for: its stage, settings and inputs. Runs that share them make the same result."""
    return fingerprint({"stage": claim.stage, "identity": claim.identity, "inputs": claim.inputs})


def fingerprint_result(claim: Claim, files: Mapping[str, FileDigest]) -> str:
    """A digest of a result: of its stage, its settings and inputs, and the contents of its files."""
    contents = {name: file.sha256 for name, file in files.items()}
    return fingerprint({"stage": claim.stage, "identity": claim.identity, "inputs": claim.inputs, "files": contents})
