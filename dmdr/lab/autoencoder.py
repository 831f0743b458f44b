"""Train the lab's AutoencoderKL: 32x32x3 images to 8x8x8 latents, with an L1 loss and a KL term.

The KL term is strong enough that the decoder draws crisp shapes from imprecise latents. A teacher needs that, because a
small network learns where shapes are and which long before it learns to draw their edges.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from dmdr.lab.fitting import Log, Schedule, iterate_schedule


class VaeRecipe(Schedule):
    """The recipe of the autoencoder. kl: weight of the KL term."""

    kl: float


def build_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder of the lab's size."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        sample_size=32,
        block_out_channels=(16, 32, 32),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def train_vae(images: torch.Tensor, recipe: VaeRecipe, log: Log) -> AutoencoderKL:
    """Train the autoencoder. Its shift and scale give the active latent channels zero mean and unit variance.

    images: (R, 3, 32, 32) uint8.
    """
    vae = build_autoencoder()
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0.0, fused=True)
    for step, rate, indices in iterate_schedule(recipe, len(images)):
        optimizer.param_groups[0]["lr"] = rate
        pixels = images[indices].float() / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
        loss = F.l1_loss(vae.decode(posterior.sample()).sample, pixels) + recipe["kl"] * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            log(f"vae {step}/{recipe['steps']} loss {loss.item():.4f}")
    means = encode_images(vae.eval(), images[:512])
    spread = means.std(dim=(0, 2, 3))
    active = means[:, spread > 0.25 * spread.max()]  # the KL term leaves some channels without information
    vae.register_to_config(shift_factor=float(active.mean()), scaling_factor=float(1 / active.std()))
    return vae


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Means of the latents (R, 8, 8, 8) of images (R, 3, 32, 32) uint8, neither shifted nor scaled."""
    return torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.mode() for part in images.split(256)])
