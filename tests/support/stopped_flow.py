"""python -m tests.support.stopped_flow CONFIG STORE: run a cold start as a flow does, and stop its process."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from flows.launch.failure import StageFailed
from flows.launch.process import run_stage


def stop_stage(store: Path) -> None:
    """Stop the process that works in the store, as soon as one has the lease of the cold start."""
    while not (owner := list(store.glob("*/cold_start/.attempt-lease/owner.json"))):
        time.sleep(0.05)
    os.kill(json.loads(owner[0].read_text())["process"], signal.SIGSTOP)


if __name__ == "__main__":
    threading.Thread(target=stop_stage, args=(Path(sys.argv[2]),), daemon=True).start()
    try:
        run_stage("cold_start", sys.argv[1], "tiny", sys.argv[2])
    except StageFailed as failure:
        sys.exit(failure.exit_code)
