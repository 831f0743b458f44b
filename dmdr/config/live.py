"""What an open training stage shows while it runs, beside its checkpoints. No torch."""

from __future__ import annotations

from pydantic import Field

from dmdr.config.section import Positive, Section


class Live(Section):
    """Curves, images and alarms of an open training stage, in the store, for `dmdr watch`. Losing them does no harm.

    They are written in the background and are no part of a result.
    """

    metrics_every: Positive = 5  # student updates between two writes of curves, time left, memory and cost
    # student updates between two strips, which show what the student draws; null: no strips. A strip costs
    # `prompts` images of the student
    strips_every: Positive | None = 25
    prompts: int = Field(
        6, ge=1, le=24
    )  # images of a strip: of training prompts, evenly spaced, always from the same noise
    side: int = Field(256, ge=32, le=1024)  # pixels; larger images are reduced to it
    keep_strips: int = Field(64, ge=2)  # of a stage; where there are more, every second one goes
    # beside each strip, what the two scores make of its images, renoised to the middle of the path: x0_real, x0_fake
    scores: bool = False
