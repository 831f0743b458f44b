"""What a log shows of a stage: how far it is, and the time left for it and for the run."""

from __future__ import annotations

import pytest

from dmdr.config.load import load_config
from dmdr.metrics.scorecard import Model
from stages.runtime import progress as module
from stages.runtime.progress import Progress, format_seconds
from stages.runtime.remaining import count_evaluations, count_forwards, count_later_steps, count_update


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the progress reads: its last number."""
    times = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: times[-1])
    return times


def test_a_log_tells_the_time_left_for_the_stage_and_for_the_run(clock: list[float], capsys: pytest.CaptureFixture):
    progress = Progress("joint", place="stage 3 of 5")
    progress.expect(later=50)  # as much work as 50 of these steps
    for done in range(21):
        progress.update(done, 20, loss=0.5)
        clock.append(clock[-1] + 6)
    first, *_, last = lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10, "at most a line in ten seconds"
    assert first == "joint 2/20, loss 0.5, 2 min left, stage 3 of 5, 7 min left for the run"
    assert last == "joint 20/20, loss 0.5, stage 3 of 5, 5 min left for the run"


def test_a_resumed_stage_counts_only_its_own_pace(clock: list[float], capsys: pytest.CaptureFixture):
    progress = Progress("joint")
    progress.update(500, 600)
    clock.append(clock[-1] + 20)
    progress.update(510, 600)
    assert capsys.readouterr().err == "joint 510/600, 3 min left\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.4, "4 s"), (99, "99 s"), (150, "2 min"), (5400, "90 min"), (9000, "2.5 h")]
)
def test_a_duration_reads_as_people_say_it(seconds: float, text: str):
    assert format_seconds(seconds) == text


def test_the_work_of_a_run(tiny_config):
    """Twice the updates, images or steps are twice the work; guidance doubles a teacher's."""
    config = load_config(tiny_config())
    more = load_config(tiny_config(teacher=config.teacher.model_dump() | {"steps": 6}))
    assert count_forwards(config, "evaluate", 6) == 6 * (2 + 2 * 3 + 2 + 2)
    assert count_forwards(more, "evaluate", 6) == 6 * (2 + 2 * 6 + 2 + 2)
    assert count_evaluations(config)["teacher"] == Model("teacher", 3, 3.0).nfe
    step = count_update(config, config.joint)
    assert count_forwards(config, "joint", 6) == config.joint.updates * step
    assert count_later_steps(config, "joint", step=step, prompts=6) == pytest.approx(6 * 12 / step)
    assert count_later_steps(config, "cold_start", step=step, prompts=6) == pytest.approx(
        config.joint.updates + 6 * 12 / step
    )
    assert count_later_steps(config, "evaluate", step=1, prompts=6) == 0
