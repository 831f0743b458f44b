"""Whether a teacher looks like a few-step model already. DMD needs the multi-step base: a distilled one has no scores
at most noise levels, and no guidance to learn. Signs are read, so the line is a warning, never a refusal.

1. A few-step scheduler, settings that only distilled models have, and the words by which they are named.
2. A network that takes its guidance as an input, as FLUX.1-dev does, is distilled for guidance alone. It still draws in
   many steps, and DMDR distils it. The line for it says so.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from dmdr.teacher import hub
from dmdr.teacher.index import NETWORKS, PipelineIndex, read_index
from dmdr.teacher.json_file import read_object

FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "CMStochasticIterativeScheduler")
# as whole words in a name: "turbo" in sdxl-turbo and sdxl_turbo_1.0, but not in turbocharged
NAMES = re.compile(
    r"(?<![a-z])(turbo|lightning|schnell|lcm|dmd2?|tcd|pcm|klein|distill?ed|few[-_ ]?steps?|(?<!\d)\d\d?[-_ ]?steps?"
    r"|hyper(?:[-_ ]?sd(?:xl|3)?|[-_ ]?flux)?(?![-_ ]?real))(?![a-z])",
    re.IGNORECASE,
)
WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z][a-z])|(?<=[A-Z])(?=[A-Z][a-z])")  # between the words of SDXLTurbo
MANY_STEPS = 9  # a name that says at least so many steps is no sign
TITLES = ("modelspec.title", "modelspec.description", "ss_sd_model_name", "ss_output_name")  # in a file's metadata
NEEDS = "DMD needs the multi-step base that it was made from: give that as the teacher, and this as student.start.path"


def warn_of_distilled(path: str, folder: Path, file: Path | None = None) -> str | None:
    """One line if the teacher looks distilled, None if not.

    path: as the config gives it. folder: of its configuration. file: of its weights, if it is one file.

    Raises:
        DataError, InputMissing: its configuration cannot be read.
    """
    index = read_index(folder)
    if (sign := _find_sign(path, folder, file, index)) is not None:
        return f"teacher {path} looks like a few-step model ({sign}). {NEEDS}"
    if _read_network(folder, index).get("guidance_embeds"):
        return (
            f"teacher {path} has its guidance distilled into it (guidance_embeds), but draws in many steps: it can be "
            "a teacher. Its scores take teacher.guidance_scale as an input, without an unconditional half"
        )
    return None


def warn_of_name(path: str) -> str | None:
    """`warn_of_distilled` of a teacher whose files are not here: its name alone."""
    sign = _find_word(_shorten(path))
    return None if sign is None else f"teacher {path} looks like a few-step model ({sign}). {NEEDS}"


def _find_sign(path: str, folder: Path, file: Path | None, index: PipelineIndex) -> str | None:
    """What says that the teacher is a few-step model."""
    pipeline = read_object(folder / "model_index.json")
    scheduler_file = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_object(scheduler_file) if scheduler_file.is_file() else {}
    network, metadata = _read_network(folder, index), _read_metadata(folder, file, index)
    named = index.parts.get("scheduler")
    kind = named.class_name if named is not None else ""
    if kind in FEW_STEP_SCHEDULERS:
        return f"its scheduler is {kind}"
    for setting in ("stochastic_sampling", "shift_terminal"):
        if scheduler.get(setting):
            return f"its scheduler has {setting}: {json.dumps(scheduler[setting])}"
    if pipeline.get("is_distilled"):
        return "model_index.json has is_distilled: true"
    if network.get("time_cond_proj_dim") is not None:
        return "its UNet takes a guidance scale (time_cond_proj_dim), as latent consistency models do"
    guidance = pipeline.get("guidance_scale", metadata.get("dmdr.guidance_scale"))
    if (number := _to_number(guidance)) is not None and number <= 1:
        return f"its own files say guidance_scale {number:g}"
    if (steps := metadata.get("dmdr.steps")) is not None:
        return f"its own files say {steps} steps"
    names = (
        _shorten(path),
        *(_shorten(str(config.get("_name_or_path") or "")) for config in (pipeline, network)),
        *(metadata.get(title, "") for title in TITLES),
    )
    return next((sign for name in names if (sign := _find_word(name)) is not None), None)


def _find_word(name: str) -> str | None:
    for found in NAMES.finditer(WORDS.sub("-", name)):
        count = re.match(r"\d+", found[0])
        if count is None or int(count[0]) < MANY_STEPS:
            return f"{found[0]!r} in {name[:80]!r}"
    return None


def _shorten(path: str) -> str:
    """The part of an address that names the model: what lies above it says nothing."""
    if (pinned := hub.ADDRESS.fullmatch(path)) is not None:
        return f"{pinned['repo']} {pinned['file'] or ''}".strip()
    return path.rstrip("/").rsplit("/", 1)[-1]


def _read_network(folder: Path, index: PipelineIndex) -> dict[str, object]:
    config = folder / NETWORKS[index.family][0] / "config.json"
    return read_object(config) if config.is_file() else {}


def _read_metadata(folder: Path, file: Path | None, index: PipelineIndex) -> dict[str, str]:
    """The metadata of the network's first weight file; empty where no file can be read, which loading reports."""
    from safetensors import SafetensorError, safe_open

    files = [file] if file is not None else sorted((folder / NETWORKS[index.family][0]).glob("*.safetensors"))
    try:
        with safe_open(files[0], framework="pt") as header:
            return dict(header.metadata() or {})
    except (IndexError, OSError, SafetensorError):
        return {}


def _to_number(value: object) -> float | None:
    try:
        return float(str(value)) if value is not None else None
    except ValueError:
        return None
