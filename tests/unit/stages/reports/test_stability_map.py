"""The map of `dmdr tune` shows every cell, and the table says why a cell is not stable."""

from __future__ import annotations

from dmdr.planning.stability import Cell, CellResult, Look, list_cells, recommend
from stages.reports.stability_map import BETTER, UNSTABLE, draw_map, format_cells

OWN = Cell(student_rate=1e-4, fake_rate=1e-3, fake_updates=5, seed=0)


def result(cell: Cell) -> CellResult:
    """A fast student ends early; of the others, the faster is the better."""
    if cell.student_rate > 2e-4 and cell.fake_rate > 2e-3:
        return CellResult(
            cell=cell, updates=9, seconds=1.0, ended="the loss of the fake score is 31 at update 9, and was 0.4"
        )
    reward = 0.5 + 200 * cell.student_rate
    look = Look(
        rewards=tuple(reward + 0.001 * (n % 2) for n in range(64)),
        saturation=0.31,
        contrast=0.22,
        broken=0.0,
        loss_fake=0.8,
        loss_teacher=0.9,
    )
    return CellResult(cell=cell, updates=50, seconds=2.0, look=look)


def test_the_map_and_the_table_of_a_grid():
    results = [result(cell) for cell in list_cells(OWN)]
    start = results[0].look
    verdict = recommend(results, start, start)
    assert verdict.recommended.student_rate == 3e-4
    picture = draw_map(results, start, verdict, title="a run, joint: 50 updates each")
    colours = {colour for _, colour in picture.getcolors(2**20)}
    assert {UNSTABLE, BETTER} <= colours
    table = format_cells(results, start, start, verdict)
    assert table.count("\n") == 1 + 2 + len(results)
    assert table.count("recommended") == 1 and "no: the loss of the fake score is 31 at update 9" in table
    assert "0.889" in table  # 0.8 / 0.9
