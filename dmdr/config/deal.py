"""How the states of a rollout are dealt to batches and to ranks: arithmetic on counts, without torch.

1. Nothing that is dealt depends on the number of ranks: they only share it. A rank has neighbouring states, which are
   of few trajectories, and rolls these out itself. So no rank needs a state, a prompt or a noise of another one.
2. Where the states of two ranks meet inside a trajectory, both roll it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise


def share_evenly(count: int, ranks: int, rank: int) -> range:
    """A rank's share of `count` things: neighbours, as many as any other rank has or one fewer."""
    return range(count * rank // ranks, count * (rank + 1) // ranks)


def cut(mine: slice, parts: int) -> list[slice]:
    """Cut neighbours into parts that differ by at most one in size."""
    size = mine.stop - mine.start
    edges = [mine.start + size * index // max(parts, 1) for index in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


@dataclass(frozen=True)
class Deal:
    """`states` states of `trajectories` trajectories, dealt in turn to `batches` batches.

    State s of S is of trajectory s M / S, rounded down: each of the M gives its fair share. It stands in batch s mod
    `batches`, in row s / `batches`, rounded down. So with as many batches as states of a trajectory, each trajectory
    gives one state to each batch.
    """

    states: int
    trajectories: int
    batches: int = 1

    def find_trajectory(self, state: int) -> int:
        return state * self.trajectories // self.states

    def find_turn(self, state: int) -> int:
        """How many states of its trajectory come before it."""
        first = -(-self.find_trajectory(state) * self.states // self.trajectories)
        return state - first

    def list_trajectories(self, states: range) -> range:
        """The trajectories of neighbouring states."""
        if not states:
            return range(0)
        return range(self.find_trajectory(states[0]), self.find_trajectory(states[-1]) + 1)

    def list_rows(self, states: range, batch: int) -> range:
        """The rows of a batch in which neighbouring states stand."""
        start, stop = (-((batch - edge) // self.batches) for edge in (states.start, states.stop))
        return range(start, stop)

    def list_states(self, rows: range, batch: int) -> range:
        """The states that stand in rows of a batch."""
        return range(rows.start * self.batches + batch, rows.stop * self.batches + batch, self.batches)

    def count_rows(self, batch: int) -> int:
        return len(self.list_rows(range(self.states), batch))

    def widen(self, ranks: int, rank: int) -> range:
        """The trajectories that a rank rolls out: those of its states, and neighbours until every rank has equally many
        of them, because networks whose weights are split run on all ranks together."""
        needed = self.list_trajectories(share_evenly(self.states, ranks, rank))
        width = _find_width(self, ranks)
        start = min(needed.start, self.trajectories - width)
        return range(start, start + width)

    def list_others(self, held: Deal, ranks: int, rank: int) -> list[int]:
        """The trajectories of a rank's states that are not among those which it rolls out for the deal `held`.

        Every rank has equally many, so some roll out one again. None, where the shares of the two deals agree.
        """
        needed = _list_missing(self, held, ranks)
        width, own = max(map(len, needed)), needed[rank]
        return own + [held.widen(ranks, rank)[0]] * (width - len(own))


# Both look at every rank, and a plan asks them for every rank.


@lru_cache(maxsize=32)
def _find_width(deal: Deal, ranks: int) -> int:
    """The most trajectories that the states of any rank are of."""
    shares = (share_evenly(deal.states, ranks, rank) for rank in range(ranks))
    return max(len(deal.list_trajectories(states)) for states in shares)


@lru_cache(maxsize=8)
def _list_missing(deal: Deal, held: Deal, ranks: int) -> list[list[int]]:
    """For each rank, the trajectories of its states that it does not roll out for the deal `held`."""
    missing = []
    for rank in range(ranks):
        have = held.widen(ranks, rank)
        asked = deal.list_trajectories(share_evenly(deal.states, ranks, rank))
        missing.append([number for number in asked if number not in have])
    return missing
