"""What ReFL's reward sees a latent through: the teacher's decoder, whole or in tiles, or a small one distilled from it.

1. Tiles alone save no memory where a gradient is wanted, because all of them stay in the graph: each is computed again
   in the backward pass, so that one tile's activations are held at a time. Norms and attention see one tile then, not
   the image; diffusers blends the seams. It is for large latents: on the lab's, of 8 x 8, the tiles of 4 x 4 see so
   little that the gradient of lab-conv is at right angles to the whole decoder's (cosine -0.05).
2. A tiny decoder (AutoencoderTiny, as TAESD) draws nearly the same image with another gradient. How far apart the two
   are is measured by `python -m dmdr.rl.decoders`; watch, evaluation and export always use the teacher's own.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dmdr.errors import DataError, InputMissing
from dmdr.teacher import hub

if TYPE_CHECKING:
    import torch

    from dmdr.backbones.protocol import Backbone
    from dmdr.config.run import ReFL

    Decoder = Callable[[torch.Tensor], torch.Tensor]  # latents (B, C, H, W) -> images (B, 3, h, w) in [0, 1]

KEY = "joint.rl.tiny_decoder"
FILES = ("config.json", "*.safetensors")


def find_tiny_decoder(address: str) -> Path:
    """The folder of an AutoencoderTiny that a folder or hub:OWNER/NAME@COMMIT stands for.

    Raises:
        ConfigError: a hub's is not pinned to a commit.
        InputMissing: there is none.
    """
    folder = hub.fetch(KEY, address, files=FILES) if hub.is_hub(address) else Path(address)
    if not (folder / "config.json").is_file():
        raise InputMissing(f"{KEY} {address} has no config.json; give the folder of an AutoencoderTiny, such as TAESD")
    return folder


def load_decoder(config: ReFL, backbone: Backbone) -> Decoder:
    """The decoder that a config asks for.

    Raises:
        ConfigError, InputMissing: as `resolve`.
        DataError: the tiny decoder is another kind of model, or does not fit the teacher.
    """
    if config.decoder == "tiled":
        return partial(decode_tiled, backbone)
    return load_tiny_decoder(config.tiny_decoder, backbone) if config.decoder == "tiny" else backbone.decode


def decode_tiled(backbone: Backbone, latents: torch.Tensor) -> torch.Tensor:
    """The teacher's decoder on tiles of half the latent's side, one at a time forward and backward."""
    import torch
    from torch.utils.checkpoint import checkpoint

    class Recomputed(torch.nn.Module):
        def __init__(self, decoder: torch.nn.Module) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, tile: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.decoder, tile, use_reentrant=False)

    vae = copy.copy(backbone.pipe.vae)  # the same weights; tiles and recomputation are this copy's alone
    vae._modules = {**vae._modules, "decoder": Recomputed(vae.decoder)}
    vae.enable_tiling()
    vae.tile_latent_min_size = max(1, latents.shape[-1] // 2)
    vae.tile_sample_min_size = vae.tile_latent_min_size * backbone.pipe.vae_scale_factor
    return backbone.decode_by(vae, latents)


def load_tiny_decoder(address: str, backbone: Backbone) -> Decoder:
    """A frozen AutoencoderTiny in the place of the teacher's decoder."""
    import torch
    from diffusers import AutoencoderTiny

    folder = find_tiny_decoder(address)
    try:
        vae = AutoencoderTiny.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise DataError(f"{KEY} {address} does not load as an AutoencoderTiny: {said}") from error
    vae = vae.to(backbone.network.device).requires_grad_(False).eval()
    channels, side = backbone.latent_shape[0], backbone.resolution
    if vae.config.latent_channels != channels:
        raise DataError(
            f"{KEY} {address} decodes latents of {vae.config.latent_channels} channels, the teacher's have {channels}; "
            "give the one made for this teacher's family"
        )
    with torch.no_grad():
        found = backbone.decode_by(vae, torch.zeros(1, *backbone.latent_shape, device=backbone.network.device))
    if tuple(found.shape[2:]) != (side, side):
        sizes = f"images of {found.shape[3]} x {found.shape[2]}, the teacher's are {side} x {side}"
        raise DataError(f"{KEY} {address} makes {sizes}; give the one made for this teacher's family")
    return partial(backbone.decode_by, vae)


def measure_gradient_cosine(
    reward: Callable[[torch.Tensor, list[str]], torch.Tensor], latents: torch.Tensor, prompts: list[str], *two: Decoder
) -> torch.Tensor:
    """cos (B,) between the reward's gradients in the latents (B, C, H, W) through the one decoder and the other."""
    import torch

    found = []
    for decoder in two:
        at = latents.detach().clone().requires_grad_(True)
        found.append(torch.autograd.grad(reward(decoder(at), prompts).sum(), at)[0].flatten(1).double())
    first, second = (each / each.norm(dim=1, keepdim=True) for each in found)  # however flat the reward is here
    return (first * second).sum(1)


def main() -> None:
    from dmdr.config.run import ReFL
    from dmdr.rewards.load import load_reward
    from dmdr.rollout import noise_for, sample_teacher
    from dmdr.teacher.load import find_teacher, load_teacher

    parser = argparse.ArgumentParser(prog="python -m dmdr.rl.decoders", description=measure_gradient_cosine.__doc__)
    parser.add_argument("--teacher", default="lab:flow", help="as teacher.path of a config")
    parser.add_argument("--tiny", help=f"as {KEY} of a config; without it, the tiled decoder is measured alone")
    parser.add_argument("--reward", default="lab-conv")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--steps", type=int, default=12, help="of the teacher, whose samples are the latents")
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    asked = parser.parse_args()
    prompts = asked.prompt or ["a red circle", "two blue squares", "a green triangle left of a yellow star"]
    backbone = load_teacher(find_teacher(asked.teacher))
    latents = sample_teacher(
        backbone,
        backbone.collate(backbone.encode(prompts)[0]),
        backbone.collate(backbone.encode([""])[0]),
        guidance_scale=asked.guidance_scale,
        times=backbone.teacher_times(asked.steps),
        noise=noise_for(0, "decoders", shape=(len(prompts), *backbone.latent_shape)),
    )
    reward = load_reward(asked.reward, "cpu")
    common = {"algorithm": "refl", "weight": 1.0, "rewards": {asked.reward: 1.0}}
    others = [ReFL(**common, decoder="tiled")]
    others += [ReFL(**common, decoder="tiny", tiny_decoder=asked.tiny)] if asked.tiny else []
    for config in others:
        cosines = measure_gradient_cosine(reward, latents, prompts, backbone.decode, load_decoder(config, backbone))
        shown = ", ".join(f"{each:.4f}" for each in cosines.tolist())
        print(f"{config.decoder}: cosine of the gradients of {asked.reward} {float(cosines.mean()):.4f} ({shown})")


if __name__ == "__main__":
    main()
