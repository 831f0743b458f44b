"""python -m tests.support.hurried_stage SECONDS STAGE ...: a stage that has only SECONDS after a signal to stop."""

from __future__ import annotations

import runpy
import sys

from stages.runtime import stop_signal

if __name__ == "__main__":
    stop_signal.TIME = float(sys.argv.pop(1))
    runpy.run_module("stages", run_name="__main__", alter_sys=True)
