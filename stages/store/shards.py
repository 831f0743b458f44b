"""Keep finished shards of an open stage, so that the next attempt, on any machine, does not make them again.

checkpoints/NAME        the shard
checkpoints/NAME.json   written last: its size, its sha256, whose it is, and figures about it. Without it there is no
                        shard
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from stages.store.artifacts import Artifact
from stages.store.intact import Damaged, fetch_intact
from stages.store.layout import CHECKPOINTS, digest
from stages.store.records import ShardManifest, fingerprint_claim, parse_json

Facts = dict[str, int | float | list[float]]  # that a writer stores beside its shard


@dataclass(frozen=True)
class Shard:
    """A finished shard. file: never write to it. about: figures that its writer stored beside it."""

    file: Path
    about: Facts


class Shards:
    """The finished shards of one stage. Every method raises StoreError if the store fails.

    folder: a folder of this attempt, for its own copies.
    """

    def __init__(self, artifact: Artifact, folder: Path) -> None:
        self.place, self.address, self.folder = artifact.place, artifact.address, folder
        self._artifact = artifact
        self._known: dict[str, Shard] = {}

    def keep(self, name: str, data: bytes, about: Facts | None = None) -> None:
        """Store a shard. about: figures to store beside it, which are no part of the result."""
        self._artifact.check_claim()
        own = self.folder / name
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_bytes(data)
        written = digest(own)
        owner = fingerprint_claim(self._artifact.claimed())
        manifest = ShardManifest(size=written.size, sha256=written.sha256, owner=owner, about=about or {})
        self.place.publish(f"{CHECKPOINTS}/{name}", lambda file: file.write_bytes(data))
        self.place.publish(f"{CHECKPOINTS}/{name}.json", lambda file: file.write_bytes(manifest.to_json()))
        self._known[name] = Shard(own, manifest.about)

    def get(self, name: str) -> Shard | None:
        """An undamaged shard; None if it has to be made. A damaged one is reported on stderr."""
        if name not in self._known and (shard := self._fetch(name)) is not None:
            self._known[name] = shard
        return self._known.get(name)

    def require(self, name: str) -> Shard:
        """A shard that was kept before, by this process or by another one of the stage."""
        shard = self.get(name)
        assert shard is not None, name
        return shard

    def move(self, name: str, target: Path) -> None:
        """Put a shard into the result too, as a link if both are on the same disk, else as a copy."""
        shard = self.require(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(shard.file, target)
        except OSError:  # another disk, or a filesystem without links
            shutil.copyfile(shard.file, target)

    def _fetch(self, name: str) -> Shard | None:
        data = self.place.read(f"{CHECKPOINTS}/{name}.json")
        if data is None:
            return None
        try:
            manifest = _parse_manifest(data)
            if manifest.owner != fingerprint_claim(self._artifact.claimed()):
                raise Damaged("is of another result")
            return Shard(
                fetch_intact(self.place, f"{CHECKPOINTS}/{name}", self.folder / name, manifest), manifest.about
            )
        except Damaged as error:
            where = f"{self.address}/{CHECKPOINTS}/{name}"
            print(f"shard {where} is DAMAGED (it {error}); it is made again", file=sys.stderr)
            return None


def _parse_manifest(data: bytes) -> ShardManifest:
    """Raises Damaged."""
    try:
        found = parse_json(data)
        if isinstance(found, dict):
            return ShardManifest.from_json(found)
    except ValueError:
        pass
    raise Damaged("has no manifest that reads")
