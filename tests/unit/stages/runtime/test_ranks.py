"""A stage as several processes: the exit code that it ends with."""

from __future__ import annotations

import pytest

from stages.runtime import ranks


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0),
        ([75, 75], 75),
        ([70, 65], 65),
        ([75, 74], 74),
        ([-9, 70], 70),
        ([-9, 75], 137),
        ([-15, -9], 137),
        ([0, 75], 75),
        ([-15, 75], 75),
        ([-15, 0], 143),
    ],
)
def test_the_exit_code_that_tells_most(codes, code):
    assert ranks.pick_exit_code(codes) == code
