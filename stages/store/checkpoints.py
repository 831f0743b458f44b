"""Checkpoints of an open stage: whole or invisible, damage detected, the one before used instead.

step-00000100/state.safetensors     tensors
              state.1.safetensors   where there are several ranks, what the second holds of them, and so on
              state.json            the rest
              manifest.json         last: sha256 of all. Without it the checkpoint does not exist

A tensor is what the files hold under its name, one rank's rows after another's. So any number of ranks can read it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

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


class Checkpoints:
    """Made by Artifact.checkpoints. Every method raises StoreError when the store refuses."""

    def __init__(self, place: Folder | Remote, address: str, keep: int) -> None:
        assert keep >= 2, "the newest may turn out to be damaged"
        self.place, self.address, self.keep = place, address, keep

    def save(self, step: int, tensors: dict[str, torch.Tensor], info: Json) -> None:
        """Store the state after `step`, then delete all but the newest `keep` up to this one. All ranks come here.

        `info` must be JSON, and is the same on all ranks; of `tensors` each rank gives its own rows, the first also all
        that is not split. Tensors are moved to the CPU by safetensors; they must not share storage.
        """
        folder, first = _folder_name(step), distributed.rank() == 0
        written: dict[str, FileDigest] = {}
        mine = TENSORS if first else f"state.{distributed.rank()}.safetensors"

        def write_tensors(file: Path) -> None:
            try:
                save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)
            except SafetensorError as error:  # safetensors' own name for a full disk
                raise OSError(str(error)) from error
            written[mine] = digest(file)

        def write_info(file: Path) -> None:
            file.write_text(json.dumps(info, allow_nan=False), encoding="utf-8")
            written[INFO] = digest(file)

        if first:
            self._forget(step)  # damaged, or of another live copy of the stage: it must not vouch for our files
        distributed.barrier()
        if tensors:
            self.place.publish(f"{folder}/{mine}", write_tensors)
        manifest = _of_all_ranks(written.get(mine))
        if first:
            self.place.publish(f"{folder}/{INFO}", write_info)
            manifest[INFO] = written[INFO]
            text = json.dumps({name: each.to_dict() for name, each in manifest.items()})
            self.place.publish(f"{folder}/{MANIFEST}", lambda file: file.write_text(text, encoding="utf-8"))
            self._rotate(step)
        distributed.barrier()  # nobody leaves before the checkpoint is whole

    def newest(self) -> tuple[int, Tensors, dict] | None:
        """The newest undamaged (step, tensors, info), None if there is none. Says on stderr which ones are damaged.

        All ranks come here, and each gets the whole tensors.
        """
        found = self._newest()
        steps = distributed.all_gather(torch.tensor([found[0] if found else -1])).tolist()
        if len(set(steps)) > 1:
            raise StoreError(f"ranks see different checkpoints in {self.address}: {steps}; repeat the command")
        return found

    def _newest(self) -> tuple[int, Tensors, dict] | None:
        damaged = False

        def say(line: str) -> None:
            if distributed.rank() == 0:
                print(line, file=sys.stderr)

        for step in sorted(self._steps(), reverse=True):
            manifest = self.place.read(f"{_folder_name(step)}/{MANIFEST}")
            if manifest is None:
                continue  # its writer was killed
            try:
                return step, *self._load(step, manifest)
            except (ValueError, SafetensorError) as error:
                damaged = True
                where = f"{self.address}/step-{step:08d}"
                say(f"checkpoint {where} is DAMAGED ({error}); trying the one before")
        if damaged:
            say(f"no whole checkpoint is left in {self.address}; starting from the beginning")
        return None

    def _load(self, step: int, manifest: bytes) -> tuple[Tensors, dict]:
        expected = parse_manifest(manifest)
        if not {TENSORS, INFO} <= expected.keys():
            raise ValueError(f"{MANIFEST} does not name its files")
        others = [name for name in expected if name not in (TENSORS, INFO)]
        if not all(map(OF_RANK.fullmatch, others)):
            raise ValueError(f"{MANIFEST} names a file that is none of a checkpoint's")
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
        return parts[0] if len(parts) == 1 else Joined(parts), info

    def _rotate(self, newest: int) -> None:
        """Runs only after `newest` is whole. A higher step is damaged, or we would have begun after it."""
        whole = {step for step in self._steps(MANIFEST) if step <= newest}
        for step in self._steps() - set(sorted(whole)[-self.keep :]):
            self._forget(step)

    def _forget(self, step: int) -> None:
        self.place.remove(f"{_folder_name(step)}/{MANIFEST}")  # first, so that half a deletion is not taken for damage
        self.place.remove(_folder_name(step))

    def _steps(self, having: str = "") -> set[int]:
        names = (name.split("/", 2) for name in self.place.names() if name.startswith(f"{CHECKPOINTS}/"))
        return {
            int(name[1].removeprefix("step-"))
            for name in names
            if len(name) == 3 and re.fullmatch(r"step-\d{8}", name[1]) and having in ("", name[2])
        }


def _rank_of(name: str) -> int:
    """The rank in the name of a file of tensors."""
    return int(name.split(".")[1])


def _folder_name(step: int) -> str:
    return f"{CHECKPOINTS}/step-{step:08d}"


class Joined(Mapping):
    """Tensors whose rows lie in several files, put together when they are asked for: never all of them in memory."""

    def __init__(self, parts: list[dict[str, torch.Tensor]]) -> None:
        self.parts = parts

    def __getitem__(self, name: str) -> torch.Tensor:
        found = [part[name] for part in self.parts if name in part]
        if not found:
            raise KeyError(name)
        return found[0] if len(found) == 1 else torch.cat(found)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for part in self.parts for name in part))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _of_all_ranks(mine: FileDigest | None) -> dict[str, FileDigest]:
    """File name -> digest, of each rank that wrote a file; each tells the others its own."""
    row = [-1] * 33 if mine is None else [mine.size, *bytes.fromhex(mine.sha256)]
    rows = distributed.all_gather(torch.tensor([row])).tolist()
    return {
        f"state.{rank}.safetensors" if rank else TENSORS: FileDigest(size=size, sha256=bytes(sha256).hex())
        for rank, (size, *sha256) in enumerate(rows)
        if size >= 0
    }
