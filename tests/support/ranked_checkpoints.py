"""python -m tests.support.ranked_checkpoints STORE: one of two ranks whose checkpoints are written in threads.

Prints a line a checkpoint: "whole", or the error. The second rank's disk is full at the second checkpoint, and the
first rank's at the fourth. While they are written, the ranks sum numbers as training does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from dmdr import distributed
from dmdr.errors import StoreError
from stages.store.artifacts import Artifact
from stages.store.checkpoint_writer import CheckpointWriter
from stages.store.folder import Folder

SUMS = 200


class Disk(Folder):
    """A folder of which every file fails while it is full."""

    is_full = False

    def publish(self, name: str, write: Callable[[Path], object]) -> None:
        if self.is_full:
            raise StoreError("no space is left")
        super().publish(name, write)


def main(store: str) -> None:
    distributed.join("cpu", 0)
    rank = int(os.environ["RANK"])
    artifact = Artifact(store, "r", "joint")
    artifact.claim({"seed": 0}, {"teacher": "ab" * 32})
    artifact.place = Disk(artifact.place.root)
    writer = CheckpointWriter(artifact.checkpoints(4))
    for step in (1, 2, 3, 4, 5):
        artifact.place.is_full = (step, rank) in ((2, 1), (4, 0))
        writer.begin(step, {"rows": torch.full((2,), 10.0 * step + rank)}, {"step": step})
        for number in range(SUMS):
            assert distributed.all_reduce_sum(torch.tensor(float(number))) == 2 * number
        try:
            writer.wait()
            print("whole", flush=True)
        except StoreError as error:
            print(error, flush=True)
    distributed.leave()


if __name__ == "__main__":
    main(sys.argv[1])
