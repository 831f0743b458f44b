"""python tests/benchmarks/s3.py [--size-gb 1] [--rounds 3] [--store s3://BUCKET/PREFIX]

How fast a large file goes to S3 and comes back through our store, beside boto3's transfer manager with as many parts of
the same size on the same server. Without --store that is a moto process of its own, which keeps all in memory (four
times the size) and is slower than either client; the endpoint and credentials of any other come from the environment.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import boto3
from boto3.s3.transfer import TransferConfig

sys.path.insert(0, str(Path(__file__).parents[2]))

from stages.store import conditional_writes, transfer
from stages.store.layout import digest
from stages.store.remote import DIGITS, Remote
from tests.support.s3_server import BUCKET, s3_environment, s3_server


@contextmanager
def own_server() -> Iterator[None]:
    with s3_server() as endpoint, s3_environment(endpoint):
        yield


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size-gb", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, own_server() if asked.store is None else nullcontext():
        source, target = Path(folder, "source"), Path(folder, "target")
        with source.open("wb") as file:
            for _ in range(round(asked.size_gb * 1000)):
                file.write(os.urandom(10**6))
        compare(asked.store or f"s3://{BUCKET}/bench", source, target, asked.rounds)


def compare(store: str, source: Path, target: Path, rounds: int) -> None:
    sha256 = digest(source).sha256
    place, client = Remote(f"{store.rstrip('/')}/run/bench"), boto3.client("s3")
    bucket, key, _ = place.fs.split_path(f"{place.root}/theirs")
    parts = TransferConfig(
        multipart_chunksize=transfer.PART, multipart_threshold=2 * transfer.PART, max_concurrency=transfer.AT_ONCE
    )
    stored = f"ours~{sha256[:DIGITS]}" if conditional_writes.is_ignored() else "ours"
    ways: dict[str, dict[str, Callable[[], object]]] = {
        "ours": {"put": lambda: place.add("ours", source, sha256), "get": lambda: place.fetch(stored, target)},
        "boto3": {
            "put": lambda: client.upload_file(str(source), bucket, key, Config=parts),
            "get": lambda: client.download_file(bucket, key, str(target), Config=parts),
        },
    }
    speeds: dict[tuple[str, str], list[float]] = {(who, what): [] for who in ways for what in ("put", "get")}
    for each in range(rounds):
        for who in (*ways, *reversed(ways))[each % 2 * 2 :][:2]:  # taking turns at being first
            for what, do in ways[who].items():
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                began = time.monotonic()
                do()
                speeds[who, what].append(source.stat().st_size / (time.monotonic() - began) / 1e6)
                grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
                print(f"{who} {what}: {speeds[who, what][-1]:.0f} MB/s, peak memory +{grown:.0f} MiB", flush=True)
            assert digest(target).sha256 == sha256
            target.unlink()
            place.remove(stored if who == "ours" else "theirs")
    for what in ("put", "get"):
        ours, theirs = (statistics.median(speeds[who, what]) for who in ways)
        print(f"{what}: ours {ours:.0f} MB/s, boto3 {theirs:.0f} MB/s, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
