"""Work that nobody waits for: replaced, bounded, tried again, and no error of it reaches anybody but as one line."""

from __future__ import annotations

import time
from threading import Event

from stages.runtime import background
from stages.runtime.background import Background


def until(is_true, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_true() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert is_true()


def test_the_newest_of_a_name_counts_and_the_oldest_is_dropped():
    lines, done, gate = [], [], Event()
    work = Background("it", lines.append, most=3)
    work.put("first", gate.wait)
    until(lambda: not work._waiting)  # it runs, and waits
    for number in range(3):
        work.put("same", lambda number=number: done.append(f"same {number}"))
    for name in "abc":
        work.put(name, lambda name=name: done.append(name))
    gate.set()
    work.end(5.0)
    assert done == ["a", "b", "c"], "`same` was the oldest of four"
    assert lines == []


def test_a_failure_is_one_line_and_is_tried_again(monkeypatch):
    monkeypatch.setattr(background, "FIRST_PAUSE", 0.01)
    lines, tries = [], []

    def fail_twice() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise OSError("the disk\nis full")

    work = Background("live page", lines.append)
    work._pause = 0.01
    work.put("it", fail_twice)
    until(lambda: len(tries) == 3)
    work.end(5.0)
    assert lines == ["live page fails (the disk is full); training goes on, and it is tried again"]


def test_a_store_that_hangs_holds_up_neither_work_nor_end():
    gate, began = Event(), time.monotonic()
    work = Background("live page", print)
    work.put("hangs", lambda: gate.wait(30))
    for number in range(1000):
        work.put(f"{number}", lambda: None)
    work.end(0.05)
    assert time.monotonic() - began < 5
    gate.set()
