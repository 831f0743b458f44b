"""The weight files of a diffusers folder: which are read, and whether their tensors are what their names say.

1. Only safetensors are read. A pickle can run code when it is opened.
2. A part that has only its half-precision variant (`*.fp16.safetensors`, as people download it) is read from that.
3. Tensors under the names of a compiled network, of adapters that were not fused or of scaled 8-bit weights are not the
   weights of the network. They are refused, because loading them as they are draws something else.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dmdr.errors import DataError
from dmdr.teacher.json_file import read_object

MODELS = ("transformer", "unet", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")  # parts with weights
VARIANTS = ("fp16", "bf16")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
FOREIGN = (  # in the name of a tensor -> what it is, and what to do
    ("_orig_mod.", "it was saved from a compiled network; save the network's _orig_mod instead"),
    (".base_layer.", "its adapters are not fused; fuse and unload them, then save it again"),
    (".lora_", "it has a LoRA beside its weights; fuse and unload it, then save it again"),
    ("scaled_fp8", "its 8-bit weights have scales of their own; give the weights in bfloat16 or float16"),
    (".scale_weight", "its 8-bit weights have scales of their own; give the weights in bfloat16 or float16"),
    (".weight_scale", "its 8-bit weights have scales of their own; give the weights in bfloat16 or float16"),
    (".absmax", "it is quantised to 4 bits; give the weights in bfloat16 or float16"),
    (".quant_map", "it is quantised; give the weights in bfloat16 or float16"),
    (".comfy_quant", "it is quantised; give the weights in bfloat16 or float16"),
)
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"  # tensors without values, by which one-file models say what they predict
EDM = ("edm_mean", "edm_vpred.sigma_max")


def find_variant(folder: Path, part: str) -> str | None:
    """The variant of a part's weights that is there, if the plain ones are not; else None.

    Raises:
        DataError: the part has no weights that are read.
    """
    files = [each.name for each in (folder / part).glob("*.safetensors") if not each.name.startswith(".")]
    if any(variant_of(name) is None for name in files):
        return None
    found = [variant for variant in VARIANTS if any(variant_of(name) == variant for name in files)]
    if found:
        return found[0]
    others = {variant_of(name) for name in files}
    pickles = sorted(each.name for each in (folder / part).glob("*") if each.suffix in PICKLES)
    if others:
        raise DataError(
            f"teacher {folder}: {part} has only the variant {min(map(str, others))} of its weights; DMDR reads the "
            f"plain ones, or {' or '.join(VARIANTS)}"
        )
    if pickles:
        raise DataError(
            f"teacher {folder}: the weights of {part} are a pickle ({pickles[0]}), which can run code; DMDR reads only "
            "safetensors: save the pipeline with safe_serialization=True where you trust it"
        )
    raise DataError(f"teacher {folder}: {part} has no weights (*.safetensors); fetch the teacher again")


def variant_of(name: str) -> str | None:
    """ "fp16" of model.fp16.safetensors, of its shards and of the list of these; None of plain weights."""
    words = [word.partition("-")[0] for word in name.split(".")[1:]]
    return next((word for word in words if word not in ("safetensors", "index", "json")), None)


def check_config(folder: Path, part: str) -> None:
    """Refuse a part whose config.json asks for code of its own, or says that its weights are quantised.

    Raises:
        DataError: with the key.
        InputMissing: it cannot be read.
    """
    config = read_object(folder / part / "config.json")
    if "auto_map" in config:
        raise DataError(
            f"teacher {folder}: {part} asks for code of its own (auto_map), which is never run; give another"
        )
    if config.get("quantization_config") is not None:
        raise DataError(
            f"teacher {folder}: the weights of {part} are quantised (quantization_config); give them in bfloat16 or "
            "float16"
        )


def refuse_foreign_tensors(names: Iterable[str], file: Path, what: str = "teacher file") -> None:
    """Refuse a file whose tensors are not those of a plain network. what: which file it is, for the message.

    Raises:
        DataError: with the name of a tensor, what it means and what to do.
    """
    for name in names:
        for sign, remedy in FOREIGN:
            if sign in name:
                raise DataError(f"{what} {file} has the tensor {name}: {remedy}")


def check_markers(names: Iterable[str], metadata: dict[str, str], file: Path, settings: dict[str, object]) -> None:
    """Check that what one file says of its prediction is what the scheduler of its parts says.

    settings: of scheduler_config.json.

    Raises:
        DataError: with the marker, and the setting that it needs.
    """
    found = {*names}
    for name in found.intersection(EDM):
        raise DataError(f"teacher {file} is of EDM's formulation (its tensor {name}), which DMDR does not sample")
    stated = metadata.get("modelspec.prediction_type", "")
    says_v = V_PREDICTION in found or stated.startswith("v")
    predicts = settings.get("prediction_type", "epsilon")
    if says_v and predicts != "v_prediction" or stated.startswith("eps") and predicts != "epsilon":
        raise DataError(
            f"teacher {file} says that it predicts {'v' if says_v else 'epsilon'}, but scheduler_config.json of "
            f"teacher.parts has prediction_type {predicts}; give parts with "
            f"{'v_prediction' if says_v else 'epsilon'}"
        )
    if ZERO_SNR in found and not settings.get("rescale_betas_zero_snr"):
        raise DataError(
            f"teacher {file} says that it has zero terminal SNR (its tensor {ZERO_SNR}); give teacher.parts whose "
            "scheduler_config.json has rescale_betas_zero_snr: true and timestep_spacing: trailing"
        )
