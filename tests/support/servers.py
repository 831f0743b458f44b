"""Servers that a test has for itself: S3, a faulty way to it, a Kubernetes cluster."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_cluster.server import Cluster, fake_cluster
from tests.support.s3_proxy import Faults, s3_proxy
from tests.support.s3_server import BUCKET, s3_server


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server of its own."""
    with s3_server() as address:
        yield address


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
    with fake_cluster(tmp_path / "cluster", seed) as running:
        monkeypatch.setenv("KUBECONFIG", str(running.kubeconfig(tmp_path)))
        yield running
