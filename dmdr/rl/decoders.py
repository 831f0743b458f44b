"""Decode latents for ReFL's reward, by the teacher's decoder, whole or in tiles, or by a tiny one distilled from it.

1. Tiles alone save no memory if a gradient is computed, because the graph keeps the activations of all tiles. So each
   tile is computed again in the backward pass, and only one tile's activations are in memory at a time. Norms and
   attention then see one tile instead of the image; diffusers blends the seams. Tiles are for large latents: on the
   lab's latents of 8 x 8, tiles of 4 x 4 are so small that the gradient of lab-conv is orthogonal to the one through
   the whole decoder (cosine -0.05).
2. A tiny decoder (AutoencoderTiny, such as TAESD) draws nearly the same image but has another gradient.
   `python -m dmdr.rl.decoders` measures the cosine between the gradients. The watch, evaluation and export
   always use the teacher's own decoder.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial

import torch
from diffusers import AutoencoderTiny
from torch.utils.checkpoint import checkpoint

from dmdr.backbones.protocol import Backbone
from dmdr.config.rl import ReFL
from dmdr.errors import DataError
from dmdr.noise import noise_for
from dmdr.rewards.checkpoint import shorten
from dmdr.rewards.load import load_reward
from dmdr.rewards.protocol import Reward
from dmdr.rl.tiny_decoder import KEY, find_tiny_decoder
from dmdr.rollout import sample_teacher
from dmdr.teacher import hub
from dmdr.teacher.load import find_teacher, load_teacher

Decoder = Callable[[torch.Tensor], torch.Tensor]  # latents (B, C, H, W) -> images (B, 3, h, w) in [0, 1]
PROMPTS = ["a red circle", "two blue squares", "a green triangle left of a yellow star"]


def load_decoder(config: ReFL, backbone: Backbone) -> Decoder:
    """The decoder that a config names.

    Raises:
        ConfigError, InputMissing: as for `find_tiny_decoder`.
        DataError: the tiny decoder is another kind of model, or does not fit the teacher.
    """
    decoder: Decoder = backbone.decode
    if config.decoder == "tiled":
        decoder = partial(decode_tiled, backbone)
    if config.decoder == "tiny":
        assert config.tiny_decoder is not None, "the config refuses a tiny decoder without its address"
        decoder = load_tiny_decoder(config.tiny_decoder, backbone)
    if config.decoder_precision == "float32":
        return decoder
    if backbone.vae.device.type == "cuda":  # on a CPU, the alarm's images would have other bits
        backbone.vae.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # diffusers' wrapper hides it
    return partial(decode_rounded, decoder)


def decode_rounded(decoder: Decoder, latents: torch.Tensor) -> torch.Tensor:
    """Decode in bfloat16, under autocast, to images in the latents' own precision. On meta, the planner casts."""
    if latents.is_meta:
        return decoder(latents).to(latents.dtype)
    latents = latents.contiguous(memory_format=torch.channels_last)  # as convolutions in bfloat16 want them
    with torch.autocast(latents.device.type, torch.bfloat16):
        return decoder(latents).to(latents.dtype)


class RecomputedDecoder(torch.nn.Module):
    """A decoder that does not keep its activations, and computes them again in the backward pass."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tile: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.decoder, tile, use_reentrant=False)


def decode_tiled(backbone: Backbone, latents: torch.Tensor) -> torch.Tensor:
    """Decode by the teacher's decoder in tiles of half the latent's side, one at a time forward and backward."""
    vae = backbone.vae
    tiled = copy.deepcopy(vae, {id(part): part for part in vae.children()})  # shares all parts, and so the weights
    tiled.register_module("decoder", RecomputedDecoder(vae.decoder))
    tiled.enable_tiling()
    tiled.tile_latent_min_size = max(1, latents.shape[-1] // 2)
    tiled.tile_sample_min_size = tiled.tile_latent_min_size * backbone.pipe.vae_scale_factor
    return backbone.decode_by(tiled, latents)


def load_tiny_decoder(address: str, backbone: Backbone) -> Decoder:
    """A frozen AutoencoderTiny that takes the place of the teacher's decoder; errors as for `load_decoder`.

    On the meta device one on a hub is built without files: the published ones differ in their channels alone.
    """
    device = backbone.network.device
    if device.type == "meta" and hub.is_hub(address):
        loaded = AutoencoderTiny(latent_channels=backbone.latent_shape[0])
    else:
        loaded = _read_tiny_decoder(address)
    vae = loaded.to(device).requires_grad_(False).eval()
    channels, side = backbone.latent_shape[0], backbone.resolution
    if vae.config.latent_channels != channels:
        raise DataError(
            f"{KEY} {address} decodes latents of {vae.config.latent_channels} channels, but the teacher's have "
            f"{channels}; give the one made for this teacher's family"
        )
    with torch.no_grad():
        images = backbone.decode_by(vae, torch.zeros(1, *backbone.latent_shape, device=device))
    height, width = images.shape[2:]
    if (height, width) != (side, side):
        raise DataError(
            f"{KEY} {address} draws images of {width} x {height}, but the teacher's are {side} x {side}; give the one "
            "made for this teacher's family"
        )
    return partial(backbone.decode_by, vae)


def _read_tiny_decoder(address: str) -> AutoencoderTiny:
    folder = find_tiny_decoder(address)
    try:
        return AutoencoderTiny.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{KEY} {address} cannot be loaded as an AutoencoderTiny: {shorten(error)}") from error


def measure_gradient_cosine(
    reward: Reward, latents: torch.Tensor, prompts: list[str], first: Decoder, second: Decoder
) -> torch.Tensor:
    """The cosine (B,) between the reward's gradients in the latents (B, C, H, W) through the two decoders."""
    gradients = []
    for decoder in (first, second):
        leaf = latents.detach().clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(reward(decoder(leaf), prompts).sum(), leaf)
        gradients.append(gradient.flatten(1).double())
    one, other = (each / each.norm(dim=1, keepdim=True) for each in gradients)  # also where the reward is nearly flat
    return (one * other).sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dmdr.rl.decoders",
        description="Print the cosine between a reward's gradients through the teacher's decoder and through another.",
    )
    parser.add_argument("--teacher", default="lab:flow", help="as teacher.path of a config")
    parser.add_argument("--tiny", help=f"as {KEY} of a config; without it, only the tiled decoder is measured")
    parser.add_argument("--reward", default="lab-conv")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--steps", type=int, default=12, help="of the teacher, whose samples are the latents")
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    options = parser.parse_args()
    prompts = options.prompt or PROMPTS
    backbone = load_teacher(find_teacher(options.teacher))
    latents = sample_teacher(
        backbone,
        backbone.collate(backbone.encode(prompts)[0]),
        backbone.collate(backbone.encode([""])[0]),
        guidance_scale=options.guidance_scale,
        times=backbone.teacher_times(options.steps),
        noise=noise_for(0, "decoders", shape=(len(prompts), *backbone.latent_shape)),
    )
    reward = load_reward(options.reward, "cpu")
    shares = {options.reward: 1.0}
    configs = [ReFL(algorithm="refl", weight=1.0, rewards=shares, decoder="tiled")]
    if options.tiny:
        tiny = ReFL(algorithm="refl", weight=1.0, rewards=shares, decoder="tiny", tiny_decoder=options.tiny)
        configs.append(tiny)
    for config in configs:
        cosines = measure_gradient_cosine(reward, latents, prompts, backbone.decode, load_decoder(config, backbone))
        values = ", ".join(f"{each:.4f}" for each in cosines.tolist())
        print(f"{config.decoder}: cosine of the gradients of {options.reward} {float(cosines.mean()):.4f} ({values})")


if __name__ == "__main__":
    main()
