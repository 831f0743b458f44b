"""`python -m dmdr.planning.measure`: what DMDR reaches on this GPU, in minutes, correctness first.

Each line is written to OUT/measure.txt and OUT/measure.csv at once. When the time is over, the rest is left out.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from dmdr.planning.measure.ceilings import measure_ceilings
from dmdr.planning.measure.clock import Target, release
from dmdr.planning.measure.correctness import check_device
from dmdr.planning.measure.levers import measure_levers
from dmdr.planning.measure.profile import profile_fake_score
from dmdr.planning.measure.rivals import measure_rivals
from dmdr.planning.measure.table import Line, Table
from dmdr.planning.measure.updates import find_gpu, measure_shapes, measure_whole_update


def measure(target: Target, out: Path, *, minutes: float) -> list[Line]:
    """Measure everything, as long as the time lasts; return the lines."""
    gpu = find_gpu(torch.cuda.get_device_name()) if target.device == "cuda" else None
    sections: dict[str, Callable[[], Iterator[Line]]] = {
        "ceilings": partial(measure_ceilings, target),
        "correctness": partial(check_device, target.device),
        "shapes": partial(measure_shapes, target, gpu),
        "other code bases": partial(measure_rivals, target),
        "profile": partial(profile_fake_score, target),
        "levers": partial(measure_levers, target),
        "a whole update": partial(measure_whole_update, target),
    }
    table, end = Table(out), time.monotonic() + 60 * minutes
    for name, measure_section in sections.items():
        if time.monotonic() > end:
            table.add(Line(name, note="left out, the time is over"))
            continue
        run_section(name, measure_section(), table, end)
        release()
    return table.lines


def run_section(name: str, lines: Iterator[Line], table: Table, end: float) -> None:
    """Add the lines of a section until the time is over. An error ends it, not the run, whose minutes are paid for."""
    try:
        for line in lines:
            table.add(line)
            if time.monotonic() > end:
                table.add(Line(name, note="the rest is left out, the time is over"))
                return
    except Exception as error:
        traceback.print_exc()
        table.add(Line(name, failed=True, note=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dmdr.planning.measure", description="Measure what DMDR reaches on this GPU, correctness first."
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no further line begins")
    parser.add_argument("--tiny", action="store_true", help="every line on networks so small that a CPU runs them")
    parser.add_argument("--out", type=Path, default=Path("measure"), help="folder of the table")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        print("measure: this machine has no GPU that torch can use; --tiny tries every line on a CPU", file=sys.stderr)
        return 64
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = measure(Target(device, options.tiny), options.out, minutes=options.minutes)
    return 70 if any(line.failed for line in lines) else 0


if __name__ == "__main__":
    raise SystemExit(main())
