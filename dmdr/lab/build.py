"""`dmdr lab build WHAT --out DIR`: make again, from their recipes, what ships in dmdr/lab."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dmdr.errors import InputMissing

if TYPE_CHECKING:  # without it, the help would wait for torch
    from dmdr.lab.fitting import Log

TEACHERS = ("flow", "denoising", "fashion")
OTHERS = ("rewards", "fashion-rewards", "fashion-judge")


def main(argv: list[str] | None = None) -> int:
    """Build, printing a line every hundred steps; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="dmdr lab build",
        description="Train anew, on two idle cores, a teacher of the lab (about 50 minutes, fashion 10), the rewards "
        "of a world (20, fashion 8) or the classifier of fashion's judge (3). All of fashion needs the Debian package "
        "dataset-fashion-mnist.",
    )
    parser.add_argument("what", choices=(*TEACHERS, *OTHERS))
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args(argv)

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        if arguments.what in TEACHERS:
            build_teacher(arguments.what, arguments.out, log)
        else:
            build_other(arguments.what, arguments.out, log)
    except InputMissing as error:
        log(f"dmdr lab build {arguments.what}: {error}")
        return os.EX_NOINPUT
    return 0


def build_other(name: str, folder: Path, log: Log) -> None:
    """One of OTHERS into `folder`."""
    from dmdr.lab import reward
    from dmdr.lab.fashion import reward as fashion_reward
    from dmdr.lab.fashion.classifier import build_classifier

    if name == "rewards":
        for each in reward.RECIPES:
            reward.build_reward(each, folder, log)
    elif name == "fashion-rewards":
        for each in fashion_reward.RECIPES:
            fashion_reward.build_fashion_reward(each, folder, log)
    else:
        build_classifier(folder, log)


def build_teacher(name: str, folder: Path, log: Log) -> None:
    """One of TEACHERS into `folder`, with its scores beside it."""
    from dmdr.lab.checker_metric import LabChecker
    from dmdr.lab.denoising import build_denoising
    from dmdr.lab.fashion.judge_metric import FashionJudge
    from dmdr.lab.fashion.prompts import fashion_prompts
    from dmdr.lab.fashion.teacher import build_fashion
    from dmdr.lab.flow import build_flow
    from dmdr.lab.prompts import lab_prompts
    from dmdr.lab.scores import score_teacher

    {"flow": build_flow, "denoising": build_denoising, "fashion": build_fashion}[name](folder, log)
    if name == "fashion":  # four images a prompt: it has few prompts
        scores = score_teacher(folder, FashionJudge(), 4 * fashion_prompts("held-out"), guidance_scale=3.0)
    else:
        scores = score_teacher(folder, LabChecker(), lab_prompts("held-out"), guidance_scale=3.0)
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    log(json.dumps(scores))
