"""A real S3 server in a process of its own (moto), for tests of what lies on S3."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest

BUCKET = "dmdr-tests"
# S3 looks for an object and writes it in one step where a request says If-None-Match. moto does it in two, between
# which another thread may write, so that two clients both believe to have created an object.
SERVER = """
import functools, threading
from moto.s3.responses import S3Response
from moto.server import main

one_at_a_time = threading.RLock()

def alone(method):
    @functools.wraps(method)
    def call(*arguments, **named):
        with one_at_a_time:
            return method(*arguments, **named)
    return call

S3Response.put_object = alone(S3Response.put_object)
S3Response._key_response_post = alone(S3Response._key_response_post)  # which completes uploads in parts
main()
"""


@contextmanager
def s3_server() -> Iterator[str]:
    """The endpoint of a real S3 server process with one bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", SERVER, "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _await_port(port)
            with s3_environment(endpoint := f"http://127.0.0.1:{port}"):
                boto3.client("s3").create_bucket(Bucket=BUCKET)
            yield endpoint
        finally:
            server.kill()


@contextmanager
def s3_environment(endpoint: str) -> Iterator[None]:
    """Inside, clients of S3 find that server by their environment."""
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


def spoil(store: str, name: str, data: bytes | None) -> None:
    """Replace a file of a store, a folder or on S3, behind the back of its record; None deletes it."""
    if not store.startswith("s3://"):
        Path(store, name).unlink()  # a new file: the old one may be linked from elsewhere
        if data is not None:
            Path(store, name).write_bytes(data)
        return
    at = {"Bucket": BUCKET, "Key": f"{store.removeprefix(f's3://{BUCKET}/')}/{name}"}
    if data is None:
        boto3.client("s3").delete_object(**at)
    else:
        boto3.client("s3").put_object(**at, Body=data)


def _await_port(port: int) -> None:
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("the S3 server did not start")
