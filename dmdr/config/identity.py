"""What names a stage's result: the settings that it reads, together with the digests of its inputs.

Addresses say where an input lies, not what it is; its digest stands for it. `execution` never changes a result.
"""

from __future__ import annotations

import hashlib
import json
import re

from dmdr.config.run import Config
from dmdr.config.stages import TABLE, TRAINING_STAGES, StageName

# the digests of what lies there count instead
ADDRESSES = (
    "teacher.path",
    "teacher.parts",
    "prompts.sources",
    "prompts.evaluation",
    "prompts.folder",
    "joint.rl.tiny_decoder",
)
PIPELINE = re.compile(r"evaluate\.pipelines\..*\.path")  # and of each of these

# Settings that came after results had been sealed without them. At this value, which those results had, they stay out.
LATER: dict[str, object] = {
    "precision": "float32",
    "export.forms": None,
    "joint.rl.decoder": "whole",
    "evaluate.pipelines": {},
    **{f"{stage}.{of}.kind": "adamw" for stage in TRAINING_STAGES for of in ("student", "fake_score")},
}


def identity(config: Config, stage: StageName) -> dict[str, object]:
    """The settings that name a stage's result, flat ("student.steps": 4), without ADDRESSES and execution."""
    flat = _flatten("", config.model_dump(mode="json"))
    needed = {key for key in flat for need in TABLE[stage].settings if key == need or key.startswith(f"{need}.")}
    needed = {key for key in needed.difference(ADDRESSES) if not PIPELINE.fullmatch(key)}
    return {key: flat[key] for key in sorted(needed) if key not in LATER or LATER[key] != flat[key]}


def _flatten(prefix: str, value: object) -> dict[str, object]:
    if isinstance(value, dict) and value:
        return {k: v for key, inner in value.items() for k, v in _flatten(f"{prefix}.{key}".strip("."), inner).items()}
    return {prefix: value}


def fingerprint(data: object) -> str:
    """sha256 of canonical JSON; equal data, equal fingerprint, on any machine."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()
