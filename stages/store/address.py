"""One address of a store: claim it, seal it, read its record, and fetch its files, verified.

{store}/{run}/{stage}/claim.json    written first: the settings and inputs that this address belongs to
                       ...          the files
                       record.json  written last and never replaced: the seal. Without it, readers find nothing here
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NoReturn, TypeVar

from dmdr.config.names import describe_rule, is_name
from dmdr.config.secrets import refuse_secret_arguments
from dmdr.errors import ConfigError, DataError, InputMissing, StoreError
from stages.store.folder import Folder
from stages.store.intact import Damaged, fetch_intact
from stages.store.layout import CLAIM, LEASES, LIVE, RECORD
from stages.store.records import SCHEMA, Claim, Document, Json, Seal, compute_checksum, parse_json

if TYPE_CHECKING:
    from stages.store.remote import Remote

SHORT_DIGEST = 12  # hex digits of a digest in messages
LONGEST, TOLD = 80, 8  # letters of a setting's value, and differences between two claims, in messages
LISTINGS = 5  # how often a listing that lacks the claim is asked for
PAUSE = 0.5  # seconds between two listings
SealT = TypeVar("SealT", bound=Seal)
DocumentT = TypeVar("DocumentT", bound=Document)


def shorten(digest: str) -> str:
    """The beginning of a digest, for messages."""
    return f"{digest[:SHORT_DIGEST]}…"


def open_place(address: str) -> Folder | Remote:
    """Open the files of an address: that of a stage, or a folder above it.

    Raises:
        ConfigError: the address holds a secret, or is of an unknown kind.
    """
    refuse_secret_arguments([address])
    if "://" in address.removeprefix("file://"):
        from stages.store.remote import Remote  # the libraries of S3 take time to import

        return Remote(address)
    return Folder(Path(address.removeprefix("file://")).expanduser().absolute())


class Address(Generic[SealT]):
    """One stage of one run in a store, or one revision of one published teacher. kind: the type of its record.

    Raises:
        ConfigError: the run's name cannot stand in an address, or the store is of an unknown kind.
        StoreError, Refused, InputMissing: any method: the store does not answer, refuses the request, or has no bucket.
    """

    def __init__(self, store: str, run: str, stage: str, kind: type[SealT]) -> None:
        if not store:
            raise ConfigError("--store is empty; give a folder or s3://BUCKET/PREFIX")
        if not is_name(run):
            raise ConfigError(f"run name {run!r} {describe_rule(run)}")
        self.store, self.run, self.stage = store, run, stage
        self.address = f"{store.rstrip('/')}/{run}/{stage}"
        self.place = open_place(self.address)
        self._kind = kind
        self._claimed: Claim | None = None  # what this process claimed the address for
        self.check_lease: Callable[[], object] = lambda: None  # raises Stopped if another copy has taken over

    def record(self) -> SealT | None:
        """The record that seals this address; None if nothing is sealed here.

        Raises:
            DataError: the record is not JSON, was not written by DMDR, or has another schema.
        """
        data = self.place.read(RECORD)
        return None if data is None else self._parse_record(data)

    def claim(self, identity: Json, inputs: dict[str, str]) -> SealT | None:
        """Claim the address for these settings and inputs, or check that it is already claimed for them.

        A claim for other settings yields if nothing came of it yet, and nobody works on it.
        Returns the record if the address is sealed, None if the stage has to run.

        Raises:
            ConfigError: the address belongs to other settings or inputs, or holds files and no claim.
        """
        wanted = Claim(schema=SCHEMA, run=self.run, stage=self.stage, identity=normalise_json(identity), inputs=inputs)
        record = self.record()
        owner: Claim | None = record
        if owner is None:
            if self.place.read(CLAIM) is None:
                self.refuse_foreign_files()
            owner = self._parse_claim(self.place.create(CLAIM, wanted.to_json()))
            self.place.tidy()
            if list_differences(owner, wanted) and self.is_bare():
                with self.place.alone():
                    self.place.remove(LIVE)  # of the settings before
                    self.place.remove(CLAIM)
                    owner = self._parse_claim(self.place.create(CLAIM, wanted.to_json()))
        if differences := list_differences(owner, wanted):
            raise ConfigError(self.describe_conflict(differences, is_sealed=record is not None))
        self._claimed = wanted
        return record

    def names(self) -> list[str]:
        """The names of all files of a claimed address. A listing without the claim is stale, and asked for again.

        Raises:
            StoreError: every listing lacks it, or somebody deleted the address.
        """
        for _ in range(LISTINGS):
            names = self.place.names()
            if CLAIM in names:
                return names
            self.require_claim()
            time.sleep(PAUSE)
        raise StoreError(
            f"the store lists {self.address} without its {CLAIM}, which is there; repeat the command later"
        )

    def refuse_foreign_files(self) -> None:
        """
        Raises:
            ConfigError: nobody has claimed the address, and files are here, which a stage would replace and delete.
        """
        # what a stage shows may outlive it: a copy that does not know yet that somebody removed it
        names = [name for name in self.place.names() if not name.startswith(f"{LIVE}/")]
        if names and CLAIM not in names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ConfigError(
                f"{self.address} holds {names[0]}{more}, which DMDR did not write; give another --run or --store, or "
                "move them away"
            )

    def is_bare(self) -> bool:
        """Whether nothing but a claim is here, and no other process works on it, as far as the store can tell."""
        others = [name for name in self.names() if name != CLAIM and not name.startswith((f"{LEASES}/", f"{LIVE}/"))]
        return not (others or self.place.is_busy())

    def require_claim(self) -> Claim:
        """The claim, before something is stored under it.

        Raises:
            StoreError: somebody deleted the address.
            ConfigError: another process has claimed it for other settings since.
        """
        claim = self.read_claim()
        if claim is None:
            raise StoreError(f"{self.address}/{CLAIM} is gone, so somebody deleted the address; repeat the command")
        if self._claimed is not None and (differences := list_differences(claim, self._claimed)):
            raise ConfigError(
                f"another process has begun {self.stage} at {self.address} with other settings "
                f"({'; '.join(differences)}); give one of the two runs another name with --run"
            )
        return claim

    def claimed(self) -> Claim:
        """What the address belongs to: what this process claimed it for, or else what its claim says."""
        return self._claimed or self.require_claim()

    def check_claim(self) -> None:
        """Raises as `check_lease` does, and as `require_claim` if this process has claimed the address."""
        self.check_lease()
        if self._claimed is not None:
            self.require_claim()

    def describe_conflict(self, differences: list[str], *, is_sealed: bool) -> str:
        """One line that says why the address cannot be had for other settings, and what to do."""
        at = "" if self.store == "runs" else f" --store {self.store}"
        remove = f"dmdr rm {self.run} {self.stage}{at}"
        state = "another" if is_sealed else "an unfinished"
        return (
            f"run {self.run} has {state} {self.stage} at {self.address}: {'; '.join(differences)}; give this run "
            f"another name with --run, or remove that one and what was made from it: {remove}"
        )

    def read_claim(self) -> Claim | None:
        """The settings and inputs that the address belongs to; None if nobody has claimed it."""
        data = self.place.read(CLAIM)
        return None if data is None else self._parse_claim(data)

    def sealed(self) -> SealT:
        """The record of a sealed address, for readers of its files.

        Raises:
            InputMissing: nothing is sealed here.
        """
        record = self.record()
        if record is None:
            raise InputMissing(
                f"{self.stage} of run {self.run} is not sealed at {self.address}; run that stage first, "
                "or correct --run and --store"
            )
        return record

    def fetch(self, cache: Path, only: Callable[[str], bool] = lambda name: True) -> Path:
        """A local folder with the sealed files, each verified.

        For a local store this is the store's own folder: never write there. Files of a remote store are downloaded
        into `cache`.
        only: tells by its name whether a file is wanted. Other files are neither downloaded nor verified.

        Raises:
            InputMissing: nothing is sealed here.
            DataError: a file is missing, or differs from the record.
        """
        for name, expected in self.sealed().files.items():
            if not only(name):
                continue
            try:
                fetch_intact(self.place, expected.stored_as or name, cache / name, expected)
            except Damaged as error:
                raise DataError(
                    f"{self.address}/{name} {error}; delete {self.address} and run {self.stage} again"
                ) from error
        return self.place.root if isinstance(self.place, Folder) else cache

    def workspace(self) -> Path:
        """A new folder for this attempt, deleted when the process ends. For a local store it is on the store's disk."""
        return Path(tempfile.mkdtemp(prefix="work-", dir=self.place.scratch()))

    def write_record(self, record: SealT) -> SealT:
        """Seal the address unless it is already sealed; returns the record that is there now."""
        return self._parse_record(self.place.create(RECORD, record.with_checksum().to_json()))

    def _parse_record(self, data: bytes) -> SealT:
        parsed = self._parse_json(RECORD, data)
        if parsed["schema"] != SCHEMA:
            raise DataError(
                f"{self.address} was sealed with schema {parsed['schema']}, but this DMDR reads {SCHEMA}; "
                "use the DMDR that sealed it, or give this run another name with --run"
            )
        record = self._parse(RECORD, parsed, self._kind)
        if record.fingerprint != record.compute_fingerprint():
            self._refuse_changed("its fingerprint is not that of its settings, inputs and files")
        if record.checksum is not None and record.checksum != compute_checksum(parsed):
            self._refuse_changed("its checksum is not that of its contents")
        return record

    def _refuse_changed(self, evidence: str) -> NoReturn:
        raise DataError(
            f"{self.address}/{RECORD} was changed after it was written: {evidence}; do not trust these files: delete "
            f"{self.address} and make it again"
        )

    def _parse_claim(self, data: bytes) -> Claim:
        return self._parse(CLAIM, self._parse_json(CLAIM, data), Claim)

    def _parse_json(self, name: str, data: bytes) -> Json:
        try:
            parsed = parse_json(data)
        except ValueError as error:
            raise DataError(
                f"{self.address}/{name} is not JSON; delete {self.address} and run the stage again"
            ) from error
        if not isinstance(parsed, dict) or not {"schema", "identity", "inputs"} <= parsed.keys():
            raise DataError(self._describe_foreign(name))
        return parsed

    def _parse(self, name: str, data: Json, kind: type[DocumentT]) -> DocumentT:
        try:
            return kind.from_json(data)
        except ValueError as error:
            if "outside this address" in str(error):
                raise DataError(
                    f"{self.address}/{name} names a file outside this address; do not trust this store"
                ) from error
            raise DataError(self._describe_foreign(name)) from error

    def _describe_foreign(self, name: str) -> str:
        return f"{self.address}/{name} was not written by DMDR; give another --store or --run"


def normalise_json(data: Json) -> Json:
    """The data as JSON gives it back, with lists for tuples."""
    normalised: Json = json.loads(json.dumps(data, allow_nan=False))
    return normalised


def find_differing_keys(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """The keys that are missing on one side or have different values, in alphabetical order."""
    keys = sorted({*one, *other})
    return [key for key in keys if (key in one, one.get(key)) != (key in other, other.get(key))]


def list_differences(owner: Claim, wanted: Claim) -> list[str]:
    """Each setting and each input in which two claims differ, in words."""
    return [
        *_list_differences(owner.identity, wanted.identity),
        *_list_differences(owner.inputs, wanted.inputs, "input "),
    ]


def _list_differences(owner: Mapping[str, object], wanted: Mapping[str, object], kind: str = "") -> list[str]:
    """For each key that differs, say the value at the address and the wanted one.

    kind: "" for settings; "input " for inputs, whose values are digests and are shortened.
    """

    def show(values: Mapping[str, object], key: str) -> str:
        if key not in values:
            return "not set"
        text = json.dumps(values[key])
        return f"{text[1 : SHORT_DIGEST + 1]}…" if kind else _cut(text)

    differing = find_differing_keys(owner, wanted)
    told = [f"{kind}{_cut(key)} is {show(owner, key)} there, {show(wanted, key)} here" for key in differing[:TOLD]]
    return [*told, f"and {len(differing) - TOLD} more"] if len(differing) > TOLD else told


def _cut(text: str) -> str:
    """A text, or the beginning of a long one."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
