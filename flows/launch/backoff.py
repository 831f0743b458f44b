"""How long a cluster may not answer: tries with pauses that grow, one notice, and an end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential

from dmdr.errors import StoreError
from flows.launch.cluster_errors import ClusterUnavailable, NameTaken
from flows.launch.failure import StageFailed

OUTAGE = 900  # seconds that a cluster may not answer
FIRST = 20  # seconds that it may not answer before it has ever answered
SHORTEST, LONGEST = 0.125, 8.0  # pauses between two tries, in seconds; each is twice the one before
NOTICE = 1.0  # the pause before which the user is told, in seconds

Result = TypeVar("Result")


class Backoff:
    """Repeats the requests of a stage while its cluster does not answer."""

    def __init__(self, stage: str, say: Callable[[str], None]) -> None:
        self.stage, self.say = stage, say
        self.seconds: float = FIRST
        self._deadline = 0.0
        self._retrying = Retrying(
            retry=retry_if_exception_type(ClusterUnavailable),
            wait=wait_exponential(multiplier=SHORTEST, max=LONGEST),
            stop=self._is_over,
            before_sleep=self._notify,
            retry_error_callback=self._give_up,
        )

    def call(self, step: Callable[[], Result]) -> Result:
        """The result of `step`, which is repeated while it raises ClusterUnavailable.

        Raises:
            StageFailed: it has done so for too long.
        """
        return self._retrying(step)

    def reach(self, step: Callable[[], object]) -> None:
        """Repeat `step` until the cluster answers for the first time. What fails later is an outage, and may last
        longer than what may be a wrong address.

        Raises:
            StageFailed: it has not answered.
        """
        self.call(step)
        self.seconds = OUTAGE

    def _is_over(self, state: RetryCallState) -> bool:
        now = time.monotonic()
        if state.attempt_number == 1:  # the time counts from the first failure; the first try itself may take long
            self._deadline = now + self.seconds
        return now > self._deadline

    def _notify(self, state: RetryCallState) -> None:
        error = _error_of(state)
        if state.upcoming_sleep == NOTICE and not isinstance(error, NameTaken):
            self.say(f"{self.stage}: {error}; trying again for {self.seconds} s")

    def _give_up(self, state: RetryCallState) -> NoReturn:
        error = _error_of(state)
        remedy = "see that the cluster runs and kubectl reaches it, then repeat the command"
        raise StageFailed(self.stage, StoreError.exit_code, f"{error}; {remedy}", final=True) from error


def _error_of(state: RetryCallState) -> BaseException | None:
    return None if state.outcome is None else state.outcome.exception()
