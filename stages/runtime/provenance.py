"""Describe the process that made a result: code, versions, device, duration and cost."""

from __future__ import annotations

import os
import resource
import sys
import time
from importlib import metadata
from pathlib import Path

from dmdr.config.identity import fingerprint
from dmdr.config.run import Config
from stages.runtime import ranks
from stages.runtime.device import pick_device
from stages.runtime.ledger import Ledger, count_money, name_unit
from stages.store.layout import digest
from stages.store.published_teachers import teacher_name
from stages.store.records import Cost, Provenance

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "safetensors")


def describe_process(config: Config, seconds: float, ledger: Ledger | None = None) -> Provenance:
    """The provenance of a result that this process made in `seconds`. ledger: of the stage; None: it costs nothing."""
    return Provenance(
        code=list_versions(),
        device=pick_device(config),
        duration_s=round(seconds, 3),
        cost=measure_cost(config, ledger),
        teacher=teacher_name(config.teacher.path),
        start=None if config.student.start is None else teacher_name(config.student.start.path),
        processes=None if ranks.read_rank() is None else int(os.environ["WORLD_SIZE"]),
    )


def list_versions() -> dict[str, str]:
    """Versions of DMDR and its libraries, and a digest of DMDR's sources, which may differ from the released ones."""
    root = Path(__file__).parents[2]
    files = sorted(path for package in ("dmdr", "stages") for path in (root / package).rglob("*.py"))
    sources = {path.relative_to(root).as_posix(): digest(path).sha256 for path in files}
    versions = {name: metadata.version(name) for name in LIBRARIES}
    return {"version": metadata.version("dmdr"), "sources": fingerprint(sources), **versions}


def measure_cost(config: Config, ledger: Ledger | None) -> Cost:
    """The CPU time of this attempt in seconds, its peak memory in MiB, and what all attempts used."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    spent = None if ledger is None else ledger.measure(name_unit(config))
    money = None if spent is None else count_money(config, spent)
    return Cost(
        cpu_s=round(time.process_time(), 3),
        peak_memory_mib=round(peak / 2**20, 1),
        spent=spent,
        money=None if money is None else round(money, 6),
        currency=None if money is None or config.execution.price is None else config.execution.price.currency,
    )
