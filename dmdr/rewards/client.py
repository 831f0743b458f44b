"""Ask a reward service: bounded in time and in bytes, again and again while it is away, and never twice for a mistake.

1. It is asked at its address alone: through no proxy, and a redirect is refused, not followed.
2. What may pass is asked again: no answer, an answer that is late, 429, and 500 to 504. After `wait` seconds without an
   answer it counts as away. Everything else is final, and says in one line whose mistake it is.
3. No torch: the digest of a service is part of a stage's identity, which is looked at before torch is imported.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

import urllib3
from pydantic import ValidationError
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential
from urllib3.exceptions import HTTPError, SSLError

from dmdr.config.own_rewards import OwnReward
from dmdr.config.plain_text import to_line
from dmdr.errors import ConfigError, DataError, RewardUnavailable
from dmdr.rewards.sources import RewardSources
from dmdr.rewards.wire import ABOUT, MOST_ANSWER, SCORE, About, Message, Refusal, ScoreAnswer, ScoreRequest

CONNECT = 10.0  # seconds that a connection may take
LONGEST_PAUSE = 15.0  # seconds between two tries
PIECE = 2**16  # bytes of an answer that are read at once
PASSES = {429, 500, 502, 503, 504}
MessageType = TypeVar("MessageType", bound=Message)


class _Away(Exception):
    """The service does not answer now. pause: seconds that it asks for."""

    def __init__(self, why: str, pause: float = 0.0) -> None:
        super().__init__(why)
        self.pause = pause


@dataclass
class RewardClient:
    """The client of one service. name: what the config calls it. waits: whether it waits for one that is away."""

    name: str
    reward: OwnReward
    sources: RewardSources = field(default_factory=RewardSources)
    waits: bool = True

    def __post_init__(self) -> None:
        assert self.reward.url is not None, "only a service has a client"
        self.url = self.reward.url.rstrip("/")
        self.pool = urllib3.PoolManager(retries=False, maxsize=1)

    def fetch_about(self) -> About:
        """Who answers. Raises as `_ask`."""
        return self._ask("GET", ABOUT, None, About)

    def fetch_scores(self, request: ScoreRequest, expected: About) -> list[float]:
        """The scores of a request. expected: who has to answer. Raises as `_ask`.

        Raises:
            DataError: the answer has another number of scores, or comes from another reward.
        """
        answer = self._ask("POST", SCORE, request, ScoreAnswer)
        found = About.model_validate(answer.model_dump(exclude={"scores"}))
        if found != expected:
            raise DataError(
                f"{self._who} is another now: {found.name} {found.version}, digest {found.digest[:12]}, and was "
                f"{expected.name} {expected.version}, digest {expected.digest[:12]}; serve the one that the run began "
                "with, or begin another run"
            )
        if len(answer.scores) != len(request.images):
            raise DataError(f"{self._who} gave {len(answer.scores)} scores for {len(request.images)} images; mend it")
        return answer.scores

    @property
    def _who(self) -> str:
        return f"the reward {self.name} at {self.url}"

    def _ask(self, method: str, path: str, request: Message | None, kind: type[MessageType]) -> MessageType:
        """The answer to a request.

        Raises:
            RewardUnavailable: it was away for too long, or the process was told to stop while it waited.
            ConfigError: there is no such service at the address, or it refuses the request.
            DataError: its reward fails, or its answer is none.
        """
        body = None if request is None else request.model_dump_json().encode()
        began = time.monotonic()
        tries = Retrying(
            retry=retry_if_exception_type(_Away),
            wait=wait_exponential(multiplier=0.25, max=LONGEST_PAUSE),
            stop=lambda state: not self.waits or self.sources.stop() or time.monotonic() - began > self.reward.wait,
            sleep=self._pause,
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            answer = tries(self._try, method, path, body)
        except _Away as away:
            raise RewardUnavailable(
                f"{self._who} does not answer ({away}), for {time.monotonic() - began:.0f} s; start it, then repeat "
                "the command, which goes on from the last checkpoint"
            ) from away
        if tries.statistics["attempt_number"] > 1:
            self.sources.say(f"{self._who} answers again after {time.monotonic() - began:.0f} s")
        try:
            return kind.model_validate_json(answer)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            where = ".".join(map(str, fault["loc"])) or "the answer"
            raise DataError(
                f"{self._who} gave an answer that is not {kind.__name__} of protocol 1 ({where}: {fault['msg']}); is "
                "it a reward service?"
            ) from None

    def _try(self, method: str, path: str, body: bytes | None) -> bytes:
        """Ask once; the body of an answer with status 200."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        limit = urllib3.Timeout(connect=min(CONNECT, self.reward.timeout), read=self.reward.timeout)
        end = time.monotonic() + self.reward.timeout
        try:
            response = self.pool.request(
                method,
                f"{self.url}{path}",
                body=body,
                headers=headers,
                timeout=limit,
                redirect=False,
                retries=False,
                preload_content=False,
            )
            with response:
                answer = b""
                while piece := response.read1(PIECE):
                    answer += piece
                    if len(answer) > MOST_ANSWER:
                        raise DataError(f"{self._who} gave an answer of more than {MOST_ANSWER:,} bytes; is it one?")
                    if time.monotonic() > end:
                        raise _Away(f"its answer took more than {self.reward.timeout:g} s")
        except SSLError as error:
            raise ConfigError(f"{self._who} has no valid certificate: {to_line(error, 200)}; correct it") from error
        except HTTPError as error:
            raise _Away(_shorten(error)) from error
        if response.status != 200:
            self._refuse(response.status, response.headers, answer)
        return answer

    def _refuse(self, status: int, headers: urllib3.HTTPHeaderDict, answer: bytes) -> NoReturn:
        """Raise what an answer of another status than 200 means."""
        if 300 <= status < 400:
            raise ConfigError(
                f"{self._who} redirects to {to_line(headers.get('Location', 'nowhere'), 200)}; redirects are not "
                "followed: give the address that answers"
            )
        try:
            why = to_line(Refusal.model_validate_json(answer).error, 400)
        except ValidationError:
            why = ""
        if status in PASSES:
            pause = headers.get("Retry-After", "0")
            raise _Away(why or f"status {status}", min(float(pause), LONGEST_PAUSE) if pause.isdecimal() else 0.0)
        if status == 422 and why:
            raise DataError(f"{self._who} failed: {why}")
        raise ConfigError(
            f"{self._who} refused the request with {status}{f': {why}' if why else ', as no reward service does'}; "
            f"correct rewards.{self.name}"
        )

    def _tell(self, state: RetryCallState) -> None:
        """Say once that it is waited for, and lengthen the pause to what it asked for."""
        away = state.outcome.exception() if state.outcome is not None else None
        assert isinstance(away, _Away) and state.next_action is not None
        if state.attempt_number == 1:
            self.sources.say(f"{self._who} does not answer ({away}); waiting for up to {self.reward.wait:g} s")
        state.next_action.sleep = max(state.next_action.sleep, away.pause)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.sources.stop():
            time.sleep(min(0.2, max(0.0, end - time.monotonic())))


def _shorten(error: HTTPError) -> str:
    """What an error of urllib3 says, without the connection that it names first."""
    text = to_line(error, 300)
    return to_line(text.rpartition("): ")[2] or text, 160)
