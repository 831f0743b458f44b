"""Prefect's server: what is wrong with its address or its answer is one line, and no proxy stands before loopback."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from dmdr.errors import ConfigError, StoreError
from flows.launch.failure import StageFailed, explain_faults
from flows.prefect_support import connection

ROOT = Path(__file__).parents[3]


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers with the status that the path begins with; true to all else."""

    def do_GET(self) -> None:
        first = self.path.split("/")[1]
        self.send_response(int(first) if first.isdecimal() else 200)
        self.end_headers()
        self.wfile.write(b"true")

    def log_message(self, *about: object) -> None:
        pass


@pytest.fixture(scope="module")
def stub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.mark.parametrize(
    ("address", "kind", "message"),
    [
        ("http://{stub}/api", ConfigError, "what answers there is no Prefect API; give the address of one"),
        ("http://{stub}/404/api", ConfigError, "is no Prefect API .*404 Not Found.*ends in /api"),
        ("http://{stub}/500/api", StoreError, "does not answer .*500 Internal Server Error.*unset PREFECT_API_URL"),
        ("https://{stub}/api", StoreError, "does not answer .*SSL.*unset PREFECT_API_URL"),
        ("http://127.0.0.1:9/api", StoreError, "does not answer .*refused.*start it, or unset PREFECT_API_URL"),
    ],
)
def test_what_a_server_answers_is_one_line(
    address: str, kind: type[Exception], message: str, stub: str, monkeypatch: pytest.MonkeyPatch
):
    address = address.format(stub=stub)
    monkeypatch.setenv("PREFECT_API_URL", address)
    with temporary_settings({PREFECT_API_URL: address}):
        assert connection.find_server() == address
        with pytest.raises(kind, match=f"PREFECT_API_URL of the environment.*{message}") as refusal:
            connection.check_server(address)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("somewhere", "is 'somewhere', which is no address"),
        ("http://[::1/api", "is .*, which is no address"),
        ("ftp://host/api", "is .*, which is no address"),
        ("http://me:Ca7ary@host/api", "holds a password or a token; take it out and set PREFECT_API_AUTH_STRING"),
    ],
)
def test_an_address_that_is_none_is_refused(address: str, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_API_URL", address)
    with pytest.raises(ConfigError, match=f"PREFECT_API_URL of the environment {message}") as refusal:
        connection.find_server()
    assert "Ca7ary" not in str(refusal.value)


@pytest.mark.process
def test_an_address_of_a_profile_is_named_as_such(tmp_path: Path):
    profile = 'active = "work"\n[profiles.work]\nPREFECT_API_URL = "http://127.0.0.1:9/api"\n'
    (tmp_path / "profiles.toml").write_text(profile)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    ended = subprocess.run(
        [sys.executable, "-m", "flows.cli", "run", "quickstart", "--store", str(tmp_path / "runs")],
        env={**clean, "PREFECT_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "HTTP_PROXY": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 74 and ended.stderr.count("\n") == 1
    assert "PREFECT_API_URL of Prefect's profile work, does not answer" in ended.stderr
    assert "prefect config unset PREFECT_API_URL" in ended.stderr


@pytest.mark.parametrize(
    ("given", "spared"),
    [
        ({"HTTP_PROXY": "http://p"}, "127.0.0.1,localhost,::1"),
        ({"http_proxy": "http://p", "no_proxy": "corp"}, "corp,127.0.0.1,localhost,::1"),
        ({"ALL_PROXY": "http://p", "NO_PROXY": "localhost"}, "localhost,127.0.0.1,::1"),
        ({"https_proxy": "http://p", "NO_PROXY": "*"}, "*"),
        ({}, None),
    ],
)
def test_loopback_never_goes_through_a_proxy(
    given: dict[str, str], spared: str | None, stub: str, monkeypatch: pytest.MonkeyPatch
):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        for each in (name, name.upper()):
            monkeypatch.setenv(each, "")  # so that it is restored
            monkeypatch.delenv(each)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    connection.spare_loopback()
    assert (os.environ.get("no_proxy"), os.environ.get("NO_PROXY")) == (spared, spared)
    assert httpx.get(f"http://{stub}/").status_code == 200


def test_a_fault_in_a_flow_is_one_line_of_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    message = "^flow dmdr: a fault of DMDR: KeyError: 'x'.* stack is in"
    with pytest.raises(StageFailed, match=message) as failed, explain_faults("flow dmdr"):
        raise KeyError("x")
    assert failed.value.exit_code == 70 and failed.value.final and "\n" not in str(failed.value)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    message = "Prefect's embedded server fails .gone.; the same command goes on"
    with pytest.raises(StoreError, match=message), explain_faults("flow dmdr"):
        raise httpx.ConnectError("gone")
