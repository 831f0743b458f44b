"""Servers: S3 and Prefect, once for many tests; a faulty way to S3 and a Kubernetes cluster, for one test each."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_cluster.server import Cluster, fake_cluster
from tests.support.prefect_server import asked, copy_database, prefect, server_alone
from tests.support.s3_proxy import Faults, s3_proxy
from tests.support.s3_server import BUCKET, s3_environment, s3_server
from tests.support.stage_process import prepare_host


@pytest.fixture(scope="session")
def s3_process() -> Iterator[str]:
    """The address of an S3 server."""
    with s3_server() as address:
        yield address


@pytest.fixture(scope="module")
def s3(s3_process: str) -> Iterator[str]:
    """The address of an S3 server, which clients find by their environment."""
    with s3_environment(s3_process):
        yield s3_process


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Prefect server with the work pool `local`, all deployments and no worker; its clients' environment."""
    home, own = tmp_path_factory.mktemp("prefect"), tmp_path_factory.getbasetemp()
    copy_database(home, own.parent if "PYTEST_XDIST_WORKER" in os.environ else own)
    with server_alone(home) as environment:
        asked(environment, "/work_pools/local/queues", {"name": "gpu", "concurrency_limit": 1})
        prefect("--no-prompt", "deploy", "--all", environment=environment)
        yield environment


@pytest.fixture
def proxy(s3: str) -> Iterator[Faults]:
    """What goes wrong on the way to that server, where AWS_ENDPOINT_URL points while a test has this."""
    with s3_proxy(s3) as faults:
        yield faults


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A --store that nobody else writes to: a folder, and a prefix on S3."""
    if request.param == "folder":
        return str(tmp_path / "runs")
    request.getfixturevalue("s3")
    return f"s3://{BUCKET}/{tmp_path.name}/runs"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster of its own, where KUBECONFIG points; its faults draw from a seed that is printed."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    (tmp_path / "cluster").mkdir()
    prepare_host()
    with fake_cluster(tmp_path / "cluster", seed) as running:
        monkeypatch.setenv("KUBECONFIG", str(running.kubeconfig(tmp_path)))
        yield running
