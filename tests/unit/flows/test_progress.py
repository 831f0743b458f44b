"""The progress artifact of a stage on a real server: it follows the lines, and a server that is away costs nothing."""

from __future__ import annotations

import warnings

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.prefect_support.progress import Follower, show_progress
from tests.support.prefect_server import asked

pytestmark = pytest.mark.process


@pytest.fixture(autouse=True)
def outside_of_a_flow():
    """Where Prefect warns of artifacts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def test_an_artifact_follows_the_lines(prefect_server: dict[str, str]):
    said: list[str] = []
    with temporary_settings({PREFECT_API_URL: prefect_server["PREFECT_API_URL"]}):
        with show_progress("joint", "mine", said.append) as say:
            say("joint 10/40, loss_fake 0.5")
            say("fetching 1/40")
            say("node 0: joint 30/40, loss_fake 0.25, 9 s left")
        with show_progress("export", "mine", said.append) as say:
            say("export 1/2")
        with show_progress("cold_start", "mine", said.append) as say:
            say("cold_start: sealed already at runs/mine/cold_start")
    all_artifacts = asked(prefect_server, "/artifacts/filter", {})
    artifacts = [each for each in all_artifacts if "mine: " in (each["description"] or "")]
    assert [each["key"] for each in artifacts] == ["joint"], "a sealed stage has no progress"
    [artifact] = artifacts
    assert (artifact["type"], artifact["data"]) == ("progress", 75.0)
    assert artifact["description"] == "mine: joint 30/40, loss_fake 0.25, 9 s left"
    assert len(said) == 5


def test_a_server_that_is_away_costs_only_the_artifact():
    said: list[str] = []
    away = {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}  # discard
    with temporary_settings(away):
        with show_progress("joint", "mine", said.append) as say:
            say("joint 10/40")
        follower = Follower("mine", "joint")
        for done in range(40):
            follower.take(f"joint {done}/40")
        follower.close()
    assert said == ["joint 10/40"]
    assert not follower._thread.is_alive()
