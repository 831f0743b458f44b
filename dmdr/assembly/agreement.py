"""Whether a frozen base in fewer bits still shows the student the way: measured before a training stage begins.

The gradient of distribution matching is a difference of two scores, so the rounding of each weighs more than in an
image. We take it twice on the same samples, before and after the base is quantized, and compare the directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dmdr.assembly.stage_config import StageConfig
from dmdr.backbones.protocol import Backbone, Conditioning, Item
from dmdr.config.guidance import take_middle
from dmdr.config.run import Config, FrozenBase
from dmdr.config.training import Training
from dmdr.dyna import real_scale
from dmdr.errors import ConfigError
from dmdr.kernels.frozen_base import quantize
from dmdr.noise import noise_for
from dmdr.promptset.prompts import Prompts
from dmdr.shared_base import SharedBase

PROBED = 8  # samples on which a frozen base in fewer bits is compared with what it was
LEVELS = (0.2, 0.8)  # renoise levels between which the samples stand; nearer to the ends the direction says little
LOWEST = 0.9  # mean cosine: with less, more than two fifths of a step lead elsewhere


@dataclass(frozen=True)
class Probe:
    """On what the directions are compared.

    c, unconditional: of B prompts, and of the empty one, a batch of one. time: of the student's first step.
    guidance_scale: of the real score.
    """

    c: Conditioning
    unconditional: Conditioning
    time: float
    guidance_scale: float
    seed: int
    training: Training


def build_probe(
    config: Config, stage: StageConfig, backbone: Backbone, prompts: Prompts, empty_prompt: Item
) -> Probe | None:
    """On what a frozen base in fewer bits is compared with what it was: a few training prompts; None: it is as it was.

    empty_prompt: the conditioning of the empty prompt.
    """
    if config.frozen_base is None:
        return None
    count = min(PROBED, len(prompts), config.execution.micro_batch_size or PROBED)
    return Probe(
        c=backbone.collate(prompts.items(list(range(count)))),
        unconditional=backbone.collate([empty_prompt]),
        time=float(backbone.student_times(config.student.few_steps)[0]),
        guidance_scale=take_middle(config.teacher.guidance_scale),
        seed=config.seed,
        training=stage.training,
    )


def quantize_checked(base: SharedBase, kind: FrozenBase, probe: Probe) -> float:
    """Quantize the frozen base; return the mean cosine between the gradients before and after it.

    Raises:
        ConfigError: it is below LOWEST.
    """
    count = len(next(iter(probe.c.values())))
    shape = (count, *base.backbone.latent_shape)
    device = base.backbone.network.device
    noise, renoise = (noise_for(probe.seed, "agreement", name, shape=shape).to(device) for name in ("first", "renoise"))
    with torch.no_grad():
        sample = base.student(noise, torch.full((count,), probe.time, device=device), probe.c)
    before = find_direction(base, probe, sample, renoise)
    quantize(base.backbone.network, kind)
    after = find_direction(base, probe, sample, renoise)
    cosine = float(torch.nn.functional.cosine_similarity(before.flatten(1), after.flatten(1)).mean())
    if not cosine >= LOWEST:
        raise ConfigError(
            f"frozen_base {kind} turns the gradient of distribution matching: its cosine with that of bfloat16 is "
            f"{cosine:.3f} on {count} samples, and {LOWEST} is the least that trains; drop frozen_base"
            + (", or set fp8" if kind == "nf4" else "")
        )
    return cosine


@torch.no_grad()
def find_direction(base: SharedBase, probe: Probe, sample: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """x0_fake - x0_real (B, C, H, W) of samples at levels spread over LEVELS: which way the student would go.

    Without CFG the two are equal until the fake score has learned something. Then x0_real alone shows it the way.
    """
    path = base.backbone.path
    t = torch.linspace(*LEVELS, len(sample), device=sample.device).to(sample)
    x_t = path.renoise(sample, noise, t)
    scales = {"guidance_scale": probe.guidance_scale, "lora_scale": real_scale(0, probe.training.dynamic)}
    x0_real = base.real_x0(x_t, t, probe.c, probe.unconditional, **scales)
    x0_fake = path.to_x0(x_t, base.fake(x_t, t, probe.c), t)
    has_cfg = probe.guidance_scale != 1
    return ((x0_fake if has_cfg else sample) - x0_real).float()
