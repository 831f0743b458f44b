"""Save and load the checkpoints of an open stage. If the newest is damaged, the one before it is loaded.

step-00000100/state.safetensors     the tensors, or the rows of them that rank 0 holds
              state.1.safetensors   the rows that rank 1 holds, and so on
              state.json            everything else
              manifest.json         written last: sha256 of all files. Without it the checkpoint does not exist

Each file holds rows of a tensor under the tensor's name. Joined in the order of ranks they are the whole tensor, so any
number of ranks can read the checkpoint.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dmdr import distributed
from dmdr.errors import StoreError
from stages.store.folder import Folder
from stages.store.layout import CHECKPOINTS, digest, is_intact
from stages.store.records import FileDigest, Json, parse_manifest
from stages.store.remote import Remote

TENSORS, INFO, MANIFEST = "state.safetensors", "state.json", "manifest.json"
OF_RANK = re.compile(r"state\.([1-9]\d*)\.safetensors")
Tensors = Mapping[str, torch.Tensor]


class Checkpoint(NamedTuple):
    """The state of a stage after `step`; info: JSON."""

    step: int
    tensors: Tensors
    info: Json


class Checkpoints:
    """The checkpoints of one stage, from Artifact.checkpoints. Every method raises StoreError if the store fails.

    check: called by rank 0 before it stores a checkpoint; raises if the address is no longer ours.
    """

    def __init__(self, place: Folder | Remote, address: str, keep: int, *, check: Callable[[], object]) -> None:
        assert keep >= 2, "the newest may turn out to be damaged"
        self.place, self.address, self.keep, self.check = place, address, keep, check

    def save(self, step: int, tensors: dict[str, torch.Tensor], info: Mapping[str, object]) -> None:
        """Store the state after `step`, then delete all but the newest `keep` checkpoints. All ranks call it.

        info: JSON, the same on all ranks. tensors: the rows of this rank; rank 0 also passes the tensors that are not
        split. Tensors must not share storage; safetensors moves them to the CPU.
        """
        folder, first = _folder_name(step), distributed.rank() == 0
        written: dict[str, FileDigest] = {}
        mine = TENSORS if first else f"state.{distributed.rank()}.safetensors"

        def write_tensors(file: Path) -> None:
            try:
                save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)
            except SafetensorError as error:  # safetensors raises it for a full disk
                raise OSError(str(error)) from error
            written[mine] = digest(file)

        def write_info(file: Path) -> None:
            file.write_text(json.dumps(info, allow_nan=False), encoding="utf-8")
            written[INFO] = digest(file)

        if first:
            self.check()
            self._forget(step)  # an old checkpoint of this step: its manifest must not vouch for our files
        distributed.barrier()
        if tensors:
            self.place.publish(f"{folder}/{mine}", write_tensors)
        manifest = _gather_digests(written.get(mine))
        if first:
            self.place.publish(f"{folder}/{INFO}", write_info)
            manifest[INFO] = written[INFO]
            text = json.dumps({name: each.to_dict() for name, each in manifest.items()})
            self.place.publish(f"{folder}/{MANIFEST}", lambda file: file.write_text(text, encoding="utf-8"))
            self._rotate(step)
        distributed.barrier()  # nobody leaves before the checkpoint is whole

    def newest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint; None if there is none. Damaged ones are reported on stderr.

        All ranks call it, and each rank gets the whole tensors.
        """
        checkpoint = self._find_newest()
        steps = distributed.all_gather(torch.tensor([checkpoint.step if checkpoint else -1])).tolist()
        if len(set(steps)) > 1:
            raise StoreError(f"ranks see different checkpoints in {self.address}: {steps}; repeat the command")
        return checkpoint

    def _find_newest(self) -> Checkpoint | None:
        damaged = False

        def say(line: str) -> None:
            if distributed.rank() == 0:
                print(line, file=sys.stderr)

        for step in sorted(self._steps(), reverse=True):
            manifest = self.place.read(f"{_folder_name(step)}/{MANIFEST}")
            if manifest is None:
                continue  # its writer was killed before it was complete
            try:
                return self._load(step, manifest)
            except (ValueError, SafetensorError) as error:
                damaged = True
                where = f"{self.address}/step-{step:08d}"
                say(f"checkpoint {where} is DAMAGED ({error}); trying the one before")
        if damaged:
            say(f"no whole checkpoint is left in {self.address}; starting from the beginning")
        return None

    def _load(self, step: int, manifest: bytes) -> Checkpoint:
        expected = parse_manifest(manifest)
        if not {TENSORS, INFO} <= expected.keys():
            raise ValueError(f"{MANIFEST} lacks {TENSORS} or {INFO}")
        others = [name for name in expected if name not in (TENSORS, INFO)]
        if not all(map(OF_RANK.fullmatch, others)):
            raise ValueError(f"{MANIFEST} names a file that no checkpoint has")
        paths = {}
        for name in (TENSORS, *sorted(others, key=_rank_of), INFO):
            path = self.place.fetch(f"{_folder_name(step)}/{name}", self.place.scratch() / name)
            if path is None:
                raise ValueError(f"{name} is missing")
            if not is_intact(path, expected[name]):
                raise ValueError(f"the sha256 of {name} is not the one in {MANIFEST}")
            paths[name] = path
        info = json.loads(paths.pop(INFO).read_text(encoding="utf-8"))
        parts = [load_file(path) for path in paths.values()]
        return Checkpoint(step, parts[0] if len(parts) == 1 else Joined(parts), info)

    def _rotate(self, newest: int) -> None:
        """Delete old checkpoints. `newest` was just saved.

        Higher steps are deleted too: they are damaged, or another attempt wrote them.
        """
        whole = {step for step in self._steps(MANIFEST) if step <= newest}
        for step in self._steps() - set(sorted(whole)[-self.keep :]):
            self._forget(step)

    def _forget(self, step: int) -> None:
        # The manifest goes first, so that an interrupted deletion does not look like damage.
        self.place.remove(f"{_folder_name(step)}/{MANIFEST}")
        self.place.remove(_folder_name(step))

    def _steps(self, having: str = "") -> set[int]:
        """The steps that have a checkpoint. having: only those with this file."""
        names = (name.split("/", 2) for name in self.place.names() if name.startswith(f"{CHECKPOINTS}/"))
        return {
            int(name[1].removeprefix("step-"))
            for name in names
            if len(name) == 3 and re.fullmatch(r"step-\d{8}", name[1]) and having in ("", name[2])
        }


def _rank_of(name: str) -> int:
    """The rank that wrote a file of tensors."""
    return int(name.split(".")[1])


def _folder_name(step: int) -> str:
    return f"{CHECKPOINTS}/step-{step:08d}"


class Joined(Mapping[str, torch.Tensor]):
    """Tensors whose rows lie in several files. A tensor is joined when it is read, so they are never all in memory."""

    def __init__(self, parts: list[dict[str, torch.Tensor]]) -> None:
        self.parts = parts

    def __getitem__(self, name: str) -> torch.Tensor:
        rows = [part[name] for part in self.parts if name in part]
        if not rows:
            raise KeyError(name)
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for part in self.parts for name in part))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _gather_digests(mine: FileDigest | None) -> dict[str, FileDigest]:
    """File name -> digest, for the files of all ranks. mine: the digest of this rank's file, if it wrote one."""
    row = [-1] * 33 if mine is None else [mine.size, *bytes.fromhex(mine.sha256)]
    rows = distributed.all_gather(torch.tensor([row])).tolist()
    return {
        f"state.{rank}.safetensors" if rank else TENSORS: FileDigest(size=size, sha256=bytes(sha256).hex())
        for rank, (size, *sha256) in enumerate(rows)
        if size >= 0
    }
