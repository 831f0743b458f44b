"""The test kit of a reward: does it keep what the protocol promises? Each check returns what it found.

1. Images are plain, noise, and smooth colours; their sides differ, because a reward must take any.
2. The gradient is compared with finite differences along itself: the slope there is its length, |g|. A reward that is
   rounded inside (bfloat16) needs a larger step, so the best of several counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dmdr.config.prompt_record import PromptRecord
from dmdr.errors import DataError
from dmdr.rewards.own import Range, check_scores
from dmdr.rewards.protocol import Reward

STEPS = (0.003, 0.01, 0.03, 0.1)  # lengths of finite differences, times the root of the number of pixels / 10
LARGEST_ERROR = 0.05  # of the slope
CLOSE = 1e-4  # times the spread of the scores: what may differ between an image alone and in a batch
Check = Callable[[], str]


@dataclass(frozen=True)
class RewardKit:
    """The checks of one reward.

    records: of prompts that it can score, at least two. size: (height, width) of the images. span: the lowest and the
    highest score that it promises; None: no bounds.
    """

    reward: Reward
    records: Sequence[PromptRecord]
    size: tuple[int, int]
    device: str
    span: Range | None = None

    def list_checks(self) -> dict[str, Check]:
        """Name -> check. A check raises DataError where the reward breaks a promise."""
        return {
            "shapes": self.check_shapes,
            "numbers": self.check_numbers,
            "range": self.check_range,
            "repeat": self.check_repeat,
            "batch": self.check_batch,
            "inputs": self.check_inputs,
            "prompts": self.check_prompts,
            "gradient": self.check_gradient,
        }

    def score(self, images: torch.Tensor, records: Sequence[PromptRecord]) -> torch.Tensor:
        """The scores (B,) of images under the prompts of B records."""
        scores = self.reward(images, [record["prompt"] for record in records], records)
        return check_scores(scores, len(images), f"the reward {self.reward.name}")

    @torch.no_grad()
    def check_shapes(self) -> str:
        """One score for each image, for batches of one and of three, and for images that are not square."""
        height, width = self.size
        sizes = [(height, width)] if height == width == 32 else [(height, width), (height, width // 2 * 3)]
        for size in sizes:  # the lab's checker takes 32x32 alone
            for count in (1, 3):
                self.score(_draw_smooth(count, size).to(self.device), self._take(count))
        return f"one score for each image of a batch, at {' and '.join(f'{h}x{w}' for h, w in sizes)}"

    @torch.no_grad()
    def check_numbers(self) -> str:
        """Black, white, grey and noise have scores, too."""
        plain = [torch.full((1, 3, *self.size), value) for value in (0.0, 0.5, 1.0)]
        noise = torch.rand(1, 3, *self.size, generator=torch.Generator().manual_seed(1))
        scores = self.score(torch.cat([*plain, noise]).to(self.device), self._take(4))
        return f"black, grey, white, noise: {', '.join(f'{each:.4g}' for each in scores.tolist())}"

    @torch.no_grad()
    def check_range(self) -> str:
        """The scores of sixteen images lie in the range."""
        scores = self._score_many()
        found = f"{float(scores.min()):.4g} to {float(scores.max()):.4g}"
        if self.span is None:
            return f"found {found}; it promises no bounds"
        low, high = self.span
        if bool((scores < low).any()) or bool((scores > high).any()):
            raise DataError(f"scores are {found}, outside of its range {low:g} to {high:g}; correct either")
        return f"found {found}, within {low:g} to {high:g}"

    @torch.no_grad()
    def check_repeat(self) -> str:
        """The same call gives the same bits."""
        first, again = self._score_many(), self._score_many()
        if not torch.equal(first, again):
            raise DataError(
                f"the same images scored twice differ by up to {float((first - again).abs().max()):.3g}; a resumed run "
                "could not end with the same bits: fix its seed, or turn off what is random in it"
            )
        return "the same images have the same scores, bit for bit"

    @torch.no_grad()
    def check_batch(self) -> str:
        """An image's score does not depend on the other images of its batch."""
        images, records = _draw_smooth(4, self.size).to(self.device), self._take(4)
        together = self.score(images, records)
        alone = torch.cat([self.score(images[n : n + 1], records[n : n + 1]) for n in range(4)])
        turned = self.score(images.flip(0), records[::-1]).flip(0)
        difference = float(torch.stack([together - alone, together - turned]).abs().max())
        if difference > CLOSE * max(1.0, float(together.abs().max())):
            raise DataError(
                f"an image's score differs by {difference:.3g} with the other images of its batch; score each by itself"
            )
        return f"alone and in a batch: the same within {difference:.1g}"

    @torch.no_grad()
    def check_inputs(self) -> str:
        """The images are as they were."""
        images = _draw_smooth(2, self.size).to(self.device)
        before = images.clone()
        self.score(images, self._take(2))
        if not torch.equal(images, before):
            raise DataError("it changes the images that it is given, which others still need; work on a copy")
        return "the images are left as they were"

    @torch.no_grad()
    def check_prompts(self) -> str:
        """Whether it reads prompts, for the user to compare with what he means."""
        images, records = _draw_smooth(1, self.size).to(self.device), self._take(2)
        first, second = (float(self.score(images, [record])) for record in records)
        return f"one image under two prompts: {first:.4g} and {second:.4g}"

    def check_gradient(self) -> str:
        """The gradient of a differentiable reward is the slope of its scores."""
        if not self.reward.differentiable:
            return "none; ReFL cannot train on it, GRPO and DPO can"
        noise = torch.rand(2, 3, *self.size, generator=torch.Generator().manual_seed(3))  # no two neighbours are equal
        images = (0.3 + 0.2 * _draw_smooth(2, self.size) + 0.2 * noise).to(self.device).requires_grad_(True)
        scores = self.score(images, self._take(2))
        if not scores.requires_grad:
            raise DataError("it says differentiable, but no gradient reaches the images; stay in torch, or say False")
        (gradient,) = torch.autograd.grad(scores.sum(), images, allow_unused=True)
        if gradient is None or not gradient.isfinite().all():
            raise DataError("it says differentiable, but its gradient is not a number; mend it, or say False")
        length = float(gradient.double().norm())
        if length == 0:
            raise DataError("its gradient is 0 everywhere for these images: nothing can be learnt from it; mend it")
        error, step = min(self._measure_slopes(images.detach(), gradient / length, length))
        if error > LARGEST_ERROR:
            raise DataError(
                f"its gradient is not the slope of its scores: {error:.0%} apart at best, at a step of {step:.2g}; "
                "check detach, rounding and no_grad in it"
            )
        return f"its slope within {error:.1%} of finite differences"

    @torch.no_grad()
    def _measure_slopes(
        self, images: torch.Tensor, direction: torch.Tensor, length: float
    ) -> Iterator[tuple[float, float]]:
        """(error, step) of each finite difference along a direction of length 1, where the slope has to be `length`."""
        unit = images.numel() ** 0.5 / 10
        for step in (each * unit for each in STEPS):
            reach = float((step * direction).abs().max())
            step = step * min(1.0, 0.3 / reach)  # inside [0, 1]
            above, below = (self.score(images + sign * step * direction, self._take(2)) for sign in (1, -1))
            slope = float((above - below).double().sum()) / (2 * step)
            yield abs(slope / length - 1), step

    def _take(self, count: int) -> list[PromptRecord]:
        return [self.records[n % len(self.records)] for n in range(count)]

    def _score_many(self) -> torch.Tensor:
        images = torch.cat(
            [_draw_smooth(8, self.size), torch.rand(8, 3, *self.size, generator=torch.Generator().manual_seed(2))]
        )
        return self.score(images.to(self.device), self._take(16))


def _draw_smooth(count: int, size: tuple[int, int]) -> torch.Tensor:
    """Images (count, 3, H, W) in [0, 1] of smooth colours, always the same."""
    small = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(count))
    return F.interpolate(small, size, mode="bicubic", align_corners=False).clamp(0, 1)
