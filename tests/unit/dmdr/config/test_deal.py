"""States are dealt fairly, to the same batches whatever the number of ranks; a rank needs no trajectory of another."""

from __future__ import annotations

import random

import pytest

from dmdr.config.batches import count_trajectories
from dmdr.config.deal import Deal, share_evenly
from dmdr.config.rl import GRPO, EvolutionStrategies, Surrogate
from dmdr.config.shares import Trajectories, deal_states, deal_to_rl, find_share
from dmdr.config.training import Joint, Optimizer

RATE = Optimizer(learning_rate=1e-4)
REWARDS = {"weight": 1.0, "rewards": {"lab-conv": 1.0}}


def draw_deal(rng: random.Random) -> tuple[Deal, int]:
    """A deal of random settings, and the steps of its student."""
    batch, fake, steps = rng.randint(1, 40), rng.randint(1, 9), rng.randint(1, 9)
    batches = max(fake - 1, 1)
    return Deal(batch * batches, count_trajectories(batch, fake, steps), batches), steps


def test_each_trajectory_gives_its_share_and_each_batch_is_full():
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(200):
        deal, steps = draw_deal(rng)
        given = [0] * deal.trajectories
        for state in range(deal.states):
            assert deal.find_turn(state) == given[deal.find_trajectory(state)]
            given[deal.find_trajectory(state)] += 1
        assert max(given) - min(given) <= 1 and max(given) <= steps, "no state is given twice"
        assert {deal.count_rows(batch) for batch in range(deal.batches)} == {deal.states // deal.batches}


def test_with_as_many_batches_as_steps_each_gets_one_state_of_each_trajectory():
    deal = Deal(4 * 7, 7, 4)
    for batch in range(4):
        assert [deal.find_trajectory(state) for state in deal.list_states(range(7), batch)] == list(range(7))


def test_ranks_share_the_rows_of_each_batch_and_have_the_trajectories():
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(200):
        deal, _ = draw_deal(rng)
        size = deal.states // deal.batches
        ranks = rng.randint(1, size)
        rows: list[list[int]] = [[] for _ in range(deal.batches)]
        widths = set()
        for rank in range(ranks):
            mine, held = share_evenly(deal.states, ranks, rank), deal.widen(ranks, rank)
            widths.add(len(held))
            assert held.start >= 0 and held.stop <= deal.trajectories
            assert set(deal.list_trajectories(mine)) <= set(held)
            for batch in range(deal.batches):
                own = deal.list_rows(mine, batch)
                assert size // ranks <= len(own) <= -(-size // ranks)
                assert set(deal.list_states(own, batch)) <= set(mine)
                rows[batch] += own
        assert len(widths) == 1, "every rank runs the networks equally often"
        assert all(each == list(range(size)) for each in rows)


def test_where_shares_agree_no_trajectory_is_rolled_out_twice():
    for ranks in (1, 2, 4, 8, 64):
        deal = Deal(8 * ranks * 4, 8 * ranks, 4)
        assert [number for rank in range(ranks) for number in deal.widen(ranks, rank)] == list(range(8 * ranks))
        chosen = Deal(3 * ranks, 8 * ranks)
        assert not any(chosen.list_others(deal, ranks, rank) for rank in range(ranks))


@pytest.mark.parametrize(
    "rl",
    [
        None,
        GRPO(algorithm="grpo", **REWARDS, branches=4, states=19, inner_updates=2),
        GRPO(algorithm="grpo", **REWARDS, branches=0, batch=24, group_size=4, inner_updates=3),
        Surrogate(algorithm="surrogate", **REWARDS, samples=21),
        EvolutionStrategies(algorithm="es", **REWARDS, states=19),
    ],
    ids=["none", "branches", "whole", "surrogate", "es"],
)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_a_rank_has_what_rl_needs(rl, ranks):
    """Also where the shares of distribution matching and of RL do not agree."""
    training = Joint(updates=1, batch_size=11, fake_updates=4, student=RATE, fake_score=RATE, rl=rl)
    shares = [find_share(training, rl, 4, matches=True, ranks=ranks, rank=rank) for rank in range(ranks)]
    assert (
        len({len(share.matching.others) for share in shares}) == len({len(share.own.numbers) for share in shares}) == 1
    )
    plain = [find_share(training, None, 4, matches=True, ranks=ranks, rank=rank) for rank in range(ranks)]
    assert [each.matching.numbers for each in shares] == [each.matching.numbers for each in plain], "whatever the RL"
    dealt = deal_to_rl(rl, 4, deal_states(training, rl, 4).trajectories)
    for rank, share in enumerate(shares):
        if dealt is not None:
            assert set(dealt.list_trajectories(share_evenly(dealt.states, ranks, rank))) <= set(share.matching.all)
        if isinstance(rl, GRPO) and not rl.branches:
            actions = Deal(3 * 24, 24, rl.inner_updates)
            assert set(actions.list_trajectories(share_evenly(actions.states, ranks, rank))) <= set(share.own.numbers)
            scored = share_evenly(6, ranks, rank)
            assert {4 * group for group in scored} <= set(share.own.numbers), "a group is scored where it is whole"


def test_a_rollout_is_cut_into_whole_groups():
    mine = Trajectories(range(4, 16), [20, 21], of=40)
    assert [mine.all[part] for part in mine.split(None, 1)] == [list(range(4, 16)), [20, 21]]
    parts = Trajectories(range(12), [], of=12).split(7, 3)
    assert [(part.start, part.stop) for part in parts] == [(0, 6), (6, 12)]
