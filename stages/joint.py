"""DMD and RL at once, from the student of the cold start (DMDR, 3.2), or from the config's student.start.

Without `rl` it is distillation only, without `distribution_matching` RL only (DMDR, Table 5).
"""

from __future__ import annotations

from dmdr.train import train
from stages.runtime.context import Context
from stages.training import start_session


def run(context: Context) -> dict[str, object]:
    """Write the final student: weights, EMA, fake score, metrics.jsonl.

    Raises:
        ConfigError, DataError: as `start_session`.
        NonFinite: training diverged.
        RewardUnavailable: a reward in another process stayed away; a checkpoint holds everything done.
        Stopped: the stage was told to stop; a checkpoint holds everything done.
    """
    before = context.input("cold_start") if context.config.cold_start is not None else None
    session = start_session(context, "joint", before=before)
    with session.live, session.settled():
        for row in train(session.run, session.state, stop=session.stop):
            session.record(row)
    return session.finish()
