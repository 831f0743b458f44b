"""Distribution matching alone, made dynamic by DynaDG and DynaRS, from the teacher's weights (DMDR, 3.3)."""

from __future__ import annotations

from stages.runtime.context import Context
from stages.training import train_student


def run(context: Context) -> dict:
    """Writes the student after cold start: weights, EMA, fake score, metrics.jsonl; raises as `fit` does."""
    return train_student(context, "cold_start", context.config.cold_start)
