"""The flow `dmdr` on Prefect's own engine: what is tried again, what is not, and who decides that a stage is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect.testing.utilities import prefect_test_harness

from flows.dmdr import RETRY_DELAYS, StageFailed, stage
from stages.artifacts import Artifact

# The tasks run on their own here, outside of a flow.
pytestmark = pytest.mark.filterwarnings("ignore:Logger 'prefect.task_runs':UserWarning")


@pytest.fixture(scope="module", autouse=True)
def prefect_server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


def attempt(config: Path, store: Path, name: str = "prompts") -> int:
    """Run one stage task without waiting between attempts; returns the exit code it failed with."""
    with pytest.raises(StageFailed) as failed:
        stage.with_options(retry_delay_seconds=0)(name, str(config), "tiny", str(store))
    return failed.value.code


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
    stage("prompts", str(tiny_config()), "tiny", str(tmp_path / "store"))
    assert Artifact(str(tmp_path / "store"), "tiny", "prompts").record() is not None
