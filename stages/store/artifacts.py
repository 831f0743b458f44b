"""The artifact of a stage: seal it, or adopt one that another run has sealed.

{store}/{run}/{stage}/claim.json    written first: the settings and inputs that this address belongs to
                       checkpoints/ only while the stage is open
                       live/        what the stage shows while it is open; no part of the artifact, and may be lost
                       ...          the files of the artifact
                       record.json  written last and never replaced: the seal. Without a record there is no artifact

The fingerprint of a record covers the settings, the inputs and the files of the result, except files that tell how long
something took.

Two processes may try to seal the same stage. In a folder a lock makes one wait for the other. On S3 an object is never
overwritten: the later process stores its file under another name. So the record always describes files that exist.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from dmdr.errors import DataError
from stages.store.address import Address, normalise_json
from stages.store.layout import CHECKPOINTS, CLAIM, LEASES, LIVE, RECORD, digest, is_intact
from stages.store.records import (
    Claim,
    Json,
    Provenance,
    Record,
    StoredFile,
    fingerprint_result,
    is_inside,
    tells_time,
)

if TYPE_CHECKING:
    from stages.store.checkpoints import Checkpoints


SECOND_NAME = re.compile(r"~[0-9a-f]{12}$")  # the end of a name under which a later process stored its file


def first_name(name: str) -> str:
    """The name of a file of an artifact, whose second name this may be."""
    return SECOND_NAME.sub("", name)


class Artifact(Address[Record]):
    """One stage of one run in a store."""

    def __init__(self, store: str, run: str, stage: str) -> None:
        super().__init__(store, run, stage, Record)
        self.stored_early: dict[str, StoredFile] = {}  # files of the result that `partial_result.py` has put here

    def seal(self, folder: Path, *, facts: Json, provenance: Provenance) -> Record:
        """Move the files of `folder` into the store, then write the record and return it. Call `claim` before.

        facts: the stage's own description of its result.
        If another process has sealed the stage in the meantime, returns its record and writes none.
        """
        claim = self.require_claim()
        with self.place.alone():
            record = self.record() or self._seal(folder, claim, facts, provenance)
            self.place.remove(CHECKPOINTS)
            kept = {file.stored_as or name for name, file in record.files.items()}
            for name in set(self.names()) - kept:  # of killed attempts, or of a process that came second
                if first_name(name) in record.files:  # another file is not ours to delete
                    self.place.remove(name)
        return record

    def delete(self) -> None:
        """Remove the stage. The record goes first, so that no reader finds half of a result.

        The claim goes last: an interrupted removal leaves an address that is still known as ours. A file beside a
        sealed result that is not of it stays.
        """
        record, names = self.record(), self.place.names()
        self.place.remove(RECORD)
        for name in (CHECKPOINTS, LEASES, LIVE):
            self.place.remove(name)
        for name in names:
            if name != CLAIM and (record is None or first_name(name) in record.files):
                self.place.remove(name)
        self.place.remove(CLAIM)
        self.place.tidy()
        self.place.remove_empty("")

    def adopt(self, other: Artifact, identity: Json, inputs: dict[str, str]) -> Record | None:
        """Copy an artifact that another run sealed with the same settings and inputs.

        The files are verified, copied and verified again. Then this address is claimed and sealed as usual, so the
        record comes last. Its `adopted_from` names the run that made the artifact.
        Returns the record of this address; None if the other is not sealed, or has other settings or inputs.

        Raises:
            ConfigError: this address belongs to other settings or inputs.
            DataError: a file of the other is missing or damaged, or the copy is.
        """
        source = other.record()
        if source is None or other.stage != self.stage or source.inputs != inputs:
            return None
        if source.identity != normalise_json(identity):
            return None
        sealed = self.claim(identity, inputs)
        if sealed is not None:
            return sealed
        folder = self.workspace()
        fetched, copies = other.fetch(folder / "fetched"), folder / "copies"
        for name, expected in source.files.items():
            copy = copies / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fetched / name, copy)
            if not is_intact(copy, expected):
                raise DataError(f"{other.address}/{name} changed while it was copied; repeat the command")
        provenance = source.provenance
        if provenance.adopted_from is None:
            provenance = provenance.model_copy(update={"adopted_from": other.run})
        return self.seal(copies, facts=source.facts, provenance=provenance)

    def store_early(self, name: str, path: Path) -> StoredFile:
        """Put a file of the result into the store before the seal. Call it inside `place.alone()`."""
        self.stored_early[name] = self._store(name, path)
        return self.stored_early[name]

    def _store(self, name: str, path: Path) -> StoredFile:
        own = digest(path)
        stored_as = self.place.add(name, path, own.sha256)
        return StoredFile(size=own.size, sha256=own.sha256, stored_as=None if stored_as == name else stored_as)

    def _seal(self, folder: Path, claim: Claim, facts: Json, provenance: Provenance) -> Record:
        files = dict(self.stored_early)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            assert name.split("/")[0] not in (RECORD, CLAIM, CHECKPOINTS, LIVE), name
            assert not path.is_symlink(), name
            assert is_inside(name), name
            files[name] = self._store(name, path)
        lasting = {name: file for name, file in files.items() if not tells_time(name)}
        return self.write_record(
            Record(
                schema=claim.version,
                run=claim.run,
                stage=claim.stage,
                identity=claim.identity,
                inputs=claim.inputs,
                files=files,
                fingerprint=fingerprint_result(claim, lasting),
                facts=facts,
                provenance=provenance,
            )
        )

    def checkpoints(self, keep: int) -> Checkpoints:
        """The checkpoints of the open stage. keep: how many of the newest are kept, at least 2."""
        from stages.store.checkpoints import Checkpoints  # late: it imports torch, which a sealed stage does not need

        return Checkpoints(self, keep)
