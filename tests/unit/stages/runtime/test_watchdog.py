"""Who stands still, from the heartbeats of ranks; the clock is the test's own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import pytest

from dmdr.config.run import Execution
from stages.runtime.heartbeat import Beat, Heart, create_board
from stages.runtime.watchdog import Standstill, Watchdog
from stages.store.locks import AWAITED


class Ranks:
    """Ranks whose numbers the test moves, second by second, before a watchdog with a patience of 10 s."""

    def __init__(self, *, alone: bool = True, count: int = 2) -> None:
        self.now = 0.0
        self.dog = Watchdog(10, alone=alone, clock=lambda: self.now)
        self.beats = [Beat() for _ in range(count)]

    def live(
        self, seconds: int, *, move: set[int], waits: set[int] = frozenset(), silent: set[int] = frozenset()
    ) -> Standstill | None:
        for _ in range(seconds):
            self.now += 1
            self.beats = [
                beat if n in silent else Beat(beat.moves + (n in move), beat.beats + 1, n in waits)
                for n, beat in enumerate(self.beats)
            ]
            found = self.dog.look(self.beats, range(len(self.beats)))
            if found is not None:
                return found
        return None


def test_ranks_that_move_on_are_left_alone() -> None:
    assert Ranks().live(1000, move={0, 1}) is None


def test_a_rank_that_waits_for_a_slow_one_is_left_alone() -> None:
    """Rank 0 saves a checkpoint for an hour."""
    assert Ranks().live(3600, move={0}, waits={1}) is None


def test_a_rank_that_waits_for_nobody_and_does_not_move() -> None:
    ranks = Ranks()
    assert ranks.live(5, move={0, 1}) is None
    assert ranks.live(20, move={0}) == Standstill(1, 10.0, silent=False, together=False)


def test_the_rank_whose_process_does_not_run_is_named_not_the_one_that_waits_for_it() -> None:
    ranks = Ranks()
    ranks.live(5, move={0, 1})
    found = ranks.live(20, move=set(), waits={0}, silent={1})
    assert found == Standstill(1, 10.0, silent=True, together=False)
    ranks = Ranks()  # a wait inside of a network is not seen as one
    ranks.live(5, move={0, 1})
    assert ranks.live(20, move=set(), silent={1}).rank == 1


def test_all_wait_for_each_other() -> None:
    found = Ranks().live(20, move=set(), waits={0, 1})
    assert found is not None and found.together
    assert Ranks(alone=False).live(1000, move=set(), waits={0, 1}) is None, "another machine may be slow"


def test_time_in_which_nobody_ran_does_not_count() -> None:
    """Somebody stopped the whole group for an hour, or the machine slept."""
    ranks = Ranks()
    ranks.live(8, move=set())
    ranks.now += 3600
    assert ranks.live(1, move=set()) is None
    assert ranks.live(4, move=set()) is not None


def test_a_rank_that_has_ended_is_not_judged() -> None:
    now = 0.0
    dog = Watchdog(10, alone=True, clock=lambda: now)
    for now in range(100):
        assert dog.look([Beat(now, now), Beat()], [0]) is None


def test_what_counts_as_progress(tmp_path) -> None:
    heart = Heart(1.0, lambda beat: None)
    stands = threading.Event()

    def look() -> int:  # always from the same place of the main thread
        return [heart.look().moves for _ in range(3)][-1]

    def from_a_thread() -> list[int]:
        found: list[int] = []

        def look_later() -> int:
            time.sleep(0.02)
            return heart.look().moves

        def watch() -> None:
            while len({look_later() for _ in range(5)}) > 1:
                pass  # the main thread is on its way into the call
            found.extend(heart.look().moves for _ in range(3))
            stands.set()

        thread = threading.Thread(target=watch)
        thread.start()
        stands.wait()
        thread.join()
        stands.clear()
        return found

    before = from_a_thread()
    assert before[1] == before[2], "the main thread is in one call"
    after = look()
    assert after > before[2], "it is elsewhere"


@pytest.mark.parametrize("seconds", [0, 4, 86401])
def test_the_config_bounds_the_patience(seconds: int) -> None:
    assert Execution().watchdog == 600
    with pytest.raises(ValueError, match="watchdog"):
        Execution(watchdog=seconds)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_board_is_shared(rank: int) -> None:
    board = create_board(3)
    board.write(rank, Beat(7, 9, waits=True))
    found = board.read()
    assert found[rank] == Beat(7, 9, waits=True)
    assert [beat for n, beat in enumerate(found) if n != rank] == [Beat(), Beat()]


@pytest.mark.process
def test_looking_while_garbage_is_collected_does_not_stand_still() -> None:
    """Python's own deadlock: a collection inside of sys._current_frames that frees a threading.local."""
    program = """
import gc, threading
from stages.runtime.heartbeat import Heart
class Owner: pass
heart = Heart(1.0, print)
gc.set_threshold(1)
for _ in range(2000):
    owner = Owner()
    owner.local, owner.itself = threading.local(), owner
    del owner
    heart.look()
print(gc.isenabled())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True"], done.stderr


@pytest.mark.parametrize("is_at_work", [True, False])
def test_who_waits_for_a_thread_of_its_own_moves_on_as_that_thread_does(is_at_work: bool) -> None:
    """It writes a checkpoint, or is in a read from a dead disk."""
    heart, end = Heart(60, lambda beat: None), threading.Event()
    beats: list[Beat] = []

    def work() -> None:
        if not is_at_work:
            end.wait()
        while not end.is_set():
            json.dumps([1, {"some": ["thing"]}], indent=1)  # in many functions of Python

    def watch() -> None:
        while AWAITED.ident is None:
            end.wait(0.01)
        for _ in range(20):
            end.wait(0.02)
            beats.append(heart.look())
        end.set()

    helper, watcher = threading.Thread(target=work), threading.Thread(target=watch)
    helper.start()
    watcher.start()
    AWAITED.join(helper)
    watcher.join()
    moves = beats[-1].moves - beats[1].moves
    assert moves > 5 if is_at_work else moves == 0, [beat.moves for beat in beats]
