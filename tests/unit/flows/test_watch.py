"""What `dmdr watch` shows of a run: on a screen and on a page, while it goes on, and when it is silent."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from dmdr.config.load import load_config
from dmdr.errors import Stopped
from flows import cli
from flows.commands.watch import BARS, draw_sparkline, render_screen
from stages import cold_start
from stages.reports.live_page import render_live_page
from stages.reports.running import RunReader
from stages.store.address import open_place
from tests.support.html import Reader
from tests.support.trained_run import context_for, run_stage

LIVE = {"metrics_every": 1, "strips_every": 1, "prompts": 3}
PRICE = {"currency": "EUR", "hour": {"cpu": 36.0}}


@pytest.fixture
def store(tiny_config, tmp_path) -> Path:
    """A run that was stopped in its cold start, after two of three updates."""
    training = {
        "updates": 3,
        "batch_size": 2,
        "fake_updates": 2,
        "student": {"learning_rate": 1e-4},
        "fake_score": {"learning_rate": 2e-4},
    }
    execution = {"device": "cpu", "checkpoint_every": 1, "live": LIVE, "price": PRICE}
    config, store = load_config(tiny_config(cold_start=training, execution=execution)), tmp_path / "store"
    run_stage(config, store, "prompts")
    asked = iter(range(2))
    with pytest.raises(Stopped):
        cold_start.run(context_for(config, store, "cold_start", stop=lambda: next(asked, None) is None))
    return store


def test_a_run_is_seen_on_a_screen_and_on_a_page(store, tmp_path, capsys, monkeypatch):
    page = tmp_path / "pages/live.html"
    assert cli.main(["watch", "tiny", "--store", str(store), "--once"]) == 0
    screen = capsys.readouterr().out
    assert "Stopped in cold start, update 2 of 3, after a checkpoint." in screen
    assert re.search(r"\| cold start +\| stopped +\| █+░+ 2 of 3", screen), screen
    assert re.search(rf"\| loss_dm +\| [\d.]+ +\| [{BARS}]{{2}} ", screen), screen
    assert re.search(r"cost so far: [\d.]+ CPU-\w+, [\d.]+ EUR", screen), screen
    assert f"{store}/tiny/cold_start/live/strips/update-00000002.png" in screen
    assert cli.main(["watch", "tiny", "--store", str(store), "--once", "--html", str(page)]) == 0
    read = Reader(page.read_text(encoding="utf-8"))
    assert "Stopped in cold start, update 2 of 3" in read.text and read.links == []
    assert len([image for image in read.images if image["alt"].startswith("cold start, update ")]) == 9
    assert len([image for image in read.images if image["alt"].startswith("teacher: ")]) == 3
    assert cli.main(["runs", "--store", str(store)]) == 0
    assert re.search(r"\| tiny .* to prompts .* CPU-\w+, [\d.]+ EUR", capsys.readouterr().out)


def test_a_page_of_a_run_that_goes_on_loads_itself_again(store):
    status = store / "tiny/cold_start/live/status.json"
    status.write_text(status.read_text().replace('"stopped"', '"running"'))
    view = RunReader(str(store), "tiny").read()
    assert "location.reload()" in render_live_page(view, refresh=5)
    assert "location.reload()" not in render_live_page(view, refresh=0)
    assert "left for the run" in render_screen(view)[0]
    later = RunReader(str(store), "tiny", now=lambda: view.at + 4000.0).read()
    assert re.search(r"No sign of cold start, update 2 of 3 for 6\d\.\d min", render_screen(later)[0])


def test_damaged_and_foreign_files_are_left_out(store):
    live = store / "tiny/cold_start/live"
    (live / "rows-000000.jsonl").open("a").write('{"n": 7}\n[]\nnot json\n{"n": 8, "update": 8, "loss_dm": "<b>"}\n')
    for name, data in {
        "status.json": b'{"state": 3}',
        "strips/prompts.json": b"[" * 99999,
        "alarms.json": b"{}",
    }.items():
        (live / name).write_bytes(data)
    (live / "strips/update-00000099.png").write_bytes(b"\x89PNG no picture")
    view = RunReader(str(store), "tiny").read()
    stage = view.stages[1]
    assert (
        stage.state == "open" and [row["update"] for row in stage.rows] == [0, 1, 8] and "loss_dm" not in stage.rows[-1]
    )
    render_live_page(view, refresh=5)
    assert render_screen(view)


def test_a_run_that_is_not_there_is_one_line(store, capsys):
    assert cli.main(["watch", "tinu", "--store", str(store)]) == 66
    assert capsys.readouterr().err == f"dmdr: there is no run tinu at {store}; did you mean tiny?\n"
    assert cli.main(["watch", "tiny", "--store", str(store), "--html", str(store)]) == 64
    assert capsys.readouterr().err.count("\n") == 1


def test_rows_are_read_again_only_where_they_may_have_changed(store, monkeypatch):
    place = open_place(f"{store}/tiny/cold_start/live")
    block = "".join(f'{{"n": {n}, "at": null, "update": {n}}}\n' for n in range(100))
    for number in range(3):
        shifted = re.sub(r": (\d+)", lambda match, at=100 * number: f": {int(match[1]) + at}", block)
        place.publish(f"rows-{number:06d}.jsonl", lambda file, text=shifted: file.write_text(text))
    reader = RunReader(str(store), "tiny")._readers["cold_start"]
    assert [row["update"] for row in reader.read().rows] == list(range(300))
    asked: list[str] = []
    read = reader._place.read
    monkeypatch.setattr(reader._place, "read", lambda name: asked.append(name) or read(name))
    assert len(reader.read().rows) == 300
    assert [name for name in asked if name.startswith("rows-")] == ["rows-000002.jsonl"]


@pytest.mark.parametrize(
    ("values", "line"),
    [([0.0, 1.0], "▁█"), ([2.0, 2.0], "▄▄"), ([0.0, None, 1.0], "▁×█"), ([math.nan, 1.0], "×▄"), ([], "")],
)
def test_a_sparkline_shows_what_is_no_number(values, line):
    assert draw_sparkline(values) == line
    assert len(draw_sparkline(values * 40)) <= 40
