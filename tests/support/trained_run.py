"""A run whose prompts and trained students are sealed, made in a second: what export and evaluate start from."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from dmdr.config.identity import fingerprint, identity
from dmdr.config.run import Config
from dmdr.export.write import WEIGHTS
from dmdr.teacher.load import TeacherSource, digest_teacher, find_teacher_of, load_teacher
from stages.runtime.context import Context
from stages.runtime.progress import Progress
from stages.store.artifacts import Artifact
from stages.store.inputs import fingerprint_inputs
from stages.store.records import Json
from tests.support.sealing import PROVENANCE


def full_student(folder: Path, teacher: TeacherSource, amount: float = 0.05) -> Path:
    """The output of a training stage: the teacher's weights, each moved a little."""
    return _trained(folder, _move_weights(teacher, digest_teacher(teacher), amount), {"form": "full"})


@cache
def _move_weights(teacher: TeacherSource, digest: str, amount: float) -> dict[str, torch.Tensor]:
    """digest: of the teacher, which may change where it lies."""
    network = load_teacher(teacher, text=False).network
    generator = torch.Generator().manual_seed(1)
    return {name: w + amount * torch.randn(w.shape, generator=generator) for name, w in network.state_dict().items()}


def lora_student(
    folder: Path, teacher: TeacherSource, amount: float = 0.2, rank: int = 4, *, wide: bool = False
) -> Path:
    """The same for a LoRA student: random A and B on all targets of the preset attention, or wide."""
    return _trained(folder, _draw_lora(teacher, digest_teacher(teacher), amount, rank, wide), {"form": "lora"})


@cache
def _draw_lora(teacher: TeacherSource, digest: str, amount: float, rank: int, wide: bool) -> dict[str, torch.Tensor]:
    """digest: of the teacher, which may change where it lies."""
    backbone = load_teacher(teacher, text=False)
    generator = torch.Generator().manual_seed(2)
    weights = {}
    for name, module in backbone.network.named_modules():
        if name.endswith(backbone.wide_targets if wide else backbone.lora_targets) and hasattr(module, "weight"):
            kernel, ones = module.weight.shape[2:], (1,) * (module.weight.dim() - 2)
            for side, shape in {
                "A": (rank, module.weight.shape[1], *kernel),
                "B": (len(module.weight), rank, *ones),
            }.items():
                weights[f"{name}.lora_{side}.weight"] = amount * torch.randn(shape, generator=generator)
    return weights


def _trained(folder: Path, weights: dict[str, torch.Tensor], facts: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / WEIGHTS)
    (folder / "student.json").write_text(json.dumps(facts))
    rows = [{"update": n, "loss_dm": 1 / (n + 1), "loss_fake": 0.5, "seconds": 0.1} for n in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def context_for(config: Config, store: Path, stage: str, *, stop: Callable[[], bool] = lambda: False) -> Context:
    """A claimed address with an empty folder to write into, as __main__ makes it."""
    artifact = Artifact(str(store), config.run, stage)
    artifact.claim(identity(config, stage), fingerprint_inputs(config, stage, str(store), config.run))
    out = artifact.workspace() / "out"
    out.mkdir()
    return Context(config, artifact, out, out.parent / "inputs", Progress(stage), stop)


def run_stage(config: Config, store: Path, stage: str) -> Path:
    """Run a stage for real, seal it, and return its folder."""
    context = context_for(config, store, stage)
    facts = importlib.import_module(f"stages.{stage}").run(context)
    context.artifact.seal(context.out, facts=facts, provenance=PROVENANCE)
    return context.artifact.fetch(context.cache)


_sealed: dict[str, tuple[dict[str, bytes], Json]] = {}  # files and facts of what `seal_stage` ran


def seal_stage(config: Config, store: Path, stage: str) -> Path:
    """`run_stage` for a stage that is only the beginning of a test: run once a worker, and copied for the same run with
    equal settings and inputs.

    A copy checks nothing and writes no more than the result.
    """
    inputs = fingerprint_inputs(config, stage, str(store), config.run)
    key = fingerprint([config.run, stage, identity(config, stage), inputs])
    if key not in _sealed:
        folder, record = run_stage(config, store, stage), Artifact(str(store), config.run, stage).record()
        _sealed[key] = {name: (folder / name).read_bytes() for name in record.files}, record.facts
        return folder
    context, (files, facts) = context_for(config, store, stage), _sealed[key]
    for name, data in files.items():
        (context.out / name).parent.mkdir(parents=True, exist_ok=True)
        (context.out / name).write_bytes(data)
    context.artifact.seal(context.out, facts=facts, provenance=PROVENANCE)
    return context.artifact.fetch(context.cache)


def trained_run(config: Config, store: Path) -> Path:
    """Seal prompts as the stage makes them, cold start and joint as if they had been trained; returns the store."""
    seal_stage(config, store, "prompts")
    make = full_student if config.student.form == "full" else lora_student
    for stage, amount in {"cold_start": 0.01, "joint": 0.02}.items():
        context = context_for(config, store, stage)
        make(context.out, find_teacher_of(config.teacher), amount)
        context.artifact.seal(context.out, facts={}, provenance=PROVENANCE)
    return store
