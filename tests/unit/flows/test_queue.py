"""When people are told that a Job waits in the queue."""

from __future__ import annotations

from flows.launch.waiting import QUEUED, Queue


def test_a_job_that_stays_in_the_queue_is_told_once():
    seconds = 0.0
    queue = Queue(now=lambda: seconds)

    def look(at: float, *, is_held: bool) -> bool:
        nonlocal seconds
        seconds = at
        return queue.lasts(is_held=is_held)

    assert not look(0, is_held=True) and not look(QUEUED - 1, is_held=True)
    assert not look(QUEUED, is_held=False), "it was let go, so its time begins again"
    assert not look(QUEUED + 1, is_held=True) and not look(2 * QUEUED, is_held=True)
    assert look(2 * QUEUED + 1, is_held=True)
    assert not look(9 * QUEUED, is_held=True)
