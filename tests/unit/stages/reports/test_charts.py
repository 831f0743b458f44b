"""The training curves of the report."""

from __future__ import annotations

import json
import re

from dmdr.hacking_alarm import NON_FINITE, REWARD
from stages.reports.charts import read_columns, render_charts


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
    page = render_charts({"cold_start": {"loss_dm": [(1, 2.0)]}, "joint": {**columns, "reward/lab-conv": [(1, 0.5)]}})
    drawn = re.findall(r"<figcaption><b>([^<]+)</b>", page)
    assert drawn == ["loss_dm", "reward/lab-conv", NON_FINITE, REWARD] and "not a number" not in page
