"""Host a reward in a process of its own, for a training stage elsewhere: `wire.py` says what is asked and answered.

1. One batch is scored at a time. A few requests wait; more are told to come again (503), so that memory stays bounded.
2. What the request gets wrong is 400, 404, 405 or 413, what the reward gets wrong 422; each with one line why.
3. It asks for no password: let only those reach it that may. It listens on this machine alone unless told otherwise.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, cast

import numpy as np
import torch
from pydantic import ValidationError

from dmdr.config.plain_text import to_line
from dmdr.config.prompt_record import PromptRecord
from dmdr.errors import USER_ERRORS
from dmdr.rewards.png import decode_image
from dmdr.rewards.protocol import Reward
from dmdr.rewards.wire import ABOUT, MOST_BYTES, SCORE, About, Message, Refusal, ScoreAnswer, ScoreRequest

MOST_WAITING = 4  # requests beside the one that is scored
SLOW = 60.0  # seconds that a client may take to send the next bytes


class RewardServer(ThreadingHTTPServer):
    """Serves one reward at (host, port); port 0 takes a free one."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, reward: Reward, about: About, *, host: str, port: int, device: str) -> None:
        self.reward, self.about, self.device = reward, about, device
        self.turn, self.places = threading.Lock(), threading.BoundedSemaphore(1 + MOST_WAITING)
        super().__init__((host, port), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no fault of ours; anything else is told on stderr."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @torch.no_grad()
    def score(self, request: ScoreRequest) -> ScoreAnswer:
        """The scores of a request.

        Raises:
            ValueError: an image is none, or there is not one prompt and one record for each.
            any error of the reward.
        """
        count = len(request.images)
        if not len(request.prompts) == len(request.metadata) == count:
            raise ValueError(
                f"{count} images, {len(request.prompts)} prompts, {len(request.metadata)} records; send one of each"
            )
        images = [decode_image(each) for each in request.images]
        if len({image.shape for image in images}) > 1:
            raise ValueError("the images have different sizes; send those of one size together")
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().float().div(255).to(self.device)
        metadata = cast(Sequence[PromptRecord], request.metadata)
        try:
            with self.turn:
                scores = self.reward(pixels, request.prompts, metadata).tolist()
        except Exception as error:
            raise _RewardFailed(error) from error
        if len(scores) != count or not all(math.isfinite(each) for each in scores):
            raise _RewardFailed(ValueError(f"it gives {count} images the scores {to_line(scores, 100)}"))
        return ScoreAnswer(**self.about.model_dump(), scores=scores)


class _RewardFailed(Exception):
    """The reward raised an error, or gave no scores."""

    def __init__(self, error: Exception) -> None:
        named = str(error) if isinstance(error, USER_ERRORS) else f"{type(error).__name__}: {error}"
        super().__init__(to_line(named, 400))


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection, which may ask several times."""

    server: RewardServer
    protocol_version = "HTTP/1.1"
    timeout = SLOW
    KNOWN: ClassVar[dict[str, str]] = {ABOUT: "GET", SCORE: "POST"}

    def do_GET(self) -> None:
        if self.path == ABOUT:
            self._answer(200, self.server.about)
        else:
            self._refuse_path()

    def do_POST(self) -> None:
        if self.path != SCORE:
            self._refuse_path()
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            self._refuse(413, f"a request has a Content-Length of at most {MOST_BYTES:,} bytes; send fewer images")
            return
        if not self.server.places.acquire(blocking=False):
            self._refuse(503, f"{1 + MOST_WAITING} requests wait already")
            return
        try:
            self._score(self.rfile.read(int(length)))
        finally:
            self.server.places.release()

    def _score(self, body: bytes) -> None:
        try:
            answer = self.server.score(ScoreRequest.model_validate_json(body))
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            self._refuse(400, f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}")
        except ValueError as error:
            self._refuse(400, str(error))
        except _RewardFailed as error:
            self._refuse(422, str(error))
        else:
            self._answer(200, answer)

    def _refuse_path(self) -> None:
        known = self.KNOWN.get(self.path)
        self._refuse(405 if known else 404, f"ask GET {ABOUT} or POST {SCORE}")

    def _refuse(self, status: int, why: str) -> None:
        self.close_connection = True  # the rest of its request is not read
        self._answer(status, Refusal(error=to_line(why, 400)))

    def _answer(self, status: int, message: Message) -> None:
        body = message.model_dump_json().encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 503:
            self.send_header("Retry-After", "1")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Requests are not logged: a run asks many times."""
