"""The artifact of a stage: sealing it, and taking over one that another run has sealed.

{store}/{run}/{stage}/claim.json    first: which settings and inputs this address belongs to
                       checkpoints/ while the stage is open
                       ...          the files of the artifact
                       record.json  last, and only if there is none: the seal. No record, no artifact

A record's fingerprint is over what the result is made from and its files, except those that tell how long it took.

Two processes may try to seal the same stage. In a folder one waits for the other, by a lock. On S3 an object is never
overwritten: the later process stores its file under another name. So the record that stands always describes files that
still stand.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from dmdr.errors import DataError, StoreError
from stages.store.address import Address, normalise_json
from stages.store.layout import CHECKPOINTS, CLAIM, RECORD, digest, is_intact, tells_time
from stages.store.records import Claim, Json, Provenance, Record, StoredFile, fingerprint_result

if TYPE_CHECKING:
    from stages.store.checkpoints import Checkpoints


class Artifact(Address[Record]):
    """One stage of one run in a store."""

    def __init__(self, store: str, run: str, stage: str) -> None:
        super().__init__(store, run, stage, Record)

    def seal(self, folder: Path, *, facts: Json, provenance: Provenance) -> Record:
        """Move the files of `folder` in, then write the record; returns it. `claim` came before.

        facts: what the stage says about its result.
        If another process has sealed the stage in the meantime, its record is returned and ours is dropped.
        """
        claim = self.read_claim()
        if claim is None:
            raise StoreError(f"{self.address}/{CLAIM} is gone: somebody deleted the address; repeat the command")
        with self.place.alone():
            record = self.record() or self._seal(folder, claim, facts, provenance)
            kept = {CLAIM, RECORD, *(file.stored_as or name for name, file in record.files.items())}
            self.place.remove(CHECKPOINTS)
            for name in set(self.place.names()) - kept:  # of killed attempts, or of a process that came second
                self.place.remove(name)
        return record

    def adopt(self, other: Artifact, identity: Json, inputs: dict[str, str]) -> Record | None:
        """Take over what another run sealed with these very settings and inputs: it is the same artifact.

        Its files are verified there, copied and verified again. Then it is claimed and sealed here as if it had been
        made here, so that the record comes last. The record says in `adopted_from` which run made it.
        Returns the record of this address; None if the other is not sealed, or is another result.

        Raises:
            ConfigError: this address belongs to other settings or inputs.
            DataError: a file of the other is missing or damaged, or the copy is.
        """
        theirs = other.record()
        if theirs is None or other.stage != self.stage or theirs.inputs != inputs:
            return None
        if theirs.identity != normalise_json(identity):
            return None
        if (ours := self.claim(identity, inputs)) is not None:
            return ours
        folder = self.workspace()
        fetched = other.fetch(folder / "theirs")
        for name, expected in theirs.files.items():
            copy = folder / "ours" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fetched / name, copy)
            if not is_intact(copy, expected):
                raise DataError(f"{other.address}/{name} changed while it was copied; repeat the command")
        provenance = theirs.provenance
        if provenance.adopted_from is None:
            provenance = provenance.model_copy(update={"adopted_from": other.run})
        return self.seal(folder / "ours", facts=theirs.facts, provenance=provenance)

    def _seal(self, folder: Path, claim: Claim, facts: Json, provenance: Provenance) -> Record:
        files = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            assert name.split("/")[0] not in (RECORD, CLAIM, CHECKPOINTS), name
            assert not path.is_symlink(), name
            own = digest(path)
            stored_as = self.place.add(name, path, own.sha256)
            files[name] = StoredFile(
                size=own.size, sha256=own.sha256, stored_as=None if stored_as == name else stored_as
            )
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
        """The checkpoints of the open stage, of which `keep` (at least 2) stay."""
        from stages.store.checkpoints import Checkpoints  # torch, which a sealed stage need not wait for

        return Checkpoints(self.place, f"{self.address}/{CHECKPOINTS}", keep)
