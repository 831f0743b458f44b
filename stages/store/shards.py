"""Finished parts of an open stage: the next attempt, on whatever machine, does not make them again.

checkpoints/NAME        the part
checkpoints/NAME.json   last: its size and sha256, and what was said about it. Without it the part does not exist
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from stages.store.artifacts import Artifact
from stages.store.layout import CHECKPOINTS, digest


class Shards:
    """folder: of this attempt, for its own copies. Every method raises StoreError when the store refuses."""

    def __init__(self, artifact: Artifact, folder: Path) -> None:
        self.place, self.address, self.folder = artifact.place, artifact.address, folder
        self._known: dict[str, tuple[Path, dict]] = {}

    def keep(self, name: str, data: bytes, about: dict | None = None) -> None:
        """Store a part; about: JSON that stands beside it and is no part of the result."""
        own = self.folder / name
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_bytes(data)
        said = {**digest(own), "about": about or {}}
        self.place.publish(f"{CHECKPOINTS}/{name}", lambda file: file.write_bytes(data))
        self.place.publish(f"{CHECKPOINTS}/{name}.json", lambda file: file.write_text(json.dumps(said)))
        self._known[name] = (own, said["about"])

    def get(self, name: str) -> tuple[Path, dict] | None:
        """A whole part's file, only to be read, and what was said about it; None if it has to be made. Says on stderr
        that one is damaged."""
        if name not in self._known and (found := self._fetched(name)) is not None:
            self._known[name] = found
        return self._known.get(name)

    def move(self, name: str, target: Path) -> None:
        """Let a part that exists be a file of the result too, without copying where the disk is the same."""
        found = self.get(name)
        assert found is not None, name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(found[0], target)
        except OSError:  # another disk, or one without links
            shutil.copyfile(found[0], target)

    def _fetched(self, name: str) -> tuple[Path, dict] | None:
        manifest = self.place.read(f"{CHECKPOINTS}/{name}.json")
        if manifest is None:
            return None
        try:
            said = json.loads(manifest)
            expected = {key: said[key] for key in ("size", "sha256")}
            path = self.place.fetch(f"{CHECKPOINTS}/{name}", self.folder / name)
            if path is not None and digest(path) == expected:
                return path, said["about"]
        except (ValueError, KeyError, TypeError):
            pass  # a manifest that does not parse vouches for nothing
        print(f"part {self.address}/{CHECKPOINTS}/{name} is DAMAGED; it is made again", file=sys.stderr)
        return None
