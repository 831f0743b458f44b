"""The training curves of the report."""

from __future__ import annotations

import json

from dmdr.watch.figures import NON_FINITE, REWARD
from stages.reports.charts import Point, build_charts, read_columns


def test_the_report_draws_a_look_where_it_was_taken(tmp_path):
    lines = [
        {"update": n, "loss_dm": 1.0, **({REWARD: 0.1 * n, NON_FINITE: 0.0} if n % 2 == 0 else {})} for n in range(4)
    ]
    lines.append({"update": 4, NON_FINITE: 1.0})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = read_columns(path)
    assert columns[REWARD] == [(0, 0.0), (2, 0.2)]
    assert [x for x, _ in columns[NON_FINITE]] == [0, 2, 4] and [x for x, _ in columns["loss_dm"]] == [1, 2, 3, 4]
    joint = {**columns, "reward/lab-conv": [Point(1, 0.5)]}
    charts = build_charts({"cold_start": {"loss_dm": [Point(1, 2.0)]}, "joint": joint})
    assert [chart.name for chart in charts] == ["loss_dm", "reward/lab-conv", NON_FINITE, REWARD]
    assert all(chart.broken == 0 for chart in charts)
