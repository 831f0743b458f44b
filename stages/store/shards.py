"""Finished parts of an open stage: the next attempt, on whatever machine, does not make them again.

checkpoints/NAME        the part
checkpoints/NAME.json   last: its size and sha256, and what its writer says about it. Without it the part does not exist
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


@dataclass(frozen=True)
class Shard:
    """A finished part. file: only to be read. about: what its writer said about it."""

    file: Path
    about: dict[str, int | float]


class Shards:
    """folder: of this attempt, for its own copies. Every method raises StoreError when the store refuses."""

    def __init__(self, artifact: Artifact, folder: Path) -> None:
        self.place, self.address, self.folder = artifact.place, artifact.address, folder
        self._known: dict[str, Shard] = {}

    def keep(self, name: str, data: bytes, about: dict[str, int | float] | None = None) -> None:
        """Store a part; about: figures that stand beside it and are no part of the result."""
        own = self.folder / name
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_bytes(data)
        written = digest(own)
        manifest = ShardManifest(size=written.size, sha256=written.sha256, about=about or {})
        self.place.publish(f"{CHECKPOINTS}/{name}", lambda file: file.write_bytes(data))
        self.place.publish(f"{CHECKPOINTS}/{name}.json", lambda file: file.write_bytes(manifest.to_json()))
        self._known[name] = Shard(own, manifest.about)

    def get(self, name: str) -> Shard | None:
        """A part that is whole; None if it has to be made. A damaged one is named on stderr."""
        if name not in self._known and (shard := self._fetch(name)) is not None:
            self._known[name] = shard
        return self._known.get(name)

    def require(self, name: str) -> Shard:
        """A part that was kept before, by this process or another of the stage."""
        shard = self.get(name)
        assert shard is not None, name
        return shard

    def move(self, name: str, target: Path) -> None:
        """Let a part be a file of the result too, without copying where the disk is the same."""
        shard = self.require(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(shard.file, target)
        except OSError:  # another disk, or one without links
            shutil.copyfile(shard.file, target)

    def _fetch(self, name: str) -> Shard | None:
        data = self.place.read(f"{CHECKPOINTS}/{name}.json")
        if data is None:
            return None
        try:
            manifest = ShardManifest.from_json(json.loads(data))
        except ValueError:
            manifest = None  # a manifest that does not parse vouches for nothing
        if manifest is not None:
            path = self.place.fetch(f"{CHECKPOINTS}/{name}", self.folder / name)
            if path is not None and is_intact(path, manifest):
                return Shard(path, manifest.about)
        print(f"part {self.address}/{CHECKPOINTS}/{name} is DAMAGED; it is made again", file=sys.stderr)
        return None
