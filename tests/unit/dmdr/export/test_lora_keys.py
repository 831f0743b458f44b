"""The LoRA file's names against those that ComfyUI looks up, worked out here from the facts of its loader.

Facts, of Comfy-Org/ComfyUI at ec93dca (comfy/lora.py: model_lora_keys_unet, load_lora), 09708ea (comfy/utils.py) and
6f98b15 (comfy/weight_adapter/lora.py):
1. A file is read by a table of prefixes. A prefix counts with `.lora_up.weight` and `.lora_down.weight`, or with
   `.lora_B.weight` and `.lora_A.weight`; `.alpha`, where it is there, scales by alpha / rank. Any other key is dropped
   with a warning.
2. SDXL: `lora_unet_` and the module's name with _ for dots; `unet.` and the module's name with `.processor.` before
   to_q, to_k, to_v, to_out. The modules are those of diffusers' UNet, from its numbers of blocks and transformers.
3. SD3, FLUX, Z-Image: `transformer.` and the module's name of diffusers, for the modules listed below.
4. A wide LoRA: SDXL's table (UNET_MAP_RESNET, UNET_MAP_ATTENTIONS, TRANSFORMER_BLOCKS of comfy/utils.py) has every
   layer with weights of the three kinds of blocks under kohya's names; SD3's (MMDIT_MAP_BLOCK) has WIDE_SD3.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file

from dmdr.config.few_steps import FewSteps
from dmdr.export.rounding import cast_weights
from dmdr.export.write import LORA_FILE, WEIGHTS, build_metadata, load_student, write_form
from tests.support.tiny_teachers import copy_teacher
from tests.support.trained_run import lora_student

FAMILIES = ("sd3", "sdxl", "z_image", "flux")
SUFFIXES = {".lora_up.weight": "up", ".lora_B.weight": "up", ".lora_down.weight": "down", ".lora_A.weight": "down"}
JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

WIDE_SD3 = (
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "norm1.linear",
    "norm1_context.linear",
)


def unet_attentions(config) -> Iterator[str]:
    """The transformers of a UNet, as its config counts them: blocks, layers, and layers of a transformer."""
    layers, depths = config.layers_per_block, list(config.transformer_layers_per_block)
    for number, kind in enumerate(config.down_block_types):
        for layer in range(layers) if kind.startswith("CrossAttn") else ():
            yield from (
                f"down_blocks.{number}.attentions.{layer}.transformer_blocks.{n}" for n in range(depths[number])
            )
    yield from (f"mid_block.attentions.0.transformer_blocks.{n}" for n in range(depths[-1]))
    for number, kind in enumerate(config.up_block_types):
        depth = depths[len(depths) - 1 - number]
        for layer in range(layers + 1) if kind.startswith("CrossAttn") else ():
            yield from (f"up_blocks.{number}.attentions.{layer}.transformer_blocks.{n}" for n in range(depth))


def looked_up(family: str, config) -> dict[str, str]:
    """The prefixes that ComfyUI looks up -> the module of diffusers that each belongs to."""
    table: dict[str, str] = {}
    if family == "sdxl":
        for block in unet_attentions(config):
            for module in (f"{block}.attn{n}.{each}" for n in (1, 2) for each in ("to_q", "to_k", "to_v", "to_out.0")):
                table[f"lora_unet_{module.replace('.', '_')}"] = module
                table[f"unet.{module.replace('.to_', '.processor.to_').removesuffix('.0')}"] = module
        return table
    if family == "z_image":
        blocks = [f"layers.{n}" for n in range(config.n_layers)]
        blocks += [f"{side}_refiner.{n}" for side in ("noise", "context") for n in range(config.n_refiner_layers)]
        modules = [f"{block}.attention.{each}" for block in blocks for each in JOINT[:4]]
    else:
        modules = [f"transformer_blocks.{n}.attn.{each}" for n in range(config.num_layers) for each in JOINT]
    if family == "flux":
        single = range(config.num_single_layers)
        modules += [f"single_transformer_blocks.{n}.attn.{each}" for n in single for each in JOINT[:3]]
    return {f"transformer.{module}": module for module in modules}


def read_as_comfyui(lora: dict[str, torch.Tensor], table: dict[str, str]) -> tuple[dict[str, torch.Tensor], set[str]]:
    """What ComfyUI adds to each module's weight, and the keys that it drops."""
    added, read = {}, set()
    for prefix, module in table.items():
        names = {side: f"{prefix}{suffix}" for suffix, side in SUFFIXES.items() if f"{prefix}{suffix}" in lora}
        if not names:
            continue
        up, down, alpha = lora[names["up"]].float(), lora[names["down"]].float(), lora.get(f"{prefix}.alpha")
        added[module] = up.flatten(1) @ down.flatten(1) * (1.0 if alpha is None else alpha.item() / len(down))
        read |= {*names.values(), f"{prefix}.alpha"}
    return added, lora.keys() - read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_comfyui_finds_every_key_and_merges_the_student(family, dtype, request, tmp_path):
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    backbone = copy_teacher(folder, 16)
    before = {name: weight.clone() for name, weight in backbone.network.state_dict().items()}
    student = lora_student(tmp_path / "joint", folder)
    load_student(backbone.network, student, lora_dtype=dtype)
    about = build_metadata(backbone, FewSteps(2), title="tiny", teacher="ab")
    write_form("lora", backbone, student / WEIGHTS, FewSteps(2), tmp_path, about, dtype=dtype)
    lora = load_file(tmp_path / "lora" / LORA_FILE)

    added, dropped = read_as_comfyui(lora, looked_up(family, backbone.network.config))
    assert dropped == set()
    after = backbone.network.state_dict()
    changed = {name.removesuffix(".weight") for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert added.keys() == changed
    for module, difference in added.items():
        merged = before[f"{module}.weight"] + difference
        torch.testing.assert_close(merged, after[f"{module}.weight"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["sd3", "sdxl"])
def test_comfyui_merges_a_wide_student(family, request, tmp_path):
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    backbone = copy_teacher(folder, 16)
    before = {name: weight.clone() for name, weight in backbone.network.state_dict().items()}
    table = looked_up(family, backbone.network.config)
    if family == "sdxl":
        blocks = ("down_blocks", "mid_block", "up_blocks")
        layers = [
            name.removesuffix(".weight") for name in before if name.startswith(blocks) and name.endswith(".weight")
        ]
        table |= {f"lora_unet_{layer.replace('.', '_')}": layer for layer in layers}
    else:
        places = [
            f"transformer_blocks.{n}.{each}" for n in range(backbone.network.config.num_layers) for each in WIDE_SD3
        ]
        table |= {f"transformer.{place}": place for place in places}
    student = lora_student(tmp_path / "joint", folder, wide=True)
    load_student(backbone.network, student)
    about = build_metadata(backbone, FewSteps(2), title="tiny", teacher="ab")
    write_form("lora", backbone, student / WEIGHTS, FewSteps(2), tmp_path, about)

    added, dropped = read_as_comfyui(load_file(tmp_path / "lora" / LORA_FILE), table)
    assert dropped == set()
    after = backbone.network.state_dict()
    assert len(added) > len(looked_up(family, backbone.network.config)) / 2
    for module, difference in added.items():
        merged = before[f"{module}.weight"] + difference.view_as(before[f"{module}.weight"])
        torch.testing.assert_close(merged, after[f"{module}.weight"], atol=1e-4, rtol=1e-4)


def test_the_table_can_tell(tiny_sdxl_folder, tmp_path):
    """diffusers' own names, which SDXL's LoRA had before, are none that ComfyUI looks up."""
    lora = cast_weights(load_file(lora_student(tmp_path, tiny_sdxl_folder) / WEIGHTS), torch.float32)
    old = {f"unet.{key}": weight for key, weight in lora.items()}
    added, dropped = read_as_comfyui(old, looked_up("sdxl", copy_teacher(tiny_sdxl_folder).network.config))
    assert added == {}
    assert dropped == old.keys()
