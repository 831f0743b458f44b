"""The command line of `python -m stages`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import typer
from typer.exceptions import TyperException

from dmdr.config.plain_text import to_line
from dmdr.config.stages import STAGES, StageName
from dmdr.errors import ConfigError, describe_exit_codes, describe_usage_error

PROGRAM = "python -m stages"
EPILOG = f"""\b
stages, in this order: {", ".join(STAGES)}

\b
Each stage reads the sealed results of the stages before it at STORE/RUN/STAGE,
and seals its own result there. A sealed stage is skipped; after a crash or a kill, the same
command continues from the last checkpoint.

\b
example: {PROGRAM} prompts --config configs/lab-flow.yaml

{describe_exit_codes()}"""


@dataclass(frozen=True)
class Options:
    """The options of `python -m stages`; None: the option is not set."""

    stage: StageName
    config: str
    run: str | None
    store: str
    teacher: str | None
    adopt: str | None

    def to_arguments(self, run: str, teacher: str | None) -> list[str]:
        """The command line for one rank of this stage."""
        arguments = [self.stage, "--config", self.config, "--run", run, "--store", self.store]
        return arguments + (["--teacher", teacher] if teacher is not None else [])


_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@_app.command(help="Run one stage of a distillation and seal its result.", epilog=EPILOG)
def _collect(
    stage: Annotated[StageName, typer.Argument(metavar="STAGE", help="one of the stages below")],
    config: Annotated[str, typer.Option(metavar="FILE", help="the run's YAML file; see configs/")],
    run: Annotated[
        str | None, typer.Option(metavar="NAME", help="the run's name (default: the config's `run`)")
    ] = None,
    store: Annotated[str, typer.Option(metavar="URL", help="a folder, or s3://BUCKET/PREFIX")] = "runs",
    teacher: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="replaces the config's teacher.path; s3://...: a published teacher"),
    ] = None,
    adopt: Annotated[
        str | None, typer.Option(metavar="RUN", help="copy this stage's result from that run of the same store")
    ] = None,
) -> Options:
    return Options(stage, config, run, store, teacher, adopt)


def parse(arguments: list[str]) -> Options | int:
    """Read the command line. Returns an exit code if there is nothing to run: after --help, or after a wrong option."""
    try:
        result = _app(arguments, prog_name=PROGRAM, standalone_mode=False)
    except TyperException as error:
        print(
            f"{PROGRAM}: {to_line(describe_usage_error(error.format_message()))}; {PROGRAM} --help shows what there is",
            file=sys.stderr,
        )
        return ConfigError.exit_code
    return result if isinstance(result, Options) else 0
