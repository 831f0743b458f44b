"""Keep finished shards of an open stage, so that the next attempt, on any machine, does not make them again.

checkpoints/NAME        the shard
checkpoints/NAME.json   written last: its size, its sha256 and figures about it. Without it the shard does not exist
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from stages.store.artifacts import Artifact
from stages.store.layout import CHECKPOINTS, digest, is_intact
from stages.store.records import ShardManifest

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
        self._check = artifact.check_claim
        self._known: dict[str, Shard] = {}

    def keep(self, name: str, data: bytes, about: Facts | None = None) -> None:
        """Store a shard. about: figures to store beside it, which are no part of the result."""
        self._check()
        own = self.folder / name
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_bytes(data)
        written = digest(own)
        manifest = ShardManifest(size=written.size, sha256=written.sha256, about=about or {})
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
            manifest = ShardManifest.from_json(json.loads(data))
        except ValueError:
            manifest = None  # treated as damage below
        if manifest is not None:
            path = self.place.fetch(f"{CHECKPOINTS}/{name}", self.folder / name)
            if path is not None and is_intact(path, manifest):
                return Shard(path, manifest.about)
        print(f"shard {self.address}/{CHECKPOINTS}/{name} is DAMAGED; it is made again", file=sys.stderr)
        return None
