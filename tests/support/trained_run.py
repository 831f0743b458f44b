"""A run whose prompts and trained students are sealed, made in a second: what export and evaluate start from."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from dmdr.config.identity import identity
from dmdr.config.run import Config
from dmdr.export.write import WEIGHTS
from dmdr.teacher.load import find_teacher_of, load_teacher
from stages.runtime.context import Context
from stages.runtime.progress import Progress
from stages.store.artifacts import Artifact
from stages.store.inputs import fingerprint_inputs
from tests.support.sealing import PROVENANCE


def full_student(folder: Path, teacher_folder: Path, amount: float = 0.05) -> Path:
    """The output of a training stage: the teacher's weights, each moved a little."""
    network = load_teacher(teacher_folder, text=False).network
    generator = torch.Generator().manual_seed(1)
    weights = {name: w + amount * torch.randn(w.shape, generator=generator) for name, w in network.state_dict().items()}
    return _trained(folder, weights, {"form": "full"})


def lora_student(folder: Path, teacher_folder: Path, amount: float = 0.2, rank: int = 4, *, wide: bool = False) -> Path:
    """The same for a LoRA student: random A and B on all targets of the preset attention, or wide."""
    backbone = load_teacher(teacher_folder, text=False)
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
    return _trained(folder, weights, {"form": "lora"})


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


def trained_run(config: Config, store: Path) -> Path:
    """Seal prompts for real, cold start and joint as if they had been trained; returns the store."""
    run_stage(config, store, "prompts")
    make = full_student if config.student.form == "full" else lora_student
    for stage, amount in {"cold_start": 0.01, "joint": 0.02}.items():
        context = context_for(config, store, stage)
        make(context.out, find_teacher_of(config.teacher), amount)
        context.artifact.seal(context.out, facts={}, provenance=PROVENANCE)
    return store
