"""The rule that recommends a cell: stability first, then the held-out reward, and only beyond noise."""

from __future__ import annotations

import math

import pytest

from dmdr.planning.stability import (
    Cell,
    CellResult,
    Look,
    compare_rewards,
    find_instability,
    list_cells,
    recommend,
)

OWN = Cell(student_rate=1e-4, fake_rate=1e-3, fake_updates=5, seed=7)
REWARDS = tuple(0.5 + 0.01 * (n % 7) for n in range(64))


def look(more: float = 0.0, **changes: float) -> Look:
    """A whole look whose rewards are `more` above the usual."""
    rewards = tuple(value + more for value in REWARDS)
    values = {"saturation": 0.3, "contrast": 0.2, "broken": 0.0, "loss_fake": 0.8, "loss_teacher": 1.0, **changes}
    return Look(rewards=rewards, **values)


def result(cell: Cell, seen: Look | None, ended: str = "") -> CellResult:
    return CellResult(cell=cell, updates=50, seconds=1.0, ended=ended, look=seen)


def changed(**values: float) -> Cell:
    return OWN.model_copy(update=values)


START = TEACHER = look()
AGAIN = result(changed(seed=8), look(0.002))


def test_the_default_grid_is_a_dozen_around_the_configs_own():
    cells = list_cells(OWN)
    assert len(cells) == 12 and cells[0] == OWN and cells[1] == changed(seed=8)
    assert {cell.student_rate for cell in cells} == {3.3e-5, 1e-4, 3e-4}
    assert {cell.fake_updates for cell in cells if cell.student_rate != 1e-4} == {5}
    assert {cell.fake_updates for cell in cells} == {2, 5, 10}
    assert len({cell.name for cell in cells}) == 12


def test_named_values_are_crossed():
    cells = list_cells(OWN, student_rates=(1e-5, 1e-4), ratios=(1, 5))
    assert {(cell.student_rate, cell.fake_updates) for cell in cells[2:]} | {(1e-4, 5)} == {
        (1e-5, 1),
        (1e-5, 5),
        (1e-4, 1),
        (1e-4, 5),
    }


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (look(), ""),
        (look(saturation=0.38), ""),
        (look(saturation=0.40), "saturation is 0.400"),
        (look(contrast=0.10), "contrast is 0.100"),
        (look(broken=0.5), "50% of its images are not numbers"),
        (look(loss_fake=1.2), "1.20 times the teacher's"),
    ],
)
def test_what_makes_a_cell_unstable(seen: Look, why: str):
    found = find_instability(result(OWN, seen), START, TEACHER)
    assert why in found and bool(why) == bool(found)


def test_a_start_far_from_the_teacher_may_stay_there_but_not_go_further():
    pale = look(saturation=0.1)
    assert not find_instability(result(OWN, look(saturation=0.12)), pale, TEACHER)
    assert find_instability(result(OWN, look(saturation=0.05)), pale, TEACHER)


def test_a_lead_beyond_noise_is_recommended():
    verdict = recommend([result(OWN, look()), AGAIN, result(changed(student_rate=3e-4), look(0.01))], START, TEACHER)
    assert verdict.recommended == changed(student_rate=3e-4)
    assert verdict.lead == pytest.approx(0.01) and verdict.low > 0


@pytest.mark.parametrize("more", [0.001, -0.01])
def test_a_lead_as_small_as_that_of_another_seed_is_none(more: float):
    verdict = recommend([result(OWN, look()), AGAIN, result(changed(student_rate=3e-4), look(more))], START, TEACHER)
    assert verdict.recommended == OWN
    assert ("noise" in verdict.why) == (more > 0)


def test_a_lead_that_few_prompts_carry_is_none():
    rewards = tuple(value + (2.0 if n == 0 else 0.0) for n, value in enumerate(REWARDS))
    lucky = look().model_copy(update={"rewards": rewards})
    verdict = recommend([result(OWN, look()), AGAIN, result(changed(student_rate=3e-4), lucky)], START, TEACHER)
    assert verdict.recommended == OWN and verdict.lead > 0.03 and verdict.low < 0


def test_the_best_stable_cell_replaces_an_unstable_one():
    slow, fast = changed(student_rate=3e-5), changed(student_rate=3e-4)
    results = [result(OWN, None, "loss_dm is nan"), AGAIN, result(slow, look(-0.1)), result(fast, look(1, contrast=9))]
    verdict = recommend(results, START, TEACHER)
    assert verdict.recommended == slow and set(verdict.unstable) == {OWN, fast}
    assert recommend(results[:2], START, TEACHER).why.startswith("no cell is stable")


def test_more_cells_ask_for_a_larger_lead():
    other = look().model_copy(update={"rewards": tuple(v + 0.01 * (n % 3) for n, v in enumerate(REWARDS))})
    lows = [compare_rewards(result(changed(seed=9), other), result(OWN, look()), cells=n)[1] for n in (1, 11)]
    assert lows[0] > lows[1]
    assert math.isnan(look().model_copy(update={"loss_fake": None}).fit)
