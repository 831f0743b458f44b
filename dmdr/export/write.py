"""Write a trained student in forms that need no code of ours. parity.py shows that each draws the same images.

1. A form has one dtype throughout, that of export.dtype: diffusers does not load a folder of mixed precision as one
   dtype. Weights are rounded once, by rounding.py, before a form is written and compared.
2. A LoRA student is fused into its base in every form but `lora`, which is the LoRA alone for `load_lora_weights`.
   lora_keys.py names its tensors so that ComfyUI finds them as well.
3. The files themselves hold the arguments of a call: in their metadata, and a network alone has a scheduler/ beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from dmdr.backbones.protocol import Backbone
from dmdr.config.few_steps import FewSteps
from dmdr.errors import DataError
from dmdr.export.lora_keys import name_lora
from dmdr.export.rounding import cast_weights, hold_in
from dmdr.path import VPPath
from dmdr.teacher.key_map import Weights
from dmdr.teacher.original_layout import LAYOUTS, to_original
from dmdr.teacher.weight_files import V_PREDICTION, ZERO_SNR

WEIGHTS = "student_ema.safetensors"  # of a training stage: the weights that we export and evaluate
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name diffusers looks for
NETWORK_FILE = "diffusion_pytorch_model.safetensors"  # the same for a network


@dataclass(frozen=True)
class ModelSpec:
    """What `modelspec.*` calls a family: the model, and the code whose keys a single file has."""

    architecture: str
    implementation: str


MODEL_SPECS = {  # by family
    "sdxl": ModelSpec("stable-diffusion-xl-v1-base", "sgm"),
    "sd3": ModelSpec("stable-diffusion-3", "sd3"),
    "z-image": ModelSpec("z-image", "diffusers"),
    "flux": ModelSpec("flux-1-dev", "diffusers"),
}


def load_student(
    network: ModelMixin, folder: Path, *, weights: Path | None = None, lora_dtype: torch.dtype = torch.float32
) -> None:
    """Turn the teacher's network into the student of a sealed training stage, in place.

    weights: the file of another of its students than the one that training exports. lora_dtype: a LoRA is rounded to
    it before it is fused, as its file will hold it.

    Raises:
        DataError: the weights are damaged, or are not this network's; or one is too large for lora_dtype.
    """
    form: str = json.loads((folder / "student.json").read_text(encoding="utf-8"))["form"]
    file = folder / WEIGHTS if weights is None else weights
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise _refuse_student(str(file), error) from error
    if form == "lora":
        tensors = cast_weights(cast_weights(tensors, lora_dtype), torch.float32)
    fill_student(network, tensors, is_lora=form == "lora", where=str(file))


def fill_student(network: ModelMixin, weights: Weights, *, is_lora: bool, where: str) -> None:
    """Turn the teacher's network into a student with these weights, in place; a LoRA is fused.

    weights: under diffusers' names; buffers may be missing. where: what the weights come from, for messages.

    Raises:
        DataError: they are not this network's.
    """
    try:
        if is_lora:
            fuse_lora(network, weights)
        else:
            buffers = {name for name, _ in network.named_buffers()}
            held = {name: value for name, value in network.state_dict().items() if name in buffers}
            network.load_state_dict({**held, **weights}, strict=True)
    except (RuntimeError, KeyError) as error:
        raise _refuse_student(where, error) from error


def _refuse_student(where: str, error: Exception) -> DataError:
    message = " ".join(str(error.args[0]).split())[:300]
    return DataError(
        f"{where} is not a student of this teacher: {message}; give the teacher that it was trained from, or train it "
        "again"
    )


def fuse_lora(network: ModelMixin, lora: Weights) -> None:
    """Add a LoRA (diffusers' keys, alpha = rank) to the network's own weights. No adapter remains.

    Raises:
        KeyError: the network does not have a module that the LoRA adapts.
    """
    known = dict(network.named_modules())
    foreign = [key for key in lora if key.split(".lora_")[0] not in known]
    if foreign or not lora:
        raise KeyError(f"LoRA for {foreign[0] if foreign else 'nothing'}, which the teacher does not have")
    network.load_lora_adapter(lora, prefix=None, adapter_name="student")
    network.fuse_lora()
    network.unload_lora()
    network.requires_grad_(False)


def build_metadata(backbone: Backbone, few: FewSteps, *, title: str, teacher: str) -> dict[str, str]:
    """The metadata of the student's safetensors files. Other tools read `modelspec.*`.

    title: the run's name. teacher: its digest.
    """
    scheduler, side = backbone.student_scheduler(few), backbone.resolution
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": MODEL_SPECS[backbone.family].architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{side}x{side}",
        "dmdr.steps": str(few.steps),
        "dmdr.eta": f"{few.drawn_eta:g}",
        "dmdr.timesteps": json.dumps([round(t, 3) for t in backbone.student_timesteps(few).tolist()]),
        "dmdr.scheduler": type(scheduler).__name__,
        "dmdr.scheduler_config": json.dumps(config),
        "dmdr.guidance_scale": f"{backbone.plain_guidance:g}",
        "dmdr.resolution": str(side),
        "dmdr.teacher": teacher,
    }


def write_form(
    form: str,
    backbone: Backbone,
    weights: Path,
    few: FewSteps,
    out: Path,
    metadata: dict[str, str],
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a form of the student into its folder under `out`. The backbone's network is the student, rounded to dtype.

    weights: file of the student's weights as they were trained. metadata: of `build_metadata`.
    """
    folder = out / form
    if form == "pipeline":
        with hold_in(backbone.pipe, dtype):
            save_pipeline(backbone, backbone.network, few, folder)
        load_as_float32(folder)
    elif form == "lora":
        save_lora(backbone, cast_weights(load_file(weights), dtype), few, folder, metadata)
    elif form == "weights":
        save_weights(backbone, few, folder, metadata, dtype)
    else:
        save_single_file(backbone, folder / f"{metadata['modelspec.title']}.safetensors", metadata, dtype)


def save_pipeline(backbone: Backbone, network: ModelMixin, few: FewSteps, folder: Path) -> None:
    """Save the whole diffusers folder: `network` with the few-step scheduler and the teacher's other parts."""
    disable_progress_bars()
    backbone.build_student_pipeline(network, few).save_pretrained(folder, safe_serialization=True)


def load_as_float32(folder: Path) -> None:
    """Make a saved pipeline load in float32 where the call names no dtype.

    diffusers loads its own parts so, but transformers loads an encoder in the dtype of its config.json, and the
    pipeline would not run.
    """
    for file in folder.glob("text_encoder*/config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_lora(backbone: Backbone, lora: Weights, few: FewSteps, folder: Path, metadata: dict[str, str]) -> None:
    """Save the student's LoRA alone, for `load_lora_weights` on the teacher's pipeline, and its scheduler."""
    backbone.student_scheduler(few).save_pretrained(folder / "scheduler")
    save_file(name_lora(backbone.family, lora), folder / LORA_FILE, metadata)


def save_weights(
    backbone: Backbone, few: FewSteps, folder: Path, metadata: dict[str, str], dtype: torch.dtype = torch.float32
) -> None:
    """Save the network alone, for `from_pretrained` of its class, and its scheduler."""
    backbone.network.save_config(folder)
    backbone.student_scheduler(few).save_pretrained(folder / "scheduler")
    save_file(cast_weights(backbone.network.state_dict(), dtype), folder / NETWORK_FILE, metadata)


def save_single_file(
    backbone: Backbone, file: Path, metadata: dict[str, str], dtype: torch.dtype = torch.float32
) -> None:
    """Save network, VAE and text encoders as one file in the original layout of the family.

    Raises:
        DataError: a tensor has no place there.
    """
    file.parent.mkdir(parents=True)
    weights = cast_weights(to_original(backbone.family, _collect_weights(backbone)), dtype) | mark_prediction(backbone)
    save_file(weights, file, {**metadata, "modelspec.implementation": MODEL_SPECS[backbone.family].implementation})


def mark_prediction(backbone: Backbone) -> Weights:
    """The tensors without values by which programs know one file whose network predicts v, or has zero terminal SNR."""
    if not isinstance(backbone.path, VPPath) or backbone.path.predicts == "epsilon":
        return {}
    rescaled = backbone.pipe.scheduler.config["rescale_betas_zero_snr"]
    return {name: torch.zeros(0) for name in (V_PREDICTION, *((ZERO_SNR,) if rescaled else ()))}


def check_single_file(backbone: Backbone) -> None:
    """Check early, without copying the network, that `save_single_file` will find a place for every tensor.

    Raises:
        DataError: it will not.
    """
    parts = _collect_weights(backbone)
    for part in parts.keys() - {"text_encoder"}:  # the values of all others do not matter
        parts[part] = {name: weight.to("meta") for name, weight in parts[part].items()}
    to_original(backbone.family, parts)


def network_part(backbone: Backbone) -> str:
    """The name of the network among the parts of its pipeline: transformer or unet."""
    return next(name for name, part in backbone.pipe.components.items() if part is backbone.network)


def absent_text_encoders(backbone: Backbone) -> list[str]:
    """The text encoders and tokenizers that the teacher lacks, as SD3 may lack its T5. diffusers needs their names."""
    parts = backbone.pipe.components.items()
    return [name for name, part in parts if part is None and name.startswith(("text_encoder", "tokenizer"))]


def _collect_weights(backbone: Backbone) -> dict[str, Weights]:
    """The weights of each part that the family's original layout has."""
    modules: dict[str, torch.nn.Module | None] = {
        part: backbone.pipe.components[part] for part in LAYOUTS[backbone.family]
    }
    return {part: module.state_dict() for part, module in modules.items() if module is not None}


def disable_progress_bars() -> None:
    """Stop diffusers and transformers from drawing a bar for each part, which they also do into a log file."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
