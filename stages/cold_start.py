"""Distribution matching, made dynamic by DynaDG and DynaRS, from the teacher's weights (DMDR, 3.3).

With `rl` the reward acts from the beginning: a reward-tilted cold start (`dmdr.config.rl`).
"""

from __future__ import annotations

from dmdr.train import train
from stages.runtime.context import Context
from stages.training import start_session


def run(context: Context) -> dict[str, object]:
    """Write the student after cold start: weights, EMA, fake score, metrics.jsonl.

    Raises:
        ConfigError, DataError: as `start_session`.
        NonFinite: training diverged.
        RewardUnavailable: a reward in another process stayed away; a checkpoint holds everything done.
        Stopped: the stage was told to stop; a checkpoint holds everything done.
    """
    session = start_session(context, "cold_start")
    with session.live, session.settled():
        for row in train(session.run, session.state, stop=session.stop):
            session.record(row)
    return session.finish()
