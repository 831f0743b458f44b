"""The line of progress is read as it was written, whatever is before it; other lines are not progress."""

from __future__ import annotations

import random

import pytest

from dmdr.config.stages import STAGES
from stages.runtime.progress import Progress
from stages.runtime.progress_line import ProgressLine, read_line


def test_what_is_written_is_read(rng: random.Random):
    words = (
        "",
        "loss_dm 0.9176",
        "loss_fake 0.5, reward/hpsv2.1 0.31, 70 s left, stage 2 of 5, 3 min left for the run",
    )
    for stage in STAGES:
        for _ in range(20):
            total = rng.randrange(1, 10**7)
            line = ProgressLine(stage, rng.randrange(total + 1), total, rng.choice(words))
            assert read_line(str(line)) == line
            assert read_line(f"node 0: {line}") == line


def test_a_stage_writes_such_lines(capsys: pytest.CaptureFixture):
    progress = Progress("cold_start", place="stage 2 of 5")
    progress.expect(100.0)
    for done in (1, 1200):
        progress.update(done, 1200, loss_dm=0.25)
    line = read_line(capsys.readouterr().err.splitlines()[-1])
    assert line is not None and (line.stage, line.done, line.total) == ("cold_start", 1200, 1200)
    assert line.words.startswith("loss_dm 0.25, stage 2 of 5")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "joint: sealed at runs/one/joint after 115.2 s",
        "prompts: read 700, train 380, evaluation 320",
        "joint: run 3 of 4",
        "see https://example.org/1/2 for more",
        "Downloading 5/7 files",
    ],
)
def test_other_lines_are_not_progress(line: str):
    assert read_line(line) is None
