"""What a watched stage says of itself when it has ended."""

from __future__ import annotations

from dataclasses import asdict

import torch

from dmdr.config.watch import Watch
from dmdr.state import TrainState
from dmdr.watch.alarms import best_look, find_alarms, list_kept
from dmdr.watch.figures import FIGURES, TEACHER, select_looks


def exported_ema(state: TrainState) -> tuple[dict[str, torch.Tensor], int]:
    """The EMA that a stage writes, watched or not, and its update."""
    if not state.best_ema:
        return state.ema, state.update
    top = best_look(select_looks(state.rows))
    assert top is not None, "an EMA is only kept with its look"
    return state.best_ema, int(top["update"])


def list_students(watch: Watch | None, state: TrainState) -> list[int]:
    """The updates whose students are sealed beside the exported one, the best first."""
    return [] if watch is None else list_kept(watch, select_looks(state.rows))[: watch.keep_best]


def summarize(watch: Watch, state: TrainState, stage: str, *, has_rl: bool) -> dict[str, object]:
    """What the record says of a watched stage that has ended, as JSON. stage: its name; has_rl: whether it has RL."""
    known = ("update", *FIGURES)
    looks = [
        {key: row[key] for key in row if key in known or key.startswith(TEACHER)} for row in select_looks(state.rows)
    ]
    alarms = find_alarms(watch, looks)
    summary: dict[str, object] = {
        "reward": watch.reward,
        "export": watch.export,
        "exported": exported_ema(state)[1],
        "last": looks[-1],
        "best": best_look(looks),
        "alarms": [asdict(alarm) for alarm in alarms],
    }
    if watch.keep_best:
        summary["kept"] = list_students(watch, state)
    if watch.recovers:
        summary["recoveries"] = [recovery.model_dump() for recovery in state.recoveries]
    if watch.on_alarm == "stop" and alarms:
        why = "; ".join(alarm.line(watch, stage, has_rl=has_rl) for alarm in alarms)
        summary["stopped"] = {"after_update": state.update, "why": why}
    elif state.has_ended:
        summary["stopped"] = {"after_update": state.update, "why": state.recoveries[-1].why}
    return summary
