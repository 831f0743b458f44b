"""Checkpoints of an open stage: whole or invisible, damage detected, the one before used instead.

step-00000100/state.safetensors   tensors
              state.json          the rest
              manifest.json       last: sha256 of both. Without it the checkpoint does not exist
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stages.folder import Folder
from stages.layout import CHECKPOINTS, digest
from stages.remote import Remote

TENSORS, INFO, MANIFEST = "state.safetensors", "state.json", "manifest.json"


class Checkpoints:
    """Made by Artifact.checkpoints. Every method raises StoreError when the store refuses."""

    def __init__(self, place: Folder | Remote, address: str, keep: int) -> None:
        assert keep >= 2, "the newest may turn out to be damaged"
        self.place, self.address, self.keep = place, address, keep

    def save(self, step: int, tensors: dict[str, torch.Tensor], info: dict) -> None:
        """Store the state after `step`, then delete all but the newest `keep` up to this one.

        `info` must be JSON. Tensors are moved to the CPU by safetensors; they must not share storage.
        """
        folder, manifest = _folder(step), {}

        def write_tensors(file: Path) -> None:
            try:
                save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)
            except SafetensorError as error:  # safetensors' own name for a full disk
                raise OSError(str(error)) from error
            manifest[TENSORS] = digest(file)

        def write_info(file: Path) -> None:
            file.write_text(json.dumps(info, allow_nan=False), encoding="utf-8")
            manifest[INFO] = digest(file)

        self._forget(step)  # damaged, or of another live copy of the stage: it must not vouch for our files
        self.place.publish(f"{folder}/{TENSORS}", write_tensors)
        self.place.publish(f"{folder}/{INFO}", write_info)
        self.place.publish(f"{folder}/{MANIFEST}", lambda file: file.write_text(json.dumps(manifest), encoding="utf-8"))
        self._rotate(step)

    def newest(self) -> tuple[int, dict[str, torch.Tensor], dict] | None:
        """The newest undamaged (step, tensors, info), None if there is none. Says on stderr which ones are damaged."""
        damaged = False
        for step in sorted(self._steps(), reverse=True):
            manifest = self.place.read(f"{_folder(step)}/{MANIFEST}")
            if manifest is None:
                continue  # its writer was killed
            try:
                return step, *self._load(step, manifest)
            except (ValueError, SafetensorError) as error:
                damaged = True
                where = f"{self.address}/step-{step:08d}"
                print(f"checkpoint {where} is DAMAGED ({error}); trying the one before", file=sys.stderr)
        if damaged:
            print(f"no whole checkpoint is left in {self.address}; starting from the beginning", file=sys.stderr)
        return None

    def _load(self, step: int, manifest: bytes) -> tuple[dict[str, torch.Tensor], dict]:
        expected = json.loads(manifest)
        if not isinstance(expected, dict) or expected.keys() != {TENSORS, INFO}:
            raise ValueError(f"{MANIFEST} does not name its two files")
        paths = {}
        for name in (TENSORS, INFO):
            path = self.place.fetch(f"{_folder(step)}/{name}", self.place.scratch() / name)
            if path is None:
                raise ValueError(f"{name} is missing")
            if digest(path) != expected[name]:
                raise ValueError(f"the sha256 of {name} is not the one in {MANIFEST}")
            paths[name] = path
        return load_file(paths[TENSORS]), json.loads(paths[INFO].read_text(encoding="utf-8"))

    def _rotate(self, newest: int) -> None:
        """Runs only after `newest` is whole. A higher step is damaged, or we would have begun after it."""
        whole = {step for step in self._steps(MANIFEST) if step <= newest}
        for step in self._steps() - set(sorted(whole)[-self.keep :]):
            self._forget(step)

    def _forget(self, step: int) -> None:
        self.place.remove(f"{_folder(step)}/{MANIFEST}")  # first, so that half a deletion is not taken for damage
        self.place.remove(_folder(step))

    def _steps(self, having: str = "") -> set[int]:
        names = (name.split("/", 2) for name in self.place.names() if name.startswith(f"{CHECKPOINTS}/"))
        return {
            int(name[1].removeprefix("step-"))
            for name in names
            if len(name) == 3 and re.fullmatch(r"step-\d{8}", name[1]) and having in ("", name[2])
        }


def _folder(step: int) -> str:
    return f"{CHECKPOINTS}/step-{step:08d}"
