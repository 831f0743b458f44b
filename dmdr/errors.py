"""What can go wrong for a user, and the exit code of the process that each error ends.

Every message says in one line what was asked, what was found and what to do. The codes are those of sysexits.h. They
stand here only: stages, flows and Kubernetes manifests read them from the classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class ConfigError(ValueError):
    """The config, or a flag, cannot mean anything; change it. Never retried."""

    exit_code: ClassVar[int] = 64


class BudgetSpent(ConfigError):
    """The run has cost what its config allows; what is done is kept. It goes on when `execution.budget` is raised.

    It shares its code with ConfigError, because nothing but a change of the config helps: it is never retried.
    """


class DataError(ValueError):
    """An input exists but is broken: truncated, wrong shape, wrong digest, too many bad lines. Never retried."""

    exit_code: ClassVar[int] = 65


class InputMissing(FileNotFoundError):
    """An input is not where the config says. Never retried."""

    exit_code: ClassVar[int] = 66


class NonFinite(FloatingPointError):
    """A loss or an image stopped being a number; nothing of that step was kept."""

    exit_code: ClassVar[int] = 70


class StoreError(OSError):
    """The artifact store, or the local disk, refused to read or write. Worth a retry."""

    exit_code: ClassVar[int] = 74


class RewardUnavailable(StoreError):
    """A reward that another process computes does not answer. Worth a retry, from a checkpoint."""


class Stopped(Exception):
    """The stage was told to stop, and its checkpoint holds what it had done. The same command continues from there."""

    exit_code: ClassVar[int] = 75


class NotPromoted(Exception):
    """A run is no better than the one that carries the name, which stays where it is. Never retried."""

    exit_code: ClassVar[int] = 77


UserError = ConfigError | DataError | InputMissing | NonFinite | StoreError | Stopped | NotPromoted
USER_ERRORS = (ConfigError, DataError, InputMissing, NonFinite, StoreError, Stopped, NotPromoted)
WHILE = "while "  # how a note of `doing` begins
SEALED = 0
INTERNAL = 70  # a fault of ours, EX_SOFTWARE; a loss that is not a number shares it
FINAL = frozenset(kind.exit_code for kind in (ConfigError, DataError, InputMissing))  # the same again ends the same
# Of several processes that failed, the code that tells most: a bad input explains the crashes that it caused elsewhere.
MOST_TELLING = (*sorted(FINAL), StoreError.exit_code, INTERNAL)
MEANINGS = {
    SEALED: "sealed",
    ConfigError.exit_code: "config, or its budget is spent",
    DataError.exit_code: "data",
    InputMissing.exit_code: "input missing",
    INTERNAL: "internal or not a number",
    StoreError.exit_code: "store or disk",
    Stopped.exit_code: "stopped after a checkpoint: repeat the command",
    NotPromoted.exit_code: "not promoted: no better",
}


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Note on any exception what was being done: "loading the teacher hub:a/b". The last line of a program says it."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{WHILE}{what}")
        raise


def exit_code_of(error: BaseException) -> int:
    """The exit code of a process that this error ends."""
    return next((kind.exit_code for kind in USER_ERRORS if isinstance(error, kind)), INTERNAL)


def describe_exit_codes() -> str:
    """One line for help texts."""
    return "exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in MEANINGS.items())


def describe_usage_error(message: str) -> str:
    """What typer says of a wrong command line, on one line."""
    return " ".join(message.replace("Value error, ", "").split()).rstrip(".")
