"""Put finished parts of a result into the store while its stage still runs. The next attempt goes on after them.

NAME                   a file of the result, at its final place: the seal does not store it again
checkpoints/PART.json  written after the files of a part: their sizes and digests, whose they are, and figures about
                       them. Without it there is no part

So a part needs no room on the disk of this machine once it is stored, and is sent to the store once. Nobody reads the
files of a stage that is not sealed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from stages.store.artifacts import Artifact
from stages.store.folder import Folder
from stages.store.intact import Damaged, fetch_intact
from stages.store.layout import CHECKPOINTS
from stages.store.records import PartManifest, fingerprint_claim, parse_json


class PartialResult:
    """The finished parts of one open stage. Every method raises StoreError if the store fails."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact, self._place = artifact, artifact.place

    def keep(self, part: str, files: list[Path], about: dict[str, int]) -> None:
        """Move the files of a part into the store. They become files of the result, under their names.

        about: figures about the part, which are no part of the result.
        """
        self._artifact.check_claim()
        with self._place.alone():
            stored = {file.name: self._artifact.store_early(file.name, file) for file in files}
            owner = fingerprint_claim(self._artifact.claimed())
            manifest = PartManifest(owner=owner, files=stored, about=about)
            self._place.publish(_name_manifest(part), lambda file: file.write_bytes(manifest.to_json()))
        for file in files:
            file.unlink(missing_ok=True)  # a folder moves it, S3 copies it

    def find(self, part: str, names: list[str]) -> dict[str, int] | None:
        """What `keep` was told about a part; None if it has to be made. A damaged one is reported on stderr.

        names: the files that such a part has. They are read once, to verify them.
        """
        data = self._place.read(_name_manifest(part))
        if data is None:
            return None
        try:
            manifest = self._parse(data, names)
            for name, expected in manifest.files.items():
                copy = self._place.scratch() / "verified"
                try:
                    fetch_intact(self._place, expected.stored_as or name, copy, expected)
                except Damaged as error:
                    raise Damaged(f"{name} {error}") from error
                finally:
                    copy.unlink(missing_ok=True)
        except Damaged as error:
            where = f"{self._artifact.address}/{CHECKPOINTS}/{part}"
            print(f"part {where} is DAMAGED ({error}); it is made again", file=sys.stderr)
            return None
        self._artifact.stored_early |= manifest.files
        return manifest.about

    def _parse(self, data: bytes, names: list[str]) -> PartManifest:
        """Raises Damaged."""
        try:
            found = parse_json(data)
            manifest = PartManifest.from_json(found) if isinstance(found, dict) else None
        except ValueError:
            manifest = None
        if manifest is None or sorted(manifest.files) != sorted(names):
            raise Damaged("it has no manifest that reads")
        if manifest.owner != fingerprint_claim(self._artifact.claimed()):
            raise Damaged("it is of another result")
        for name, file in manifest.files.items():
            if file.stored_as is not None and (isinstance(self._place, Folder) or not file.is_second_name_of(name)):
                raise Damaged("its manifest names a file that it cannot have")
        return manifest


def _name_manifest(part: str) -> str:
    return f"{CHECKPOINTS}/{part}.json"
