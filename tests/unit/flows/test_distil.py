"""The flows on Prefect's own engine: what is tried again, what is not, and who decides that a stage is done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

from dmdr.config.load import load_config
from dmdr.errors import ConfigError, InputMissing
from flows import cli, distil
from flows.distil import RETRY_DELAYS, StageFailed, dmdr, run_stage
from flows.launch import given_config
from flows.paper_tables import lab_tables
from flows.promotion import Rule
from stages.store.artifacts import Artifact
from stages.store.runs import list_history
from tests.support.trained_run import seal_stage, trained_run

# The tasks run on their own here, outside of a flow.
pytestmark = [
    pytest.mark.process,  # Prefect's test server
    pytest.mark.filterwarnings("ignore:Logger 'prefect.task_runs':UserWarning"),
]


@pytest.fixture(autouse=True)
def on_prefect(prefect_server: dict[str, str]) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: prefect_server["PREFECT_API_URL"]}):
        yield


def attempt(config: Path, store: Path, name: str = "prompts") -> int:
    """Run one stage task without waiting between attempts; returns the exit code it failed with."""
    with pytest.raises(StageFailed) as failed:
        run_stage.with_options(retry_delay_seconds=0)(name, str(config), "tiny", str(store))
    return failed.value.exit_code


def test_bad_data_is_never_tried_again(tiny_config: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture):
    config = tiny_config()
    (tmp_path / "train.txt").write_text("")
    assert attempt(config, tmp_path / "store") == 65
    assert "trying again" not in capfd.readouterr().err
    assert Artifact(str(tmp_path / "store"), "tiny", "prompts").record() is None


def test_a_missing_input_is_never_tried_again(
    tiny_config: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture
):
    assert attempt(tiny_config(), tmp_path / "store", "joint") == 66
    assert "trying again" not in capfd.readouterr().err


def test_a_store_that_refuses_is_tried_again(
    tiny_config: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture
):
    (tmp_path / "store").write_text("a file, where a folder should be")
    assert attempt(tiny_config(), tmp_path / "store") == 74
    assert capfd.readouterr().err.count("trying again") == len(RETRY_DELAYS)


def test_a_stage_is_done_when_its_seal_is_there(tiny_config: Callable[..., Path], tmp_path: Path):
    run_stage("prompts", str(tiny_config()), "tiny", str(tmp_path / "store"))
    assert Artifact(str(tmp_path / "store"), "tiny", "prompts").record() is not None


def test_a_config_travels_with_the_run_or_is_waited_for(
    tiny_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As text, which no file of the worker has to hold; then as a file that a node shows some time after the start."""
    text, store, late = tiny_config().read_text(), str(tmp_path / "store"), tmp_path / "configs.yaml"
    dmdr(text, store=store, until="prompts")
    assert Artifact(store, "tiny", "prompts").record() is not None

    def appear() -> None:
        time.sleep(0.5)
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").rename(late)

    monkeypatch.setattr(given_config, "PAUSE", 0.05)
    with pytest.raises(InputMissing, match="configs.yaml does not exist"):
        dmdr(str(late), store=store, until="prompts")  # started by hand
    monkeypatch.setattr(distil.deployment, "id", str(uuid4()), raising=False)
    threading.Thread(target=appear, daemon=True).start()
    dmdr(str(late), store=store, until="prompts")


def test_a_cancelled_flow_run_is_cleaned_up_whatever_its_config_is(
    tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture
):
    run = FlowRun(flow_id=uuid4(), parameters={"config": tiny_config().read_text()})
    distil.stop_jobs(dmdr, run, run.state)
    assert capsys.readouterr().out == ""  # it has no cluster
    run.parameters["config"] = "nowhere.yaml"
    distil.stop_jobs(dmdr, run, run.state)
    assert "cannot see whether the flow run has Jobs to stop: config nowhere.yaml does not" in capsys.readouterr().out


def test_rows_of_a_table_share_their_stages_and_go_on(
    tiny_config: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture
):
    """Two rows that differ in evaluation alone: the second copies the first one's prompts; again: only the page."""
    models = {"guided": "teacher", "plain": "naive teacher"}
    rows = [{"name": name, "label": name, "model": model} for name, model in models.items()]
    claim = {"claim": "guidance helps", "higher": "guided", "lower": "plain", "figures": ["lab-mixer"]}
    table = {
        "table": "T",
        "title": "t",
        "runs": "t",
        "base": str(tiny_config()),
        "seeds": [0],
        "rows": rows,
        "columns": [{"metric": "lab-mixer"}],
        "claims": [claim],
    }
    spec, store, page = tmp_path / "t.yaml", tmp_path / "store", tmp_path / "page.html"
    spec.write_text(yaml.safe_dump(table))
    lab_tables(str(spec), store=str(store), out=str(page))
    records = {
        (row, stage): Artifact(str(store), f"t-{row}-seed0", stage).record()
        for row in ("guided", "plain")
        for stage in ("prompts", "evaluate")
    }
    assert records["plain", "prompts"].provenance.adopted_from == "t-guided-seed0"
    assert records["plain", "prompts"].fingerprint == records["guided", "prompts"].fingerprint
    assert records["plain", "evaluate"].provenance.adopted_from is None
    assert "2 of 2 runs finished" in page.read_text()
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"t-guided-seed0.yaml", "t-plain-seed0.yaml"}

    first = page.read_text()
    page.unlink()
    capfd.readouterr()
    assert cli.main(["tables", str(spec), "--store", str(store), "--out", str(page)]) == 0
    assert page.read_text() == first
    told = capfd.readouterr()
    assert "all 2 runs are sealed already" in told.out
    assert "starting Prefect" not in told.err
    table["changes"] = {"teacher.steps": 4}  # the names belong to the first table now
    spec.write_text(yaml.safe_dump(table))
    assert cli.main(["tables", str(spec), "--store", str(store), "--out", str(page)]) == 64
    assert "teacher.steps is 3 there, 4 here" in capfd.readouterr().err


def test_a_finished_run_is_judged_for_a_name(tiny_config: Callable[..., Path], tmp_path: Path):
    """Its stages are sealed already; the page of the flow run shows the decision."""
    path, store = tiny_config(), tmp_path / "store"
    config = load_config(path)
    trained_run(config, store)
    for stage in ("export", "evaluate"):
        seal_stage(config, store, stage)
    with pytest.raises(ConfigError, match="only an evaluated run can become production, but until is joint"):
        dmdr(str(path), store=str(store), until="joint", promote=Rule(name="production", if_better="lab-mixer"))
    dmdr(str(path), store=str(store), promote=Rule(name="production", if_better="lab-mixer"))
    (move,) = list_history(str(store), "production")
    assert move.run == "tiny"
    with get_client(sync_client=True) as client:
        shown = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["promotion"])))
    assert any("production is the export of tiny now; no run carried" in each.data for each in shown)
