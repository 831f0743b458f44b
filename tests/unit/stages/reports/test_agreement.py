"""What a frozen base in 8 bits does to the gradient: in the log, in the record and in the report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dmdr.config.load import load_config
from stages.reports.provenance import build_table
from tests.support.trained_run import context_for, run_stage, seal_stage


@pytest.mark.parametrize("kind", [None, "fp8"])
def test_it_is_told_where_it_was_measured(
    tiny_config: Callable[..., Path], tmp_path: Path, kind: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    config = load_config(tiny_config(precision="bfloat16", frozen_base=kind))
    seal_stage(config, tmp_path, "prompts")
    run_stage(config, tmp_path, "cold_start")
    said = re.findall(r"frozen base in fp8: .* cosine of (0\.\d+) with bfloat16's", capfd.readouterr().err)
    facts = json.loads((tmp_path / "tiny/cold_start/record.json").read_text())["facts"]
    table = dict(build_table(context_for(config, tmp_path, "joint")))
    if kind is None:
        assert not said and "agreement" not in facts and "frozen base" not in table
        return
    assert 0.9 <= facts["agreement"] < 1 and said == [f"{facts['agreement']:.3f}"]
    assert table["frozen base"].endswith(f"a cosine of {said[0]} with bfloat16's")
