"""A reward in another process: real HTTP on loopback, and every way in which a service can fail."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from dmdr.config.own_rewards import OwnReward
from dmdr.errors import ConfigError, DataError, NonFinite, RewardUnavailable
from dmdr.rewards.client import RewardClient
from dmdr.rewards.lab import load_lab_reward
from dmdr.rewards.png import decode_image, encode_image
from dmdr.rewards.server import MOST_WAITING, RewardServer
from dmdr.rewards.service import ServiceReward
from dmdr.rewards.sources import RewardSources
from dmdr.rewards.wire import About, ScoreRequest
from flows.commands.check import ask_services

pytestmark = pytest.mark.process  # each starts a server, in a thread

ABOUT = About(name="mine", version="1", digest="ab" * 32)
PROMPTS = ["a red circle", "two blue squares", "a green cross"]
Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def serve(server: ThreadingHTTPServer) -> Iterator[str]:
    """Run a server in a thread; its address."""
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """A server that answers every request in one way."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer(self)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    with serve(server) as url:
        yield url


def send(status: int, body: object = None, text: str | None = None, **headers: str) -> Answer:
    data = (json.dumps(body) if text is None else text).encode()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def ours(reward: object, about: About = ABOUT) -> RewardServer:
    return RewardServer(reward, about, host="127.0.0.1", port=0, device="cpu")


def connect(url: str, sources: RewardSources | None = None, **settings: object) -> ServiceReward:
    return ServiceReward(
        "judge", OwnReward(url=url, **{"wait": 0.3, "timeout": 5.0, **settings}), sources or RewardSources()
    )


def pictures(count: int = 3) -> torch.Tensor:
    levels = torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(2))
    return levels.float() / 255


class Reads:
    """Scores by the metadata that arrives."""

    name, differentiable = "reads", False

    def __call__(self, images, prompts, metadata=()):
        pairs = zip(prompts, metadata, strict=True)
        return torch.tensor([float(each["mark"]["deep"][0]) + len(prompt) for prompt, each in pairs])


def test_a_served_reward_gives_the_scores_that_it_gives_here():
    """Of images of 8 bits, whatever the size of a request; and the metadata arrives as it is."""
    reward, images = load_lab_reward("lab-conv", "cpu"), pictures()
    with serve(ours(reward)) as url:
        assert torch.equal(connect(url)(images, PROMPTS), reward(images, PROMPTS))
        assert torch.allclose(connect(url, batch=2)(images, PROMPTS), reward(images, PROMPTS), atol=0, rtol=1e-4)
    known = [{"prompt": prompt, "mark": {"deep": [n]}} for n, prompt in enumerate(PROMPTS)]
    with serve(ours(Reads())) as url:
        assert connect(url)(images, PROMPTS, known).tolist() == [len(PROMPTS[n]) + n for n in range(3)]


def test_an_image_comes_back_as_it_went():
    pixels = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(encode_image(pixels)), pixels)


GOOD = {**ABOUT.model_dump(), "scores": [0.1, 0.2, 0.3]}


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (send(302, Location="http://elsewhere/"), ConfigError, "redirects to http://elsewhere/; redirects are not"),
        (send(404, {"detail": "no"}), ConfigError, "refused the request with 404, as no reward service does"),
        (send(400, {"error": "no such size"}), ConfigError, "with 400: no such size; correct rewards.judge"),
        (send(422, {"error": "it raised"}), DataError, "failed: it raised"),
        (send(200, text="<html>"), DataError, "is not ScoreAnswer of protocol 1"),
        (send(200, {**GOOD, "more": 1}), DataError, "more: Extra inputs"),
        (send(200, {**GOOD, "protocol": 2}), DataError, "protocol: Input should be 1"),
        (send(200, {**GOOD, "scores": ["0.1", 0.2, 0.3]}), DataError, "scores.0"),
        (send(200, {**GOOD, "scores": [0.1]}), DataError, "gave 1 scores for 3 images"),
        (send(200, {**GOOD, "scores": [0.1, float("nan"), 0.2]}), NonFinite, "gives 1 of 3 images a score that is not"),
        (send(200, {**GOOD, "digest": "cd" * 32}), DataError, "is another now: mine 1, digest cdcdcdcdcdcd, and was"),
        (send(200, text=" " * (2**20 + 1)), DataError, "more than 1,048,576 bytes"),
        (send(500), RewardUnavailable, "does not answer .status 500."),
        (send(503, {"error": "too many"}, Retry_After="1"), RewardUnavailable, "does not answer .too many."),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_a_service_does_wrong_is_one_line(answer, error, message):
    with serve(ours(load_lab_reward("lab-conv", "cpu"))) as url:
        reward = connect(url)
    with answering(answer) as url:
        reward.client = RewardClient("judge", OwnReward(url=url, wait=0.3, timeout=5.0))
        with pytest.raises(error, match=message) as raised:
            reward(pictures(), PROMPTS)
    assert "\n" not in str(raised.value)


def test_a_service_that_is_late_or_drips_is_away():
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(20):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)

    for answer in (lambda handler: time.sleep(0.6), drip):
        with answering(answer) as url, pytest.raises(RewardUnavailable, match="does not answer"):
            began = time.monotonic()
            connect(url, timeout=0.2, wait=0.1)
        assert time.monotonic() - began < 5


def test_an_outage_is_waited_out_and_told_once():
    """Nobody listens at first; then the service comes at the same port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said: list[str] = []
    server: list[RewardServer] = []

    def begin() -> None:
        server.append(RewardServer(Reads(), ABOUT, host="127.0.0.1", port=port, device="cpu"))
        server[0].serve_forever(poll_interval=0.01)

    timer = threading.Timer(0.4, begin)
    timer.start()
    reward = connect(f"http://127.0.0.1:{port}", RewardSources(say=said.append), wait=30.0)
    server[0].shutdown()
    timer.join()
    server[0].server_close()
    assert reward.about == ABOUT
    first, last = said
    assert "does not answer" in first and "waiting for up to 30 s" in first and "answers again after" in last


def test_a_stage_that_is_told_to_stop_waits_no_longer():
    stops = iter([False, False, True])
    sources = RewardSources(stop=lambda: next(stops, True))
    began = time.monotonic()
    with pytest.raises(RewardUnavailable):
        connect("http://127.0.0.1:9", sources, wait=600.0)
    assert time.monotonic() - began < 10


def test_loopback_is_asked_without_a_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serve(ours(Reads())) as url:
        assert connect(url).about == ABOUT


def test_too_many_at_once_are_told_to_come_again():
    """One is scored, a few wait, the rest comes again; all get their scores."""
    gate = threading.Event()

    class Slow(Reads):
        def __call__(self, images, prompts, metadata=()):
            gate.wait(20)
            return images.mean((1, 2, 3))

    server = ours(Slow())
    refused: list[int] = []

    class Counting(server.RequestHandlerClass):
        def _refuse(self, status: int, why: str) -> None:
            refused.append(status)
            super()._refuse(status, why)

    server.RequestHandlerClass = Counting
    found: list[torch.Tensor] = []
    with serve(server) as url:
        reward = connect(url, wait=60.0)
        threads = [
            threading.Thread(target=lambda: found.append(connect(url, wait=60.0)(pictures(), PROMPTS)))
            for _ in range(MOST_WAITING + 3)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 20
        while len(refused) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        gate.set()
        for thread in threads:
            thread.join()
        expected = reward(pictures(), PROMPTS)
    assert set(refused) == {503} and len(found) == len(threads)
    assert all(torch.equal(each, expected) for each in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ["one"]}, "3 images, 1 prompts, 3 records"),
        ({"images": ["AAAA"] * 3}, "no PNG"),
        ({"images": [encode_image(np.zeros((n, 8, 3), np.uint8)) for n in (8, 8, 9)]}, "different sizes"),
    ],
)
def test_a_wrong_request_is_refused_by_the_server(change, message):
    known = [{"prompt": prompt, "mark": {"deep": [1]}} for prompt in PROMPTS]
    good = {"images": [encode_image(np.zeros((8, 8, 3), np.uint8))] * 3, "prompts": PROMPTS, "metadata": known}
    with serve(ours(Reads())) as url:
        client = RewardClient("judge", OwnReward(url=url, wait=0.3))
        assert client.fetch_scores(ScoreRequest(**good), ABOUT) == [13.0, 17.0, 14.0]
        with pytest.raises(ConfigError, match=message):
            client.fetch_scores(ScoreRequest(**{**good, **change}), ABOUT)


def test_a_reward_that_raises_in_its_process_is_one_line_here():
    with serve(ours(Reads())) as url, pytest.raises(DataError, match="failed: KeyError: 'mark'"):
        connect(url)(pictures(), PROMPTS)


def test_dmdr_check_asks_a_service_and_does_not_wait():
    away = OwnReward(url="http://127.0.0.1:9", wait=600.0)
    began = time.monotonic()
    with pytest.raises(RewardUnavailable, match="the reward judge at http://127.0.0.1:9 does not answer"):
        ask_services(["judge"], RewardSources(own={"judge": away}))
    assert time.monotonic() - began < 10
    with serve(ours(Reads())) as url:
        assert ask_services(["judge"], RewardSources(own={"judge": OwnReward(url=url)})) == {"judge": ABOUT.digest}
