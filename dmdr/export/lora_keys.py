"""Name the tensors of a LoRA so that both plain diffusers and ComfyUI find the module of each.

1. The families with a transformer: diffusers' own names after `transformer.`, which ComfyUI looks up as well
   (comfy/lora.py, model_lora_keys_unet, with comfy/utils.py: mmdit_, flux_ and z_image_to_diffusers).
2. SDXL: ComfyUI does not look up diffusers' `unet.<module>.lora_A.weight`. Both read kohya's names,
   `lora_unet_<module>` with _ for each dot, as in LCM-LoRA for SDXL. `alpha` is the rank, so that the scale is 1.
"""

from __future__ import annotations

import torch

from dmdr.teacher.key_map import Weights

KOHYA = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


def name_lora(family: str, lora: Weights) -> Weights:
    """Rename a LoRA from the names of its network's modules (`<module>.lora_A.weight`) to those of its file."""
    if family != "sdxl":
        return {f"transformer.{key}": weight for key, weight in lora.items()}
    renamed: Weights = {}
    for key, weight in lora.items():
        module, _, side = key.partition(".lora_")
        name = f"lora_unet_{module.replace('.', '_')}"
        renamed[f"{name}.{KOHYA[f'lora_{side}']}"] = weight
        if side == "A.weight":
            renamed[f"{name}.alpha"] = torch.tensor(float(len(weight)))
    return renamed
