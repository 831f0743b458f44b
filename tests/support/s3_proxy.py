"""A proxy in front of an S3 server that does to requests what networks and overloaded stores do."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code} it is</Message></Error>'
BUSY = ["SlowDown", "ServiceUnavailable", ""]  # the last without any body, as load balancers answer


@dataclass
class Faults:
    """What befalls requests; shares are of 1 and drawn anew for each request."""

    busy: float = 0.0  # answered 503 before the server saw them
    cut: float = 0.0  # of GET: the body ends in the middle
    lost: float = 0.0  # of PUT and POST: done by the server, and then the connection closes
    unconditional: str = ""  # where a request has this in its line, the server never sees If-None-Match
    short: str = ""  # where a request has this in its line, the server gets all but the last byte of its body
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)  # part of a request's line: status and code
    flip: str = ""  # where a GET has this in its line, `flipped` answers more arrive with a wrong bit
    flipped: int = 0
    empty_lists: int = 0  # so many listings come back empty
    busy_until: float = 0.0  # by the monotonic clock: until then every request is answered 503
    silent: bool = False  # no answer at all
    expired: str = ""  # the id of an access key whose requests are refused
    seen: list[str] = field(default_factory=list)  # the lines of all requests
    sizes: list[tuple[str, int]] = field(default_factory=list)  # the line of each GET, and the bytes of its answer
    headers: list[dict[str, str]] = field(default_factory=list)  # the headers of all requests
    random: random.Random = field(default_factory=random.Random)

    @property
    def sent(self) -> int:
        """Bytes of all answers to GET."""
        return sum(size for _, size in self.sizes)

    def befalls(self, share: float) -> bool:
        return self.random.random() < share


@contextmanager
def s3_proxy(server: str, seed: int | None = None) -> Iterator[Faults]:
    """Let AWS_ENDPOINT_URL be a proxy in front of `server`; the faults may be changed at any time."""
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    print(f"proxy seed {seed}")
    faults = Faults(random=random.Random(seed))

    class Handler(_Handler):
        pass

    Handler.faults, Handler.server_address = faults, urlsplit(server).netloc
    with _Server(("127.0.0.1", 0), Handler) as proxy, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        try:
            yield faults
        finally:
            proxy.shutdown()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client may keep its connection open

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed closes its connection in the middle."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    faults: Faults
    server_address: str

    def log_message(self, *arguments: object) -> None:
        """Tests look at what was seen instead."""

    def do(self) -> None:
        line, faults = f"{self.command} {self.path}", self.faults
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        faults.seen.append(line)
        faults.headers.append({name.lower(): value for name, value in self.headers.items()})
        if faults.silent:
            self.close_connection = True
            threading.Event().wait(60)
        elif faults.expired and f"Credential={faults.expired}/" in self.headers.get("Authorization", ""):
            self.reply(*refusal(400, "ExpiredToken"))
        elif found := [answer for part, answer in faults.answers.items() if part in line]:
            self.reply(*refusal(*found[0]))
        elif faults.befalls(faults.busy) or time.monotonic() < faults.busy_until:
            self.reply(*refusal(503, faults.random.choice(BUSY)))
        else:
            self.forward(line, body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do

    def forward(self, line: str, body: bytes) -> None:
        faults = self.faults
        dropped = {"expect", "connection", "content-length"}
        if faults.unconditional and faults.unconditional in line:
            dropped.add("if-none-match")
        if faults.short and faults.short in line:
            body = body[:-1]
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        server = http.client.HTTPConnection(self.server_address, timeout=60)
        server.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
        answer = server.getresponse()
        data = answer.read()
        server.close()
        if self.command in ("PUT", "POST") and faults.befalls(faults.lost):
            self.close_connection = True
            return
        if "list-type=2" in line and faults.empty_lists > 0:
            faults.empty_lists -= 1
            data = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
        elif self.command == "GET" and faults.flip and faults.flip in line and faults.flipped > 0:
            faults.flipped -= 1
            if faults.flipped % 2:  # a proxy that changes a body may or may not pass S3's own checksum on
                answer.headers = {n: v for n, v in answer.headers.items() if "checksum" not in n.lower()}
            data = bytes([data[0] ^ 1]) + data[1:]
        if self.command == "GET":
            faults.sizes.append((line, len(data)))
        cut = self.command == "GET" and len(data) > 1 and faults.befalls(faults.cut)
        self.reply(answer.status, dict(answer.headers), data, len(data) // 2 if cut else len(data))

    def reply(self, status: int, headers: dict[str, str], data: bytes, sent: int) -> None:
        self.send_response_only(status)
        hop = {"connection", "transfer-encoding", "content-length"}
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        for name, value in headers.items():
            if name.lower() not in hop:
                self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:sent])
        if sent < len(data):
            self.close_connection = True


def refusal(status: int, code: str) -> tuple[int, dict[str, str], bytes, int]:
    data = ERROR.format(code=code).encode() if code else b""
    return status, {"Content-Type": "application/xml"}, data, len(data)
