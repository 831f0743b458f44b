"""Stands for `python -m stages` where only its outside matters: it claims, works a little and seals, quickly.

QUICK_SECONDS of work (0.1); QUICK_EXIT, with which it ends without a seal; QUICK_ONCE, a file: only its first start
ends so. SIGTERM ends it with 75, after QUICK_GRACE seconds (0). Each start adds a line to QUICK_LOG.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from dmdr.config.identity import identity
from dmdr.config.load import load_config
from stages.store.artifacts import Artifact
from tests.support.sealing import PROVENANCE


def main(stage: str, config: str, run: str, store: str) -> int:
    signal.signal(signal.SIGTERM, stop)
    if log := os.environ.get("QUICK_LOG"):
        with open(log, "a") as file:
            file.write(f"{stage}\n")
    print(f"{stage}: at work", flush=True)
    artifact = Artifact(store, run, stage)
    if artifact.claim(identity(load_config(config), stage), {"teacher": "0" * 64}) is not None:
        return 0
    time.sleep(float(os.environ.get("QUICK_SECONDS", "0.1")))
    code, once = int(os.environ.get("QUICK_EXIT", "0")), os.environ.get("QUICK_ONCE")
    if code and not (once and Path(once).exists()):
        if once:
            Path(once).touch()
        return code
    out = artifact.workspace()
    (out / "result.txt").write_text(stage)
    artifact.seal(out, facts={}, provenance=PROVENANCE)
    print(f"{stage}: sealed", flush=True)
    return 0


def stop(*_: object) -> None:
    """End as a stage does that has written its checkpoint."""
    time.sleep(float(os.environ.get("QUICK_GRACE", "0")))
    sys.exit(75)


if __name__ == "__main__":
    named = dict(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
    sys.exit(main(sys.argv[1], named["--config"], named["--run"], named["--store"]))
