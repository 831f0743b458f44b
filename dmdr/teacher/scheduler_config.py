"""scheduler_config.json of a teacher: every setting is used, or has the value that changes nothing, or is refused.

1. DMDR computes a teacher's noise schedule and its sampling times from this file. With a setting that is not
   understood, the student would learn another model than the one that the teacher's own pipeline draws with.
2. SDXL teachers are sampled with EulerDiscreteScheduler. Other samplers of the same noise schedule are accepted, and
   `note_sampler` says so: the choice of a sampler is no property of the network.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from dmdr.errors import DataError
from dmdr.teacher.index import PipelineIndex
from dmdr.teacher.json_file import read_object

FLOW, EULER = "FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler"
OTHER_SAMPLERS = (  # of the noise schedule that EulerDiscreteScheduler has
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
SHIFT = {"shift", "use_dynamic_shifting", "time_shift_type", "base_shift", "max_shift"}
USED = {
    FLOW: SHIFT | {"base_image_seq_len", "max_image_seq_len"},
    EULER: {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "timestep_spacing"}
    | {"steps_offset", "prediction_type", "rescale_betas_zero_snr"},
}
PREDICTS = ("epsilon", "v_prediction")
Settings = dict[str, object]


def check_scheduler(folder: Path, index: PipelineIndex) -> None:
    """Account for every setting of a teacher's scheduler.

    Raises:
        DataError: a class or a setting that DMDR does not sample, with its name and value.
        InputMissing: the file cannot be read.
    """
    kind, settings = index.require_part("scheduler").class_name, read_settings(folder)
    expected = EULER if index.family == "sdxl" else FLOW
    if kind != expected and (expected == FLOW or kind not in OTHER_SAMPLERS):
        raise DataError(
            f"teacher {folder} is sampled with {kind} (model_index.json), and DMDR samples a {index.class_name} with "
            f"{expected}; give a teacher of that scheduler"
        )
    _check_prediction(folder, settings)
    neutral = _list_defaults(expected) if kind == expected else {}
    for name, value in settings.items():
        if name in USED[expected] or name not in neutral or value == neutral[name]:
            continue  # a name that the scheduler does not know is ignored by diffusers, too
        raise DataError(
            f"teacher {folder}: scheduler_config.json has {name}: {json.dumps(value)}, and DMDR samples only "
            f"{json.dumps(neutral[name])}; give another teacher, or change the setting if the network was not trained "
            "for it"
        )


def _check_prediction(folder: Path, settings: Settings) -> None:
    """Raises DataError if the network predicts what DMDR does not distil."""
    predicts = settings.get("prediction_type", "epsilon")
    if predicts not in PREDICTS:
        raise DataError(
            f"teacher {folder} predicts {json.dumps(predicts)} (scheduler_config.json, prediction_type), and DMDR "
            f"distils SDXL teachers that predict {' or '.join(PREDICTS)}; give another teacher"
        )
    if settings.get("rescale_betas_zero_snr") and predicts == "epsilon":
        raise DataError(
            f"teacher {folder}: scheduler_config.json has rescale_betas_zero_snr with prediction_type epsilon, which "
            "says nothing of an image that is pure noise; set v_prediction if the network predicts v, or turn it off"
        )


def note_sampler(folder: Path, index: PipelineIndex) -> str | None:
    """What a user should know about the sampler of a teacher; None if there is nothing."""
    kind = index.require_part("scheduler").class_name
    if index.family != "sdxl" or kind not in OTHER_SAMPLERS:
        return None
    return f"the teacher's own scheduler is {kind}; DMDR samples the teacher with {EULER} of the same noise schedule"


def read_settings(folder: Path) -> Settings:
    """The settings in scheduler_config.json, but for those that begin with an underscore.

    Raises:
        DataError, InputMissing: as `check_scheduler`.
    """
    settings = read_object(folder / "scheduler" / "scheduler_config.json")
    return {name: value for name, value in settings.items() if not name.startswith("_")}


def _list_defaults(kind: str) -> Settings:
    """The settings of a scheduler of diffusers with their default values, which change nothing."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
