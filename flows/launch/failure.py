"""How a stage fails, wherever it runs, and whether another try may help."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

from dmdr.config.plain_text import to_line
from dmdr.errors import FINAL, INTERNAL, USER_ERRORS
from flows.prefect_support import connection
from stages.runtime.last_wall import describe_end
from stages.store.artifacts import Artifact

RETRY_DELAYS = (2.0, 10.0, 30.0)  # seconds before each further try


class StageFailed(RuntimeError):
    """A stage ended without its seal.

    exit_code: of the stage. final: another try would end the same. says_more: the message says more than the stage's
    own lines do.
    """

    def __init__(self, stage: str, exit_code: int, why: str, *, final: bool = False, says_more: bool = True) -> None:
        super().__init__(f"{stage}: {why}")
        self.stage = stage
        self.exit_code, self.final, self.says_more = exit_code, final or exit_code in FINAL, says_more


def is_worth_a_retry(error: object) -> TypeGuard[StageFailed]:
    """Whether a stage failed in a way that another try may mend."""
    return isinstance(error, StageFailed) and not error.final


@contextmanager
def explain_faults(what: str) -> Iterator[None]:
    """Turn what nobody foresaw into a failure of one line, which Prefect shows as the state of the run.

    what: the stage or flow, for the beginning of the line.

    Raises:
        StageFailed: for any exception but a user's error and Prefect's own.
        StoreError, ConfigError: Prefect's server fails.
    """
    try:
        yield
    except (StageFailed, *USER_ERRORS):
        raise
    except Exception as error:
        if connection.is_answer(error):
            raise connection.translate_error(error, connection.find_server()) from None
        if type(error).__module__.startswith("prefect."):  # by which it pauses and cancels
            raise
        end = describe_end(error, what)
        raise StageFailed(what, end.exit_code, end.line, final=True) from None


def announce_retry(failure: StageFailed, tries: int) -> None:
    """Tell the user that another try follows. tries: how many there were."""
    print(f"{to_line(failure)}; trying again in {RETRY_DELAYS[tries - 1]:g} s", file=sys.stderr)


def check_sealed(artifact: Artifact) -> None:
    """
    Raises:
        StageFailed: the stage ended well, but its result is not sealed.
    """
    if artifact.record() is None:
        raise StageFailed(artifact.stage, INTERNAL, f"exit code 0, but nothing is sealed at {artifact.address}")
