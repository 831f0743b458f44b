"""Save and load the checkpoints of an open stage. If the newest is damaged, the one before it is loaded. Those that the
watch keeps stay apart from the newest.

step-00000100/state.safetensors     the tensors, or the rows of them that rank 0 holds
              state.1.safetensors   the rows that rank 1 holds, and so on
              state.json            everything else
              manifest.json         written last: whose the checkpoint is, and the sha256 of all files. Without it the
                                    checkpoint does not exist

A checkpoint of other settings or inputs is refused: somebody has copied it there.

Each file holds rows of a tensor under the tensor's name. Joined in the order of ranks they are the whole tensor, so any
number of ranks can read the checkpoint.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dmdr import distributed
from dmdr.errors import DataError, StoreError
from stages.store.address import Address, list_differences
from stages.store.intact import Damaged, fetch_intact
from stages.store.layout import CHECKPOINTS, digest
from stages.store.records import CHECKPOINT_SCHEMA, CheckpointManifest, Claim, FileDigest, Json, Record, parse_json
from stages.store.s3_errors import Refused, is_transient

TENSORS, INFO, MANIFEST = "state.safetensors", "state.json", "manifest.json"
OF_RANK = re.compile(r"state\.([1-9]\d*)\.safetensors")
Tensors = Mapping[str, torch.Tensor]
Gather = Callable[[torch.Tensor], torch.Tensor]  # joins the rows of all ranks, (1, length) each


class Checkpoint(NamedTuple):
    """The state of a stage after `step`; info: JSON."""

    step: int
    tensors: Tensors
    info: Json


class Checkpoints:
    """The checkpoints of one stage, from Artifact.checkpoints. Every method raises StoreError if the store fails."""

    def __init__(self, artifact: Address[Record], keep: int) -> None:
        assert keep >= 2, "the newest may turn out to be damaged"
        self.artifact, self.place, self.keep = artifact, artifact.place, keep
        self.address = f"{artifact.address}/{CHECKPOINTS}"

    def save(
        self,
        step: int,
        tensors: dict[str, torch.Tensor],
        info: Mapping[str, object],
        *,
        apart: Collection[int] = (),
        gather: Gather = distributed.all_gather,
    ) -> None:
        """Store the state after `step`, then delete all checkpoints but the newest `keep`, and those of the steps
        `apart`. All ranks call it, and none leaves before the checkpoint is whole.

        info: JSON, the same on all ranks. tensors: the rows of this rank; rank 0 also passes the tensors that are not
        split. Tensors must not share storage; safetensors moves them to the CPU. gather: by which the ranks agree.

        Raises:
            StoreError: the store fails, here or on another rank.
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

        def prepare() -> None:
            if first:
                self.artifact.check_claim()
                self._forget(step)  # an old checkpoint of this step: its manifest must not vouch for our files

        def write_part() -> None:
            if tensors:
                self.place.publish(f"{folder}/{mine}", write_tensors)

        def seal() -> None:
            if first:
                self.place.publish(f"{folder}/{INFO}", write_info)
                document = self._describe_owner({**parts, INFO: written[INFO]})
                self.place.publish(f"{folder}/{MANIFEST}", lambda file: file.write_bytes(document.to_json()))
                self._rotate(step, apart)

        self._do_together(prepare, step, gather)
        self._do_together(write_part, step, gather)
        parts = _gather_digests(written.get(mine), gather)
        self._do_together(seal, step, gather)

    def _do_together(self, work: Callable[[], object], step: int, gather: Gather) -> None:
        """Do this rank's part of a checkpoint, and wait until all ranks have done theirs.

        Raises:
            StoreError: another rank could not do its part, and says why itself.
        """
        try:
            work()
        except BaseException:
            with suppress(RuntimeError):  # a rank has ended, which is no news beside this error
                gather(torch.tensor([[0]]))
            raise
        if not gather(torch.tensor([[1]])).all():
            raise StoreError(
                f"checkpoint {self.address}/step-{step:08d} lacks the part of another rank, which tells why; repeat "
                "the command to go on from the one before"
            )

    def newest(self, check: Callable[[int, Json], object] = lambda step, info: None) -> Checkpoint | None:
        """The newest undamaged checkpoint; None if there is none. Damaged ones are reported on stderr.

        All ranks call it, and each rank gets the whole tensors.
        check: raises ValueError if the info of a checkpoint cannot be that of a state after its step.

        Raises:
            DataError: a checkpoint is of other settings or inputs.
            StoreError: no checkpoint can be read, although there are some.
        """
        checkpoint = self._find_newest(check)
        steps = distributed.all_gather(torch.tensor([checkpoint.step if checkpoint else -1])).tolist()
        if len(set(steps)) > 1:
            raise StoreError(f"ranks see different checkpoints in {self.address}: {steps}; repeat the command")
        return checkpoint

    def load(self, step: int, check: Callable[[int, Json], object] = lambda step, info: None) -> Checkpoint:
        """The checkpoint of a step that was saved `apart`. All ranks call it, and each rank gets the whole tensors.

        Raises:
            DataError: it is not there, is damaged, or of other settings or inputs.
        """
        where = f"checkpoint {self.address}/step-{step:08d}"
        advice = f"and nothing stands for it; delete {self.artifact.address} and run {self.artifact.stage} again"
        manifest = self.place.read(f"{_folder_name(step)}/{MANIFEST}")
        if manifest is None:
            raise DataError(f"{where} was kept and is gone, {advice}")
        try:
            return self._load(step, manifest, check)
        except (Damaged, SafetensorError) as error:
            raise DataError(f"{where} was kept and is damaged ({error}), {advice}") from error

    def _find_newest(self, check: Callable[[int, Json], object]) -> Checkpoint | None:
        if self.artifact.read_claim() is None:
            return None
        damaged = False
        unreadable: StoreError | Refused | None = None

        def say(line: str) -> None:
            if distributed.rank() == 0:
                print(line, file=sys.stderr)

        for step in sorted(self._steps(), reverse=True):
            where = f"{self.address}/step-{step:08d}"
            try:
                manifest = self.place.read(f"{_folder_name(step)}/{MANIFEST}")
                if manifest is None:
                    continue  # its writer was killed before it was complete
                return self._load(step, manifest, check)
            except (Damaged, SafetensorError) as error:
                damaged = True
                say(f"checkpoint {where} is DAMAGED ({error}); trying the one before")
            except (StoreError, Refused) as error:
                if error.__cause__ is not None and is_transient(error.__cause__):
                    raise  # the store is away; this checkpoint may be whole
                unreadable = error
                say(f"checkpoint {where} cannot be READ ({_explain(error)}); trying the one before")
        if unreadable is not None:
            raise StoreError(f"{_explain(unreadable)}; delete {self.address} to start from the beginning")
        if damaged:
            say(f"no whole checkpoint is left in {self.address}; starting from the beginning")
        return None

    def _load(self, step: int, data: bytes, check: Callable[[int, Json], object]) -> Checkpoint:
        try:
            manifest = CheckpointManifest.parse(data)
        except ValueError as error:
            raise Damaged(str(error)) from error
        self._check_owner(step, manifest)
        expected = manifest.files
        if not {TENSORS, INFO} <= expected.keys():
            raise Damaged(f"{MANIFEST} lacks {TENSORS} or {INFO}")
        others = [name for name in expected if name not in (TENSORS, INFO)]
        if not all(map(OF_RANK.fullmatch, others)):
            raise Damaged(f"{MANIFEST} names a file that no checkpoint has")
        paths = {}
        for name in (TENSORS, *sorted(others, key=_rank_of), INFO):
            try:
                paths[name] = fetch_intact(
                    self.place, f"{_folder_name(step)}/{name}", self.place.scratch() / name, expected[name]
                )
            except Damaged as error:
                raise Damaged(f"{name} {error}") from error
        try:
            info = parse_json(paths.pop(INFO).read_bytes())
            if not isinstance(info, dict):
                raise ValueError(f"{INFO} is no JSON object")
            check(step, info)
        except ValueError as error:
            raise Damaged(str(error)) from error
        parts = [load_file(path) for path in paths.values()]
        return Checkpoint(step, parts[0] if len(parts) == 1 else Joined(parts), info)

    def _describe_owner(self, files: dict[str, FileDigest]) -> CheckpointManifest:
        claim = self.artifact.claimed()
        return CheckpointManifest(
            schema=CHECKPOINT_SCHEMA, stage=claim.stage, identity=claim.identity, inputs=claim.inputs, files=files
        )

    def _check_owner(self, step: int, manifest: CheckpointManifest) -> None:
        """Raises DataError if a checkpoint is not of the settings and inputs that the address belongs to."""
        claim = self.artifact.claimed()
        owner = Claim(
            schema=claim.version,
            run=claim.run,
            stage=manifest.stage,
            identity=manifest.identity,
            inputs=manifest.inputs,
        )
        differences = list_differences(owner, claim)
        if manifest.stage != claim.stage:
            differences = [f"it is of the stage {manifest.stage}"]
        if differences:
            raise DataError(
                f"checkpoint {self.address}/step-{step:08d} is of another result than {self.artifact.stage} of run "
                f"{self.artifact.run} ({'; '.join(differences)}), so somebody copied it there; delete it, then repeat "
                "the command"
            )

    def _rotate(self, newest: int, apart: Collection[int]) -> None:
        """Delete old checkpoints but those `apart`. `newest` was just saved.

        Higher steps are deleted too: they are damaged, another attempt wrote them, or the stage has gone back.
        """
        whole = {step for step in self._steps(MANIFEST) if step <= newest}
        for step in self._steps() - set(sorted(whole)[-self.keep :]) - whole.intersection(apart):
            self._forget(step)

    def _forget(self, step: int) -> None:
        # The manifest goes first, so that an interrupted deletion does not look like damage.
        self.place.remove(f"{_folder_name(step)}/{MANIFEST}")
        self.place.remove(_folder_name(step))

    def _steps(self, having: str = "") -> set[int]:
        """The steps that have a checkpoint. having: only those with this file."""
        names = (name.split("/", 2) for name in self.artifact.names() if name.startswith(f"{CHECKPOINTS}/"))
        return {
            int(name[1].removeprefix("step-"))
            for name in names
            if len(name) == 3 and re.fullmatch(r"step-\d{8}", name[1]) and having in ("", name[2])
        }


def _explain(error: StoreError | Refused) -> str:
    """A store's error without the advice at its end."""
    return str(error).split(";")[0]


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


def _gather_digests(mine: FileDigest | None, gather: Gather) -> dict[str, FileDigest]:
    """File name -> digest, for the files of all ranks. mine: the digest of this rank's file, if it wrote one."""
    row = [-1] * 33 if mine is None else [mine.size, *bytes.fromhex(mine.sha256)]
    rows = gather(torch.tensor([row])).tolist()
    return {
        f"state.{rank}.safetensors" if rank else TENSORS: FileDigest(size=size, sha256=bytes(sha256).hex())
        for rank, (size, *sha256) in enumerate(rows)
        if size >= 0
    }
