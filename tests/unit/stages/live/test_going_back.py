"""live/ of a stage that its watch takes back: a reader that looked before sees the course that goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dmdr.config.live import Live
from stages.live.layout import AlarmLine, Status
from stages.live.read import LiveReader
from stages.live.writer import Writer


def make_rows(course: int, count: int) -> list[dict[str, float]]:
    return [{"update": n, "loss_dm": course + n / 1000} for n in range(count)]


def make_strip(course: int) -> np.ndarray:
    return np.full((2, 16, 16, 3), 100 * course, dtype=np.uint8)


def make_status(course: int, step: int) -> Status:
    return Status(state="running", at=1.0, began=0.0, step=step, steps=500, update=step, updates=500, recoveries=course)


def test_a_reader_forgets_the_course_that_was_left(tmp_path: Path) -> None:
    writer = Writer(f"{tmp_path}/tiny/joint/live", Live(strips_every=100))
    reader = LiveReader(str(tmp_path), "tiny", "joint")
    writer.resume([], 0, ["a", "b"])
    for number in range(4):
        writer.write_block(number, make_rows(0, 350)[100 * number : 100 * number + 100])
    for update in (0, 100, 200, 300):
        writer.write_strip("update", update, make_strip(0))
    writer.write_alarm(AlarmLine(update=350, at=1.0, line="ALARM at update 350: goes back to update 150"))
    writer.write_alarm(AlarmLine(update=120, at=1.0, line="ALARM at update 120"))
    writer.write_status(make_status(0, 350))
    before = reader.read()
    assert list(before.rows) == make_rows(0, 350) and before.strips == (0, 100, 200, 300)
    assert all((image == 0).all() for image in reader.read_strip(200))

    writer.resume(make_rows(0, 150), 150, ["a", "b"], rung=350)
    later = [*make_rows(0, 150), *make_rows(1, 310)[150:]]
    for number in range(1, 4):
        writer.write_block(number, later[100 * number : 100 * number + 100])
    writer.write_strip("update", 200, make_strip(1))
    writer.write_status(make_status(1, 310))
    after = reader.read()
    assert list(after.rows) == later, "block 1, which was whole before, is read again"
    assert after.strips == (0, 100, 200) and all((image == 100).all() for image in reader.read_strip(200))
    assert sorted(alarm.update for alarm in after.alarms) == [120, 350], "the alarm that took it back stays"

    writer.resume(later[:120], 120, ["a", "b"])
    assert [alarm.update for alarm in reader.read().alarms] == [120], "a stage that is resumed rings again"
