"""`dmdr lab build {teacher,rewards} --out DIR`: make again, from their recipes, what ships in dmdr/lab."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Build, printing a line every hundred steps; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="dmdr lab build",
        description="Train the lab's teacher (about 50 minutes on two idle cores) or its two rewards (about 20) anew.",
    )
    parser.add_argument("what", choices=("teacher", "rewards"))
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args(argv)

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if arguments.what == "rewards":
        from dmdr.lab.reward import RECIPES, build_reward

        for name in RECIPES:
            build_reward(name, arguments.out, log)
        return 0

    from dmdr.lab.scores import teacher_scores
    from dmdr.lab.teacher import build_teacher

    build_teacher(arguments.out, log)
    scores = teacher_scores(arguments.out, guidance_scale=3.0)
    (arguments.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    log(json.dumps(scores))
    return 0
