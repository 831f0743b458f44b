"""DMD and RL at once, from the student of the cold start (DMDR, 3.2)."""

from __future__ import annotations

from dmdr.backbones import Backbone
from dmdr.rl.refl import ReFL
from stages import Context
from stages.training import fit


def run(context: Context) -> dict:
    """Writes the final student: weights, EMA, fake score, metrics.jsonl; raises as `fit` does.

    Without `joint.rl` it is distillation only (DMDR, Table 5).
    """
    joint = context.config.joint

    def refl(backbone: Backbone) -> tuple[ReFL, float]:
        return ReFL(joint.rl, backbone), joint.rl.weight

    return fit(context, "joint", joint, start=context.input("cold_start"), rl=refl if joint.rl else None)
