"""What a resumed stage makes of the files that earlier attempts left."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dmdr.config.live import Live
from stages.live.images import encode_strip, split_strip
from stages.live.layout import BLOCK
from stages.live.read import LiveReader
from stages.live.writer import Writer

ROWS = [{"update": n, "loss_dm": n / 7} for n in range(250)]


def read(store: Path) -> LiveReader:
    return LiveReader(str(store), "tiny", "joint")


def test_blocks_whose_end_was_lost_are_written_again(tmp_path):
    live = tmp_path / "tiny/joint/live"
    first = Writer(str(live), Live())
    first.times = {n: 1000.0 + n for n in range(250)}
    first.resume([], 0, [])
    for number in range(3):
        first.write_block(number, ROWS[number * BLOCK : (number + 1) * BLOCK])
    (live / "rows-000000.jsonl").unlink()  # the store was away
    lines = (live / "rows-000001.jsonl").read_text().splitlines(keepends=True)
    (live / "rows-000001.jsonl").write_text("".join(lines[:90]))  # the attempt was killed
    again = Writer(str(live), Live())
    again.resume(ROWS[:230], 230, [])
    assert list(read(tmp_path).read().rows) == ROWS[:230]
    again.write_block(2, ROWS[200:250])
    assert list(read(tmp_path).read().rows) == ROWS
    times = [json.loads(line)["at"] for line in (live / "rows-000001.jsonl").read_text().splitlines()]
    assert times[:90] == [1100.0 + n for n in range(90)] and times[90:] == [None] * 10


def test_a_number_that_is_none_is_null_on_disk_and_stays_a_gap(tmp_path):
    Writer(str(tmp_path / "tiny/joint/live"), Live()).write_block(0, [{"update": 0, "loss_dm": float("nan")}])
    assert read(tmp_path).read().rows == ({"update": 0, "loss_dm": None},)


def test_strips_come_back_as_they_were_drawn(tmp_path):
    rng = np.random.default_rng(0)
    tiny, large = (rng.integers(0, 255, (3, side, side, 3), dtype=np.uint8) for side in (16, 320))
    assert (np.stack(split_strip(encode_strip(tiny, 256).data, 3)) == tiny).all()
    assert [image.shape for image in split_strip(encode_strip(large, 256).data, 3)] == [(256, 256, 3)] * 3
    writer = Writer(str(tmp_path / "tiny/joint/live"), Live(keep_strips=3, strips_every=5))
    writer.resume([], 0, ["a", "b", "c"])
    for update in range(0, 65, 5):
        writer.write_strip("update", update, tiny)
        writer.write_strip("fake", update, tiny)
    series = read(tmp_path).read()
    assert series.strips == (0, 40, 60)
    names = {path.name for path in (tmp_path / "tiny/joint/live/strips").glob("*-*.png")}
    assert names == {f"{kind}-{update:08d}.png" for kind in ("update", "fake") for update in (0, 40, 60)}
