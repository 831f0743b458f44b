"""`prefect deployment run dmdr/full` with a real server, work pool and worker, on a cluster, and a cancelled run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from dmdr.config.stages import STAGES
from flows.launch.manifest import job_name
from tests.support.fake_cluster.server import IMAGE, QUICK, Cluster
from tests.support.prefect_server import ROOT, answers, asked, prefect, server_environment, started


@pytest.fixture
def server(cluster: Cluster, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Prefect server on SQLite with the work pool `local`, the deployment and a worker; yields their environment."""
    port, environment = server_environment(tmp_path / "prefect", PREFECT_WORKER_QUERY_SECONDS="2")
    processes = [started("server", "start", "--host", "127.0.0.1", "--port", port, "--no-ui", environment=environment)]
    try:
        answers(f"{environment['PREFECT_API_URL']}/health")
        prefect("work-pool", "create", "local", "--type", "process", "--set-as-default", environment=environment)
        prefect("--no-prompt", "deploy", "--all", environment=environment)
        processes.append(started("worker", "start", "--pool", "local", environment=environment))
        yield environment
    finally:
        for process in reversed(processes):  # the worker first: without its server it would not stop
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_the_deployment_runs_each_stage_as_a_job(
    server: dict[str, str], cluster: Cluster, short_lab_config: Callable[..., Path], tmp_path: Path
):
    """The lab's run, to the scorecard; then `dmdr run` finds all sealed, and a run that is cancelled leaves no pod."""
    on = {"image": IMAGE, "claims": {str(tmp_path.parent): "everything"}}
    config, store = str(short_lab_config(execution={"device": "cpu", "cluster": on})), str(tmp_path / "store")
    prefect(
        "deployment",
        "run",
        "dmdr/full",
        "--watch",
        "-p",
        f"config={json.dumps(config)}",
        "-p",
        f"store={json.dumps(store)}",
        environment=server,
    )
    for stage in STAGES:
        assert Path(store, "lab-flow", stage, "record.json").is_file()
    assert [name.rsplit("-", 2)[0] for name in cluster.kubelet.started] == [job_name("lab-flow", s, 1) for s in STAGES]
    published = {artifact["key"]: artifact for artifact in asked(server, "/artifacts/filter", {})}
    strips = {f"{stage}-{who}" for stage in ("cold-start", "joint") for who in ("student", "teacher")}
    assert published.keys() == {"cold-start", "joint", "evaluate", "scorecard", "grid", *strips}
    assert {published[key]["data"] for key in ("cold-start", "joint", "evaluate")} == {100.0}
    assert "loss_fake" in published["joint"]["description"] and "file://" not in published["scorecard"]["data"]
    assert "lab-flow" in {each["name"] for each in asked(server, "/flow_runs/filter", {})}
    logged = asked(server, "/logs/filter", {})
    assert any("cold_start: sealed at" in line["message"] for line in logged)

    began = time.monotonic()
    command = [sys.executable, "-m", "flows.cli", "run", config, "--store", store]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert time.monotonic() - began < 30
    lines = again.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:5]] == list(STAGES)
    assert all("sealed already" in line for line in lines[:5])
    assert lines[-1] == f"report: {store}/lab-flow/evaluate/report.html"

    slow = {**on, "image": QUICK, "environment": {"QUICK_SECONDS": "600"}, "grace": 20}
    config = str(short_lab_config(execution={"device": "cpu", "cluster": slow}))
    started = prefect(
        "deployment",
        "run",
        "dmdr/full",
        "-p",
        f"config={json.dumps(config)}",
        "-p",
        'run="another"',
        "-p",
        f"store={json.dumps(store)}",
        environment=server,
    ).stdout
    until(lambda: len(cluster.kubelet.running()) == 1, 60)
    time.sleep(2)  # it has its handler
    flow_run = re.search(r"UUID: ([0-9a-f-]{36})", started)[1]
    prefect("flow-run", "cancel", flow_run, environment=server)
    left = partial(cluster.objects.list, labels="dmdr.dev/run=another")
    until(lambda: not cluster.kubelet.running() and not left("pods")[0] and not left("jobs")[0], 60)
    assert cluster.kubelet.ended[cluster.kubelet.started[-1]] == 75


def until(holds: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.1)
