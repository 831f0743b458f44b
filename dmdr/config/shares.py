"""What a rank rolls out and trains on in an update: arithmetic on settings, without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from dmdr.config.batches import count_rl, count_trajectories
from dmdr.config.deal import Deal, cut
from dmdr.config.rl import AnyRL, EvolutionStrategies, Surrogate
from dmdr.config.training import Training


@dataclass(frozen=True)
class Trajectories:
    """The trajectories that a rank rolls out: neighbours, `numbers`, and then `others`, which RL alone needs.

    of: how many all ranks roll out.
    """

    numbers: range = range(0)
    others: list[int] = field(default_factory=list)
    of: int = 0

    @property
    def all(self) -> list[int]:
        return [*self.numbers, *self.others]

    def split(self, micro_batch: int | None, group: int) -> list[slice]:
        """The parts of `all` that run at once, in whole groups: as many on every rank, first those without `others`."""
        parts: list[slice] = []
        for start, stop in ((0, len(self.numbers)), (len(self.numbers), len(self.all))):
            groups = (stop - start) // group
            at_once = groups if micro_batch is None else max(1, micro_batch // group)
            pieces = cut(slice(0, groups), -(-groups // at_once) if groups else 0)
            parts += [slice(start + piece.start * group, start + piece.stop * group) for piece in pieces]
        return parts


@dataclass(frozen=True)
class Share:
    """What a rank rolls out for distribution matching, and of RL's own rollout, whose groups stay on one rank."""

    matching: Trajectories
    own: Trajectories


def deal_states(training: Training, rl: AnyRL | None, steps: int) -> Deal:
    """How the states of a rollout are dealt: to K - 1 batches, or as many as the student has updates if these are more.

    The student's are dealt alike, in an order of their own, and it takes as many as it has updates.
    """
    inner = count_rl(rl, steps).inner_updates
    count = count_trajectories(training.batch_size, training.fake_updates, steps, student_batches=inner)
    batches = max(training.fake_updates - 1, inner)
    return Deal(batches * training.batch_size, count, batches)


def deal_to_rl(rl: AnyRL | None, steps: int, trajectories: int) -> Deal | None:
    """How RL chooses states of distribution matching's rollout: to branch, or to learn rewards from; None: it does not.

    trajectories: of that rollout.
    """
    asked = count_rl(rl, steps)
    if asked.branches:
        return Deal(asked.states, trajectories)
    if isinstance(rl, Surrogate):
        return Deal(min(rl.samples, steps * trajectories), trajectories)
    if isinstance(rl, EvolutionStrategies):
        return Deal(min(rl.states, steps * trajectories), trajectories)
    return None


@lru_cache(maxsize=8)
def _find_share(deal: Deal | None, chosen: Deal | None, groups: Deal | None, group: int, at: tuple[int, int]) -> Share:
    matching = own = Trajectories()
    if deal is not None:
        others = chosen.list_others(deal, *at) if chosen else []
        matching = Trajectories(deal.widen(*at), others, deal.trajectories)
    if groups is not None:
        mine = groups.widen(*at)
        own = Trajectories(range(mine.start * group, mine.stop * group), [], groups.trajectories * group)
    return Share(matching, own)


def find_share(training: Training, rl: AnyRL | None, steps: int, *, matches: bool, ranks: int, rank: int) -> Share:
    """What a rank rolls out: the trajectories of the states that it trains on.

    matches: whether distributions are matched; if not, an RL with a rollout of its own has no other.
    """
    asked = count_rl(rl, steps)
    deal = chosen = groups = None
    if matches or not asked.trajectories:
        deal = deal_states(training, rl, steps)
        chosen = deal_to_rl(rl, steps, deal.trajectories)
    if asked.trajectories:
        groups = Deal(asked.states // asked.block, asked.trajectories // asked.group)
    return _find_share(deal, chosen, groups, asked.group, (ranks, rank))
