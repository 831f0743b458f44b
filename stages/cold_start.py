"""Distribution matching alone, made dynamic by DynaDG and DynaRS, from the teacher's weights (DMDR, 3.3)."""

from __future__ import annotations

from dmdr.train import train
from stages.runtime.context import Context
from stages.training import start_session


def run(context: Context) -> dict[str, object]:
    """Write the student after cold start: weights, EMA, fake score, metrics.jsonl.

    Raises:
        ConfigError, DataError: as `start_session`.
        NonFinite: training diverged.
        Stopped: the stage was told to stop; a checkpoint holds everything done.
    """
    session = start_session(context, "cold_start")
    with session.live:
        for row in train(session.run, session.state, stop=session.stop):
            session.record(row)
    return session.finish()
