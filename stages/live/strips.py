"""Draw the strips of a training stage: always the same prompts and noise, by the student's EMA and by the teacher.

1. Prompts are those of training: evaluation prompts decide later, and nobody may have chosen a setting by their images.
2. Noise is a function of seed and prompt, and the EMA takes the student's place only while it draws, so a training with
   strips ends with the same bits as one without.
3. All ranks draw, each its share: sharded networks run on all of them together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dmdr import distributed
from dmdr.assembly.run import TeacherSampler
from dmdr.assembly.stage_config import StageConfig
from dmdr.backbones.protocol import Conditioning
from dmdr.config.live import Live
from dmdr.config.run import Config
from dmdr.draws import Run
from dmdr.dyna import real_scale
from dmdr.noise import noise_for
from dmdr.promptset import spread_evenly
from dmdr.shared_base import SharedBase
from dmdr.state import TrainState
from dmdr.update import roll_out

MIDDLE = 0.5  # the level at which the two scores are shown


@dataclass(frozen=True)
class Images:
    """What was drawn after an update, each (P, H, W, 3) uint8. real, fake: None unless asked for."""

    student: np.ndarray
    real: np.ndarray | None = None
    fake: np.ndarray | None = None


class StripDrawer:
    """Draws the strips of one training stage."""

    def __init__(self, config: Config, live: Live, stage: StageConfig, run: Run) -> None:
        self.config, self.live, self.stage, self.run = config, live, stage, run
        self.base: SharedBase = run.base
        self.indices = spread_evenly(len(run.prompts), live.prompts)
        self.eta = config.student.few_steps.drawn_eta
        most = config.execution.micro_batch_size or stage.training.batch_size
        share = distributed.largest_share(len(self.indices))
        begin = distributed.rank() * share
        # The last rank may lack some. It draws others again, which are dropped.
        self._mine = (self.indices[begin : begin + share] + self.indices * share)[:share]
        self._parts = [self._mine[start : start + most] for start in range(0, share, most)]

    def list_prompts(self) -> list[str]:
        """Whose images a strip shows."""
        return [record["prompt"] for record in self.run.prompts.records(self.indices)]

    @torch.no_grad()
    def draw_student(self, state: TrainState) -> Images:
        """What the student's EMA draws, and what the scores make of it where the config asks for that."""
        with state.averaged():
            x0 = [self._roll_out(part) for part in self._parts]
        student = self._decode(x0)
        if not self.live.scores or not self.run.distribution_matching:
            return Images(student)
        scale = real_scale(state.update, self.stage.training.dynamic)
        pairs = [self._predict(part, x0_part, scale) for part, x0_part in zip(self._parts, x0, strict=True)]
        return Images(student, self._decode([real for real, _ in pairs]), self._decode([fake for _, fake in pairs]))

    @torch.no_grad()
    def draw_teacher(self) -> np.ndarray:
        """What the untouched teacher draws from the same prompts and noise, as evaluation has it."""
        teacher = TeacherSampler(self.config, self.base, self.run.unconditional)

        def draw(part: list[int]) -> torch.Tensor:
            return teacher.draw(self._collate(part), self._noises(part)[0])

        return self._decode([draw(part) for part in self._parts])

    def _roll_out(self, part: list[int]) -> torch.Tensor:
        states = roll_out(self.base, self._collate(part), times=self.run.times, noises=self._noises(part), eta=self.eta)
        return states.x0[-1]

    def _predict(self, part: list[int], x0: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """x0_real and x0_fake of x0, renoised to the middle of the path."""
        path, c = self.base.backbone.path, self._collate(part)
        t = torch.full((len(x0),), MIDDLE).to(x0)
        noises = [noise_for(self.run.seed, "live renoise", n, shape=self._shape[1:]) for n in part]
        x_t = path.renoise(x0, torch.stack(noises).to(x0), t)
        guidance = self.config.teacher.guidance
        real = self.base.real_x0(x_t, t, c, self.run.unconditional, guidance_scale=guidance, lora_scale=scale)
        return real, path.to_x0(x_t, self.base.fake(x_t, t, c), t)

    def _collate(self, part: list[int]) -> Conditioning:
        return self.base.backbone.collate(self.run.prompts.items(part))

    @property
    def _shape(self) -> tuple[int, ...]:
        return (len(self.run.times) - 1, *self.base.backbone.latent_shape)

    def _noises(self, part: list[int]) -> torch.Tensor:
        """(N, B, C, H, W), on the networks' device."""
        noises = [noise_for(self.run.seed, "live", n, shape=self._shape) for n in part]
        return torch.stack(noises, dim=1).to(self.run.times)

    def _reduce(self, images: torch.Tensor) -> torch.Tensor:
        """At most `side` pixels a side: many of them may wait in memory for a store that is away."""
        side = self.live.side
        if max(images.shape[-2:]) <= side:
            return images
        factor = side / max(images.shape[-2:])
        return torch.nn.functional.interpolate(images, scale_factor=factor, mode="bilinear", antialias=True)

    def _decode(self, x0: list[torch.Tensor]) -> np.ndarray:
        """The images of all ranks, (P, H, W, 3) uint8. What is not a number is black."""
        images = torch.cat([self._reduce(self.base.backbone.decode(part).float()) for part in x0])
        pixels = (images.nan_to_num(0.0, 0.0, 0.0).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        whole = distributed.all_gather(pixels)[: len(self.indices)]
        return whole.permute(0, 2, 3, 1).contiguous().numpy()
