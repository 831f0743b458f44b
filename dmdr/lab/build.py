"""`dmdr lab build WHAT --out DIR`: build the models of dmdr/lab again from their recipes."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer.exceptions import TyperException

from dmdr.errors import ConfigError, InputMissing, describe_usage_error

if TYPE_CHECKING:  # importing it would make the help wait for torch
    from dmdr.lab.fitting import Log

PROGRAM = "dmdr lab build"
TeacherName = Literal["flow", "denoising", "fashion"]
OtherName = Literal["rewards", "fashion-rewards", "fashion-judge"]
DESCRIPTION = """Train models of the lab again, on two idle CPU cores.

A teacher takes about 50 minutes (fashion 10), the rewards of a world 20 (fashion 8), the classifier of fashion's judge
3. All models of fashion need the Debian package dataset-fashion-mnist.
"""


@dataclass(frozen=True)
class Options:
    """What to build, and the folder to write to."""

    what: TeacherName | OtherName
    out: Path


_app = typer.Typer(
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@_app.command(help=DESCRIPTION)
def _collect(
    what: Annotated[Literal[TeacherName, OtherName], typer.Argument(metavar="WHAT", help="the models to build")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder to write to")],
) -> Options:
    return Options(what, out)


def main(arguments: list[str]) -> int:
    """Build what the command line names, print a line every hundred steps, and return the exit code."""

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        options = _app(arguments, prog_name=PROGRAM, standalone_mode=False)
    except TyperException as error:
        message = describe_usage_error(error.format_message())
        log(f"{PROGRAM}: {message}; see {PROGRAM} --help")
        return ConfigError.exit_code
    if not isinstance(options, Options):  # --help
        return 0
    try:
        build(options.what, options.out, log)
    except InputMissing as error:
        log(f"{PROGRAM} {options.what}: {error}")
        return InputMissing.exit_code
    return 0


def build(name: TeacherName | OtherName, folder: Path, log: Log) -> None:
    """Build a teacher or the other models of this name into `folder`.

    Raises:
        InputMissing: Fashion-MNIST is not installed, and the models need it.
    """
    from dmdr.lab import reward
    from dmdr.lab.fashion import reward as fashion_reward
    from dmdr.lab.fashion.classifier import build_classifier

    match name:
        case "rewards":
            for recipe_name in reward.RECIPES:
                reward.build_reward(recipe_name, folder, log)
        case "fashion-rewards":
            for recipe_name in fashion_reward.RECIPES:
                fashion_reward.build_fashion_reward(recipe_name, folder, log)
        case "fashion-judge":
            build_classifier(folder, log)
        case teacher:
            build_teacher(teacher, folder, log)


def build_teacher(name: TeacherName, folder: Path, log: Log) -> None:
    """Build a teacher into `folder`, and write its scores to scores.json there."""
    from dmdr.lab.checker_metric import LabChecker
    from dmdr.lab.denoising import build_denoising
    from dmdr.lab.fashion.judge_metric import FashionJudge
    from dmdr.lab.fashion.prompts import fashion_prompts
    from dmdr.lab.fashion.teacher import build_fashion
    from dmdr.lab.flow import build_flow
    from dmdr.lab.prompts import lab_prompts
    from dmdr.lab.scores import score_teacher

    {"flow": build_flow, "denoising": build_denoising, "fashion": build_fashion}[name](folder, log)
    if name == "fashion":  # this world has few prompts, so each gets four images
        scores = score_teacher(folder, FashionJudge(), 4 * fashion_prompts("held-out"), guidance_scale=3.0)
    else:
        scores = score_teacher(folder, LabChecker(), lab_prompts("held-out"), guidance_scale=3.0)
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    log(json.dumps(scores))
