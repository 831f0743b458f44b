"""The console program `dmdr`: reads a command line, runs its command, ends with its exit code.

Whatever goes wrong is one line on stderr.
"""

from __future__ import annotations

import sys

import typer
from typer.core import TyperGroup

from dmdr.config.plain_text import to_line
from dmdr.config.secrets import refuse_secret_arguments
from dmdr.errors import USER_ERRORS, ConfigError, StoreError, describe_usage_error, doing
from flows.commands.app import app
from flows.prefect_support.connection import spare_loopback
from stages.runtime.last_wall import end_program, is_disk_failure
from stages.runtime.quiet import quiet_libraries
from stages.runtime.terminal import plain_streams

TYPERS_INTERRUPT = 130  # what typer makes of Ctrl-C


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code. Whatever goes wrong is one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if sys.platform == "win32":  # which has no fork and no fcntl, on which stages and stores rest
        print("dmdr: runs on Linux, not on Windows itself; use WSL 2, a container or a Linux machine", file=sys.stderr)
        return ConfigError.exit_code
    spare_loopback()
    quiet_libraries()
    with plain_streams():
        try:
            with doing(f"running {name_command(arguments)}"):
                return run_command(arguments)
        except OSError as error:  # of a file that the command line names, unless it says more
            if isinstance(error, USER_ERRORS) or is_disk_failure(error):
                return end_program("dmdr", error)
            return end_program("dmdr", StoreError(str(error)))
        except (Exception, KeyboardInterrupt) as error:
            return end_program("dmdr", error)


def run_command(arguments: list[str]) -> int:
    """Run a command and return its exit code. A wrong command line is one line on stderr.

    Raises:
        any error of the command.
    """
    refuse_secret_arguments(arguments)
    if arguments[:1] == ["tables"]:
        arguments = repeat_seeds(arguments)
    try:
        exit_code = typer.main.get_command(app).main(arguments, prog_name="dmdr", standalone_mode=False)
    except typer.TyperException as error:
        path = name_command(arguments)
        message = to_line(describe_usage_error(error.format_message()))
        print(f"{path}: {message}; see {path} --help", file=sys.stderr)
        return ConfigError.exit_code
    except typer.Abort:  # the end of stdin where a question was asked
        raise ConfigError("nobody can answer the question here") from None
    sys.stdout.flush()  # while a full disk can still be told
    if exit_code == TYPERS_INTERRUPT:
        raise KeyboardInterrupt
    return exit_code


def repeat_seeds(arguments: list[str]) -> list[str]:
    """`--seeds 0 1 2` as typer reads it: `--seeds 0 --seeds 1 --seeds 2`."""
    repeated: list[str] = []
    is_seed = False
    for argument in arguments:
        if argument.startswith("-") and not argument[1:].isdecimal():
            is_seed = argument == "--seeds"
        elif is_seed and repeated[-1] != "--seeds":
            repeated.append("--seeds")
        repeated.append(argument)
    return repeated


def name_command(arguments: list[str]) -> str:
    """The command that a command line begins with, for example "dmdr teachers publish"."""
    words, command = ["dmdr"], typer.main.get_command(app)
    for argument in arguments:
        if not isinstance(command, TyperGroup) or argument not in command.commands:
            break
        words.append(argument)
        command = command.commands[argument]
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main())
