"""The original layout against diffusers' own single-file loader, which reads published files: the same bits back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
    infer_diffusers_model_type,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from dmdr.errors import DataError
from dmdr.planning.architectures import ARCHITECTURES
from dmdr.teacher.load import ONE_FILE
from dmdr.teacher.original_layout import LAYOUTS, to_original

PIPELINES = {"sd3": StableDiffusion3Pipeline, "sdxl": StableDiffusionXLPipeline}


def sd35(folder: Path) -> SD3Transformer2DModel:
    """As SD3.5: queries and keys are normed, and the first block attends twice, as in SD3.5-Medium."""
    config = SD3Transformer2DModel.load_config(folder, subfolder="transformer")
    return SD3Transformer2DModel.from_config(config, qk_norm="rms_norm", dual_attention_layers=(0,), num_layers=3)


def deep_unet(folder: Path) -> UNet2DConditionModel:
    """Three levels of two layers as in SDXL, so that blocks are counted to 8."""
    config = UNet2DConditionModel.load_config(folder, subfolder="unet")
    changes = {
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 3),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 2, 2),
    }
    return UNet2DConditionModel.from_config(config, **changes)


def deep_vae(folder: Path) -> AutoencoderKL:
    """Three levels of two layers, of which one changes the number of channels."""
    config = AutoencoderKL.load_config(folder, subfolder="vae")
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return AutoencoderKL.from_config(config, block_out_channels=(4, 8, 8), layers_per_block=2, **kinds)


@pytest.mark.parametrize("variant", ["tiny", "deep"])
@pytest.mark.parametrize("family", LAYOUTS)
def test_diffusers_reads_back_the_same_bits(family, variant, request, tmp_path):
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    pipe = DiffusionPipeline.from_pretrained(folder)
    if variant == "deep":
        with torch.random.fork_rng():
            torch.manual_seed(1)
            network = {"transformer": sd35(folder)} if family == "sd3" else {"unet": deep_unet(folder)}
            pipe.register_modules(**network, vae=deep_vae(folder))
        folder = tmp_path / "deep"
        pipe.save_pretrained(folder)
    parts = {part: pipe.components[part].state_dict() for part in LAYOUTS[family]}
    for part, weights in parts.items():  # biases and norms that are all alike could change places unseen
        if part != "text_encoder" or family != "sd3":
            for number, weight in enumerate(weights.values()):
                weight.add_(torch.linspace(0.01, 0.02, weight.numel()).reshape(weight.shape) * (1 + number % 7))
    save_file(to_original(family, parts), tmp_path / "one.safetensors")

    for part in parts:  # only what the file gives back may count
        for file in Path(shutil.copytree(folder, tmp_path / "bare", dirs_exist_ok=True)).glob(f"{part}/*.safetensors"):
            file.unlink()
    back = PIPELINES[family].from_single_file(
        str(tmp_path / "one.safetensors"), config=str(tmp_path / "bare"), local_files_only=True
    )
    for part, weights in parts.items():
        found = back.components[part].state_dict()
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def clip_g() -> dict[str, torch.Tensor]:
    """The second text encoder of both families, as published, without weights."""
    config = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
    )
    with torch.device("meta"):
        return CLIPTextModelWithProjection(config).state_dict()


@pytest.mark.parametrize(
    ("name", "family", "part", "kind"),
    [
        ("SDXL", "sdxl", "unet", "xl_base"),
        ("SD3-Medium", "sd3", "transformer", "sd3"),
        ("SD3.5-Large", "sd3", "transformer", "sd35_large"),
    ],
)
def test_the_published_networks_are_recognised_and_found_whole(name, family, part, kind):
    """By names and shapes, without weights."""
    network = ARCHITECTURES[name].build_network()
    weights = {key: weight.to("meta") for key, weight in network.state_dict().items()}
    found = to_original(family, {part: weights, "text_encoder_2": clip_g()})
    assert infer_diffusers_model_type(found) == kind
    if family == "sdxl":
        back = convert_ldm_unet_checkpoint(found, network.config)
    else:
        back = convert_sd3_transformer_checkpoint_to_diffusers(found)
    assert {key: weight.shape for key, weight in back.items()} == {key: w.shape for key, w in weights.items()}


def test_a_variant_that_the_layout_does_not_know_is_refused(tiny_sdxl_folder):
    unet = DiffusionPipeline.from_pretrained(tiny_sdxl_folder).unet.state_dict()
    unet["encoder_hid_proj.weight"] = torch.zeros(2, 2)
    with pytest.raises(DataError, match="encoder_hid_proj.weight has no place .* take single-file out") as said:
        to_original("sdxl", {"unet": unet})
    assert "\n" not in str(said.value)


def test_equally_wide_text_encoders_are_refused(tiny_sd3_folder):
    """diffusers would read the first for both, and say nothing."""
    encoder = DiffusionPipeline.from_pretrained(tiny_sd3_folder).text_encoder.state_dict()
    with pytest.raises(DataError, match="are both 12 wide, .*take single-file out of export.forms"):
        to_original("sd3", {"text_encoder": encoder, "text_encoder_2": encoder})


def test_the_families_of_the_layout_are_those_that_configs_may_ask_for():
    assert set(LAYOUTS) == set(ONE_FILE)
