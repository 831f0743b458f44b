"""Two students whose evaluations do not compare: both are drawn on the prompts of the one that is to be promoted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dmdr.config.load import load_config
from dmdr.errors import ConfigError, InputMissing
from flows.promotion import Rule, promote
from stages.reports.comparison.promotion import promote_if_better
from stages.store.artifacts import Artifact
from stages.store.runs import is_run, list_runs, promote_run
from tests.support.trained_run import run_stage, seal_stage, trained_run

RULE = Rule(name="production", if_better="lab-mixer")
STUDENT = {"steps": 2, "eta": 0.0}  # no noise after the start, which pipeline and sampler share


def test_the_student_that_has_the_name_is_drawn_on_the_other_prompts(tiny_config: Callable[..., Path], tmp_path: Path):
    """Twice the same weights, one of them never evaluated: no difference is found, and nothing is promoted."""
    store = tmp_path / "store"
    evaluate = {"metrics": ["lab-mixer"], "batch_size": 4, "models": ["student"]}
    old = load_config(tiny_config(run="old", student=STUDENT, evaluate=evaluate, export={"dtype": "float32"}))
    trained_run(old, store)
    seal_stage(old, store, "export")
    path = tiny_config(run="new", student=STUDENT, evaluate=evaluate, export={"dtype": "float32"})
    for stage in ("prompts", "export"):
        sealed = Artifact(str(store), "old", stage)
        Artifact(str(store), "new", stage).adopt(sealed, sealed.sealed().identity, sealed.sealed().inputs)
    run_stage(load_config(path), store, "evaluate")
    promote_run(str(store), "old", "production")
    with pytest.raises(InputMissing, match=r"run old is not evaluated.*; give the config of new with --config"):
        promote_if_better(str(store), "new", "production", ("lab-mixer",))

    drawn: list[str] = []

    def evaluate_here(name: str, config: str, run: str, store: str, teacher: str | None = None) -> None:
        checked = load_config(config).model_copy(update={"run": run})
        if Artifact(store, run, name).record() is None:
            drawn.append(run)
            run_stage(checked, Path(store), name)

    for _ in range(2):  # the second time finds what the first has drawn
        decision = promote(evaluate_here, RULE, "new", str(store), str(path))
        (found,) = decision.metrics
        assert not decision.is_promoted and decision.over == "old" and found.n == 6
        assert abs(found.difference) < 1e-4, "the same weights from the same noise"
    (made,) = drawn
    assert made.startswith("new-over-old-") and is_run(str(store), made)
    assert list_runs(str(store)) == ["new", made, "old"]

    other = tiny_config(run="new", student=STUDENT, evaluate={**evaluate, "limit": 5})
    with pytest.raises(ConfigError, match=r"evaluate.limit is null there, 5 here"):
        promote(evaluate_here, RULE, "new", str(store), str(other))
