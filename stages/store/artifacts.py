"""Addresses, claims, records and seals.

{store}/{run}/{stage}/claim.json    first: which settings and inputs this address belongs to
                       checkpoints/ while the stage is open
                       ...          the files of the artifact
                       record.json  last, and only if there is none: the seal. No record, no artifact

A record's fingerprint is over what the result is made from and its files, except those that tell how long it took.

Two live copies of a stage may race to here. A local copy seals alone, behind a lock; on S3 an object is never
overwritten: the later copy's file gets another name. So the record that wins always describes files that still stand.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from dmdr.config.identity import fingerprint
from dmdr.config.run import NAME
from dmdr.errors import ConfigError, DataError, InputMissing, StoreError
from stages.store.folder import Folder
from stages.store.layout import CHECKPOINTS, CLAIM, RECORD, digest, tells_time
from stages.store.remote import Remote

if TYPE_CHECKING:
    from stages.store.checkpoints import Checkpoints

SCHEMA = 1
SEEN = 12  # hex digits of a digest that are shown to people


def open_place(address: str) -> Folder | Remote:
    """The files of any address, of a stage or above it."""
    if "://" in address.removeprefix("file://"):
        return Remote(address)
    return Folder(Path(address.removeprefix("file://")).expanduser().absolute())


class Artifact:
    """One stage of one run in a store.

    Raises:
        ConfigError: a run name that cannot stand in an address, or a store of an unknown kind.
        StoreError, Refused, InputMissing: from every method, as the store does not answer, refuses, or has no bucket.
    """

    def __init__(self, store: str, run: str, stage: str) -> None:
        if not store:
            raise ConfigError("--store is empty; give a folder or s3://BUCKET/PREFIX")
        if not re.fullmatch(NAME, run):
            raise ConfigError(
                f"run name {run!r} must be at most 63 of a-z 0-9 . _ - and begin with a letter or a digit; "
                "change it in the config, or give another with --run"
            )
        self.store, self.run, self.stage = store, run, stage
        self.address = f"{store.rstrip('/')}/{run}/{stage}"
        self.place = open_place(self.address)

    def record(self) -> dict | None:
        """What the seal says; None when the artifact is not sealed."""
        record = self._json(RECORD)
        if record is not None and record["schema"] != SCHEMA:
            raise DataError(
                f"{self.address} was sealed with schema {record['schema']}, this code reads {SCHEMA}; "
                "use the DMDR it was made with, or give this run another name with --run"
            )
        return record

    def claim(self, identity: dict, inputs: dict[str, str]) -> dict | None:
        """Take the address for these settings and inputs, or find that they have it already.

        Returns the record if the artifact is sealed with them, None if the stage has to run.

        Raises:
            ConfigError: the address belongs to other settings or inputs.
        """
        asked = {"schema": SCHEMA, "run": self.run, "stage": self.stage, "identity": identity, "inputs": inputs}
        found = record = self.record()
        if found is None:
            found = self._parse(CLAIM, self.place.create(CLAIM, _to_json(asked)))
            self.place.tidy()
        differences = _list_differences(found["identity"], _parse_json(identity), "")
        differences += _list_differences(found["inputs"], inputs, "input ")
        if differences:
            raise ConfigError(
                f"run {self.run} has another {self.stage} at {self.address}: {'; '.join(differences)}; "
                f"give this run another name with --run, or delete {self.address} and what was made from it"
            )
        return record

    def sealed(self) -> dict:
        """The record of an artifact that is to be read.

        Raises:
            InputMissing: it is not sealed.
            DataError: the record names a file outside the address.
        """
        record = self.record()
        if record is None:
            raise InputMissing(
                f"{self.stage} of run {self.run} is not sealed at {self.address}; run that stage first, "
                "or correct --run and --store"
            )
        for name in record["files"]:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise DataError(f"{self.address}/{RECORD} names {name!r}, which is outside; do not trust this store")
        return record

    def fetch(self, cache: Path, only: Callable[[str], bool] = lambda name: True) -> Path:
        """A local folder with the files of the sealed artifact, each verified.

        A local store returns its own folder, so never write there; a remote one's files are downloaded into `cache`.
        only: which files are wanted, by name; the others are neither downloaded nor verified.

        Raises:
            InputMissing: it is not sealed.
            DataError: a file is missing, or is not what the record says.
        """
        for name, expected in self.sealed()["files"].items():
            if not only(name):
                continue
            path = self.place.fetch(expected.get("stored_as", name), cache / name)
            whole = path is not None and digest(path) == {key: expected[key] for key in ("size", "sha256")}
            if not whole:
                told = "is missing" if path is None else f"is damaged: its sha256 is not the one in {RECORD}"
                raise DataError(f"{self.address}/{name} {told}; delete {self.address} and run {self.stage} again")
        return self.place.root if isinstance(self.place, Folder) else cache

    def workspace(self) -> Path:
        """A new folder for this attempt, gone when the process ends; on a local store it lies on the store's disk."""
        return Path(tempfile.mkdtemp(prefix="work-", dir=self.place.scratch()))

    def seal(self, folder: Path, *, facts: dict, made: dict | None = None) -> dict:
        """Move the files of `folder` in, then write the record; returns it. `claim` came before.

        facts: what the stage says about its result. made: how it was made (code, device, duration_s, ...).
        If another live copy of the stage has sealed in the meantime, its record is returned and ours is dropped.
        """
        claim = self._json(CLAIM)
        if claim is None:
            raise StoreError(f"{self.address}/{CLAIM} is gone: somebody deleted the address; repeat the command")
        with self.place.alone():
            record = self.record() or self._seal(folder, claim, {**(made or {}), "facts": facts})
            kept = {CLAIM, RECORD, *(at.get("stored_as", name) for name, at in record["files"].items())}
            self.place.remove(CHECKPOINTS)
            for name in set(self.place.names()) - kept:  # of killed attempts, or of a copy that came second
                self.place.remove(name)
        return record

    def adopt(self, other: Artifact, identity: dict, inputs: dict[str, str]) -> dict | None:
        """Take over what another run sealed with these very settings and inputs: it is the same artifact.

        Its files are verified there, copied and verified again; then it is claimed and sealed here as if it had been
        made here, so that the record comes last. The record says `adopted_from`: which run made it.
        Returns the record of this address; None if the other is not sealed, or is another result.

        Raises:
            ConfigError: this address belongs to other settings or inputs.
            DataError: a file of the other is missing or damaged, or the copy is.
        """
        theirs = other.record()
        if theirs is None or other.stage != self.stage or theirs["inputs"] != inputs:
            return None
        if theirs["identity"] != _parse_json(identity):
            return None
        if (ours := self.claim(identity, inputs)) is not None:
            return ours
        folder = self.workspace()
        fetched = other.fetch(folder / "theirs")
        for name, expected in theirs["files"].items():
            copy = folder / "ours" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fetched / name, copy)
            if digest(copy) != {key: expected[key] for key in ("size", "sha256")}:
                raise DataError(f"{other.address}/{name} changed while it was copied; repeat the command")
        belongs = {"schema", "run", "stage", "identity", "inputs", "files", "fingerprint", "facts"}
        made = {key: value for key, value in theirs.items() if key not in belongs}
        return self.seal(folder / "ours", facts=theirs["facts"], made={"adopted_from": other.run, **made})

    def _seal(self, folder: Path, claim: dict, about: dict) -> dict:
        files = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            assert name.split("/")[0] not in (RECORD, CLAIM, CHECKPOINTS), name
            assert not path.is_symlink(), name
            files[name] = digest(path)
            stored_as = self.place.add(name, path, str(files[name]["sha256"]))
            if stored_as != name:
                files[name]["stored_as"] = stored_as
        contents = {name: found["sha256"] for name, found in files.items() if not tells_time(name)}
        named = {key: claim[key] for key in ("stage", "identity", "inputs")}
        record = {**about, **claim, "files": files, "fingerprint": fingerprint({**named, "files": contents})}
        return self._parse(RECORD, self.place.create(RECORD, _to_json(record)))

    def checkpoints(self, keep: int) -> Checkpoints:
        """The checkpoints of the open stage, of which `keep` (at least 2) stay."""
        from stages.store.checkpoints import Checkpoints  # torch, which a sealed stage need not wait for

        return Checkpoints(self.place, f"{self.address}/{CHECKPOINTS}", keep)

    def _json(self, name: str) -> dict | None:
        data = self.place.read(name)
        return None if data is None else self._parse(name, data)

    def _parse(self, name: str, data: bytes) -> dict:
        try:
            parsed = json.loads(data)
        except ValueError as error:
            raise DataError(f"{self.address}/{name} is not JSON; delete {self.address}, run the stage again") from error
        if not isinstance(parsed, dict) or not {"schema", "identity", "inputs"} <= parsed.keys():
            raise DataError(f"{self.address}/{name} was not written by DMDR; give another --store or --run")
        return parsed


def _to_json(data: dict) -> bytes:
    return json.dumps(data, indent=1, sort_keys=True, allow_nan=False).encode()


def _parse_json(data: dict) -> dict:
    return json.loads(_to_json(data))


def _list_differences(found: dict, asked: dict, kind: str) -> list[str]:
    """For each key that differs, what is there and what was asked."""

    def shown(side: dict, key: str) -> str:
        if key not in side:
            return "not set"
        text = json.dumps(side[key])
        return f"{text[1 : SEEN + 1]}…" if kind else text  # inputs are digests

    keys = sorted(key for key in {*found, *asked} if (key in found, found.get(key)) != (key in asked, asked.get(key)))
    return [f"{kind}{key} is {shown(found, key)} there, {shown(asked, key)} here" for key in keys]
