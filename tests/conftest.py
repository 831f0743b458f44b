"""What holds for every test: where fixtures come from, the environment, and what a test costs."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator

import pytest

from dmdr.rewards import torchvision_shim

pytest_plugins = [
    f"tests.support.{name}"
    for name in (
        "job_stage",
        "servers",
        "store_bench",
        "tiny_configs",
        "tiny_judges",
        "tiny_rewards",
        "tiny_teachers",
    )
]

# Fixtures that start a server; the parameter "s3" of `store` and `bench` starts one, too.
SERVERS = {"cluster", "prefect_server", "proxy", "s3"}

torchvision_shim.install()  # before a test imports a library that imports torchvision
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only get in each other's way
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark by cost: all of tests/e2e as `e2e`, what has a server of its own as `process`.

    A test that starts another process by itself is marked `process` where it stands.
    """
    for item in items:
        parameters = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
        if "/tests/e2e/" in item.path.as_posix():
            item.add_marker("e2e")
        elif SERVERS.intersection(item.fixturenames) or "s3" in parameters:
            item.add_marker("process")


def pytest_collection_finish() -> None:
    """Leave the libraries out of every garbage collection to come: there are a million objects of theirs."""
    gc.collect()
    gc.freeze()


STARTS_A_PROCESS = {"os.fork", "os.posix_spawn", "subprocess.Popen"}  # Python's audit events
_cheap: list[str] = []  # the test that runs now, if it promised to start none


def _refuse_a_process(event: str, arguments: tuple[object, ...]) -> None:
    if event in STARTS_A_PROCESS and _cheap:
        raise AssertionError(f"{_cheap[0]} starts a process ({event}): mark it @pytest.mark.process")


sys.addaudithook(_refuse_a_process)


@pytest.fixture(autouse=True)
def cost(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test without a mark of its cost starts no process."""
    if not any(request.node.get_closest_marker(mark) for mark in ("process", "e2e")):
        _cheap.append(request.node.name)
    yield
    _cheap.clear()
