"""DMD and RL at once, from the student of the cold start (DMDR, 3.2)."""

from __future__ import annotations

from dmdr.rl.algorithms import ALGORITHMS
from stages.runtime.context import Context
from stages.training import train_student


def run(context: Context) -> dict:
    """Writes the final student: weights, EMA, fake score, metrics.jsonl; raises as `fit` does.

    Without `joint.rl` it is distillation only, without `joint.distribution_matching` RL only (DMDR, Table 5).
    """
    joint = context.config.joint
    rl = None
    if joint.rl is not None:
        algorithm = ALGORITHMS[joint.rl.algorithm]
        rl = (lambda base: algorithm(joint.rl, base, context.config.weights)), joint.rl
    return train_student(
        context,
        "joint",
        joint,
        start=context.input("cold_start"),
        rl=rl,
        distribution_matching=joint.distribution_matching,
        watch=joint.watch,
    )
