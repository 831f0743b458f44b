"""Rename diffusers' weights to the keys under which their family was published, as ComfyUI and others read them.

1. The maps invert what diffusers' `from_single_file` reads. They compute only what the layout needs: q, k, v in one
   tensor, scale and shift in another order, 1x1 convolutions, a transposed projection.
2. The SD3 layout has no projection of CLIP-L: its readers use the identity, which the SD3 teachers have.
3. Given meta tensors, the maps tell the names and shapes that a teacher's file must have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dmdr.errors import DataError
from dmdr.teacher.key_map import Places, Weights, list_children, rename_modules

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
POSITIONS = "embeddings.position_embedding.weight"
T5_TIE = "encoder.embed_tokens.weight"  # the same tensor as shared.weight, which files may leave out


def to_original(family: str, parts: dict[str, Weights]) -> Weights:
    """Rename the weights of a pipeline's parts to the original layout of `family` (a key of LAYOUTS).

    Raises:
        DataError: a tensor has no place there, or the reader could not tell the two CLIP encoders apart.
    """
    encoders = [parts[part] for part in ("text_encoder", "text_encoder_2") if part in parts]
    widths = [weights[key].shape[-1] for weights in encoders for key in weights if key.endswith(POSITIONS)]
    if len(set(widths)) < len(widths):
        raise DataError(
            f"the two CLIP text encoders are both {widths[0]} wide, but diffusers tells them apart in one file by "
            "their widths; take single-file out of export.forms"
        )
    renamed: Weights = {}
    for part, weights in parts.items():
        layout = LAYOUTS[family][part]
        renamed |= {f"{layout.prefix}{key}": weight.contiguous() for key, weight in layout.rename(weights).items()}
    return renamed


def unet_to_original(weights: Weights) -> Weights:
    """SDXL's UNet: the layout numbers its blocks consecutively. An attention or a sampler has its resnet's number."""
    places = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.attentions.0": "middle_block.1",
        **_resnet("mid_block.resnets.0", "middle_block.0"),
        **_resnet("mid_block.resnets.1", "middle_block.2"),
    }
    count = 1
    for block in list_children(weights, "down_blocks"):
        for layer in list_children(weights, f"{block}.resnets"):
            places |= _resnet(layer, f"input_blocks.{count}.0")
            places[layer.replace("resnets", "attentions")] = f"input_blocks.{count}.1"
            count += 1
        for sampler in list_children(weights, f"{block}.downsamplers"):
            places[f"{sampler}.conv"] = f"input_blocks.{count}.0.op"
            count += 1
    count = 0
    for block in list_children(weights, "up_blocks"):
        for layer in list_children(weights, f"{block}.resnets"):
            places |= _resnet(layer, f"output_blocks.{count}.0")
            places[layer.replace("resnets", "attentions")] = f"output_blocks.{count}.1"
            count += 1
        position = 2 if list_children(weights, f"{block}.attentions") else 1  # after the attention, if there is one
        for sampler in list_children(weights, f"{block}.upsamplers"):
            places[f"{sampler}.conv"] = f"output_blocks.{count - 1}.{position}.conv"
    return rename_modules(weights, places)


def vae_to_original(weights: Weights) -> Weights:
    """The autoencoder of both families: the layout numbers up blocks from the output; attention is 1x1 convolutions."""
    places = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for side in ("encoder", "decoder"):
        places |= {f"{side}.{name}": f"{side}.{name}" for name in ("conv_in", "conv_out")}
        places |= {f"{side}.conv_norm_out": f"{side}.norm_out"}
        for number in (0, 1):
            places |= _vae_resnet(f"{side}.mid_block.resnets.{number}", f"{side}.mid.block_{number + 1}")
        places |= {f"{side}.mid_block.attentions.0.{a}": f"{side}.mid.attn_1.{b}" for a, b in attention.items()}
    down, up = (list_children(weights, blocks) for blocks in ("encoder.down_blocks", "decoder.up_blocks"))
    levels = [(block, f"encoder.down.{number}", "down") for number, block in enumerate(down)]
    levels += [(block, f"decoder.up.{number}", "up") for number, block in enumerate(reversed(up))]
    for block, level, way in levels:
        for number, layer in enumerate(list_children(weights, f"{block}.resnets")):
            places |= _vae_resnet(layer, f"{level}.block.{number}")
        places[f"{block}.{way}samplers.0.conv"] = f"{level}.{way}sample.conv"
    return {
        key: weight[:, :, None, None] if ".attn_1." in key and weight.ndim == 2 else weight
        for key, weight in rename_modules(weights, places).items()
    }


def clip_to_original(weights: Weights) -> Weights:
    """A CLIP text encoder, under the names of transformers' CLIPTextModel from when it was nested in `text_model`."""
    nested = ("text_model.", "text_projection.")
    return {key if key.startswith(nested) else f"text_model.{key}": weight for key, weight in weights.items()}


def clip_unprojected_to_original(weights: Weights) -> Weights:
    """SD3's CLIP-L. Its projection is the identity, which the layout leaves out."""
    renamed = clip_to_original(weights)
    projection = renamed.pop("text_projection.weight")
    if not projection.is_meta and not torch.equal(projection, torch.eye(*projection.shape).to(projection)):
        raise DataError(
            "the teacher's text_encoder projects its output, and the SD3 layout has no place for that projection; "
            "take single-file out of export.forms"
        )
    return renamed


def open_clip_to_original(weights: Weights) -> Weights:
    """SDXL's second text encoder as open_clip names it."""
    nested = clip_to_original(weights)
    projection = nested.pop("text_projection.weight")
    places = {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.final_layer_norm": "ln_final",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
    }
    fused = {}
    for number, layer in enumerate(list_children(nested, "text_model.encoder.layers")):
        block = f"transformer.resblocks.{number}"
        fused[f"{block}.attn.in_proj_"] = [f"{layer}.self_attn.{each}_proj" for each in "qkv"]
        places |= {
            f"{layer}.layer_norm1": f"{block}.ln_1",
            f"{layer}.layer_norm2": f"{block}.ln_2",
            f"{layer}.mlp.fc1": f"{block}.mlp.c_fc",
            f"{layer}.mlp.fc2": f"{block}.mlp.c_proj",
            f"{layer}.self_attn.out_proj": f"{block}.attn.out_proj",
        }
    return {**rename_modules(nested, places, fused), "text_projection": projection.T}


def t5_to_original(weights: Weights) -> Weights:
    """SD3's third text encoder, under transformers' names; diffusers expects the tied tensor twice."""
    return {**weights, T5_TIE: weights["shared.weight"].clone()}


def mmdit_to_original(weights: Weights) -> Weights:
    """The transformer of SD3 and SD3.5. In the layout the modulations of the output and of the last context have shift
    before scale."""
    embedders = {"timestep_embedder": "t_embedder", "text_embedder": "y_embedder"}
    places = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        **{f"time_text_embed.{a}.linear_1": f"{b}.mlp.0" for a, b in embedders.items()},
        **{f"time_text_embed.{a}.linear_2": f"{b}.mlp.2" for a, b in embedders.items()},
    }
    fused, swapped = {}, {"norm_out.linear"}
    for number, block in enumerate(list_children(weights, "transformer_blocks")):
        x, context = (f"joint_blocks.{number}.{side}_block" for side in ("x", "context"))
        fused[f"{x}.attn.qkv."] = [f"{block}.attn.to_{each}" for each in "qkv"]
        fused[f"{context}.attn.qkv."] = [f"{block}.attn.add_{each}_proj" for each in "qkv"]
        if f"{block}.attn2.to_q.weight" in weights:
            fused[f"{x}.attn2.qkv."] = [f"{block}.attn2.to_{each}" for each in "qkv"]
        if f"{block}.attn.to_add_out.weight" not in weights:  # the context ends here
            swapped.add(f"{block}.norm1_context.linear")
        for attention in ("attn", "attn2"):
            places |= {
                f"{block}.{attention}.to_out.0": f"{x}.{attention}.proj",
                f"{block}.{attention}.norm_q": f"{x}.{attention}.ln_q",
                f"{block}.{attention}.norm_k": f"{x}.{attention}.ln_k",
            }
        places |= {
            f"{block}.attn.to_add_out": f"{context}.attn.proj",
            f"{block}.attn.norm_added_q": f"{context}.attn.ln_q",
            f"{block}.attn.norm_added_k": f"{context}.attn.ln_k",
            f"{block}.norm1.linear": f"{x}.adaLN_modulation.1",
            f"{block}.norm1_context.linear": f"{context}.adaLN_modulation.1",
            f"{block}.ff.net.0.proj": f"{x}.mlp.fc1",
            f"{block}.ff.net.2": f"{x}.mlp.fc2",
            f"{block}.ff_context.net.0.proj": f"{context}.mlp.fc1",
            f"{block}.ff_context.net.2": f"{context}.mlp.fc2",
        }
    swaps = {key for key in weights if key.rpartition(".")[0] in swapped}
    halves = {key: torch.cat(weights[key].chunk(2)[::-1]) for key in swaps}
    return rename_modules({**weights, **halves}, places, fused)


@dataclass(frozen=True)
class Layout:
    """Where the weights of one part lie in a file: the prefix of their keys, and the map to the rest of the keys."""

    prefix: str
    rename: Callable[[Weights], Weights]


LAYOUTS: dict[str, dict[str, Layout]] = {  # family -> part; the network comes first
    "sdxl": {
        "unet": Layout("model.diffusion_model.", unet_to_original),
        "vae": Layout("first_stage_model.", vae_to_original),
        "text_encoder": Layout("conditioner.embedders.0.transformer.", clip_to_original),
        "text_encoder_2": Layout("conditioner.embedders.1.model.", open_clip_to_original),
    },
    "sd3": {
        "transformer": Layout("model.diffusion_model.", mmdit_to_original),
        "vae": Layout("first_stage_model.", vae_to_original),
        "text_encoder": Layout("text_encoders.clip_l.transformer.", clip_unprojected_to_original),
        "text_encoder_2": Layout("text_encoders.clip_g.transformer.", clip_to_original),
        "text_encoder_3": Layout("text_encoders.t5xxl.transformer.", t5_to_original),
    },
}


def _resnet(ours: str, theirs: str) -> Places:
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in RESNET.items()}


def _vae_resnet(ours: str, theirs: str) -> Places:
    names = {**{name: name for name in ("norm1", "conv1", "norm2", "conv2")}, "conv_shortcut": "nin_shortcut"}
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in names.items()}
