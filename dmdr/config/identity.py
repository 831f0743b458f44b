"""The identity of a stage's result: the settings that the stage reads. The digests of its inputs complete it.

An address says where an input lies, not what it contains. The digest of the input replaces it. The settings under
`execution` never change a result.
"""

from __future__ import annotations

import hashlib
import json
import re

from dmdr.config.run import Config
from dmdr.config.stages import TABLE, TRAINING_STAGES, StageName

# Settings left out of the identity, because the digest of what lies there replaces them.
ADDRESSES = (
    "teacher.path",
    "teacher.parts",
    "prompts.sources",
    "prompts.evaluation",
    "prompts.folder",
    "cold_start.rl.tiny_decoder",
    "joint.rl.tiny_decoder",
    "student.start.path",
)
STATEMENTS = ("teacher.world",)  # left out as well: it says what the files are, and changes no result
PIPELINE = re.compile(r"evaluate\.pipelines\..*\.path")  # left out as well

# Settings that are younger than some sealed results, each with the value that those results had. At this value a
# setting is left out, so that the old results keep their identity.
LATER_OF_RL: dict[str, object] = {
    "decoder": "whole",
    "decoder_precision": "float32",
    "margin": None,
    "matching": None,
    "scales": {},
    "normalise": False,
    "prefixes": {},
    "preferences": {},
    "shuffled": False,
    "start": 0,
    "ramp": 0,
}
LATER_OF_WATCH: dict[str, object] = {
    "on_divergence": "fail",
    "recoveries": None,
    "keep_best": 0,
    "sharpness_drop": 0.4,
    "blank_rise": 0.1,
    "fake_lag": 1.5,
    "fake_rise": 8.0,
    "gradient_drop": 0.95,
}
LATER: dict[str, object] = {
    "precision": "float32",
    "frozen_base": None,
    "student.start": None,
    "joint.fake_warmup": 0,
    "prompts.encode": "auto",
    "prompts.dtype": "float32",
    "student.eta": 1.0,
    "student.timesteps": None,
    "student.shift": None,
    "export.forms": None,
    "export.dtype": "bfloat16",  # those results are float32, and stay valid: a run that is done is not done again
    "teacher.unconditional": "pipeline",
    "student.lora_alpha": None,
    **{f"{of}.lora_targets": "attention" for of in ("student", "fake_score")},
    **{f"{of}.lora_init": "kaiming" for of in ("student", "fake_score")},
    **{f"{stage}.dm_floor": 0.0 for stage in TRAINING_STAGES},
    **{f"{stage}.decoupled": None for stage in TRAINING_STAGES},
    "cold_start.rl": None,
    "cold_start.watch": None,
    **{f"{stage}.rl.{key}": value for stage in TRAINING_STAGES for key, value in LATER_OF_RL.items()},
    **{f"{stage}.watch.{key}": value for stage in TRAINING_STAGES for key, value in LATER_OF_WATCH.items()},
    "evaluate.pipelines": {},
    **{
        f"{stage}.{of}.{key}": value
        for stage in TRAINING_STAGES
        for of in ("student", "fake_score")
        for key, value in {"kind": "adamw", "eps": 1e-8, "warmup": 0}.items()
    },
}


def identity(config: Config, stage: StageName) -> dict[str, object]:
    """The settings that identify a stage's result, flat ("student.steps": 4), without ADDRESSES and execution."""
    flat = _flatten("", config.model_dump(mode="json"))
    settings = {key for key in flat for name in TABLE[stage].settings if key == name or key.startswith(f"{name}.")}
    keys = [key for key in sorted(settings.difference(ADDRESSES, STATEMENTS)) if not PIPELINE.fullmatch(key)]
    return {key: flat[key] for key in keys if key not in LATER or LATER[key] != flat[key]}


def _flatten(prefix: str, value: object) -> dict[str, object]:
    """Nested mappings as one, whose keys join the names with dots. An empty mapping stays a value."""
    if isinstance(value, dict) and value:
        return {k: v for key, inner in value.items() for k, v in _flatten(f"{prefix}.{key}".strip("."), inner).items()}
    return {prefix: value}


def fingerprint(data: object) -> str:
    """The sha256 of the data as canonical JSON. Equal data have equal fingerprints on every machine."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()
