"""The log lines of a stage's pods, as they come. A lost line does no harm: what matters is in the artifact."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from threading import Event, Thread

import urllib3
from kubernetes import client

from flows.launch.cluster_errors import MISSING
from flows.launch.manifest import CONTAINER

PAUSE = 1.0  # seconds until a log that broke off is read again
FORBIDDEN = 403
DIGITS = 9  # of the fraction of a second
LINE = re.compile(  # RFC 3339, a space and the text; the container runtime writes the time in the node's own zone
    r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d) ?(.*)", re.DOTALL
)


class Logs:
    """Follows the logs of a stage's pods, each in a thread of its own."""

    def __init__(self, core: client.CoreV1Api, namespace: str, say: Callable[[str], None]) -> None:
        self.core, self.namespace, self.say = core, namespace, say
        self._threads: dict[str, Thread] = {}
        self._over = Event()

    def follow(self, pod: str, prefix: str) -> None:
        """Start to follow a pod, unless it is followed already. prefix: stands before each of its lines."""
        if pod not in self._threads:
            self._threads[pod] = Thread(target=self._follow, args=(pod, prefix), daemon=True)
            self._threads[pod].start()

    def finish(self, seconds: float) -> None:
        """Wait up to `seconds` for the last lines."""
        self._over.set()
        until = time.monotonic() + seconds
        for thread in self._threads.values():
            thread.join(max(0.0, until - time.monotonic()))

    def _follow(self, pod: str, prefix: str) -> None:
        place = Place()
        while True:
            is_last = self._over.is_set()
            place.start_over()
            try:
                answer: urllib3.HTTPResponse = self.core.read_namespaced_pod_log(  # type: ignore[assignment]  # not str:
                    pod,
                    self.namespace,
                    container=CONTAINER,
                    follow=not is_last,
                    timestamps=True,
                    _preload_content=False,  # with it, the client returns the response itself
                    _request_timeout=(5, 3600),
                )
                for line in iterate_lines(answer.stream(decode_content=False)):
                    if (text := place.take(line)) is not None:
                        self.say(f"{prefix}{text}")
            except client.ApiException as error:
                if error.status in (FORBIDDEN, MISSING):
                    return
            except urllib3.exceptions.HTTPError:
                pass
            if is_last:
                return
            self._over.wait(PAUSE)


class Place:
    """How far the log of a pod was read. It is read from its beginning each time that a connection breaks off.

    Kubernetes writes the time before each line of the container. A line without one is the kubelet's own, such as
    "unable to retrieve container logs for containerd://...": no line of the stage, and no place in its log.
    """

    def __init__(self) -> None:
        self._last: tuple[datetime, str] | None = None  # the time of the last line that was taken
        self._taken, self._met = 0, 0  # lines of that time: taken so far, and met in this reading

    def start_over(self) -> None:
        """The log is read from its beginning again."""
        self._met = 0

    def take(self, line: str) -> str | None:
        """The text of a line that was not taken yet, without its time; None for all others."""
        found = LINE.fullmatch(line)
        if found is None:
            return None
        seconds, fraction, zone, text = found.groups()
        try:
            when = datetime.fromisoformat(f"{seconds}{zone}"), (fraction or "").ljust(DIGITS, "0")
        except ValueError:  # there is no such day
            return None
        if self._last is not None and when < self._last:
            return None
        if when != self._last:
            self._last, self._taken, self._met = when, 0, 0
        self._met += 1
        if self._met <= self._taken:
            return None
        self._taken = self._met
        return str(text)


def iterate_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """The lines of a stream of bytes. The last one may lack its line break."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole)
    if rest:
        yield rest.decode(errors="replace")
