"""The log lines of a stage's pods, as they come. A lost line does no harm: what matters is in the artifact."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from threading import Event, Thread

import urllib3
from kubernetes import client

from flows.launch.cluster_errors import MISSING
from flows.launch.manifest import CONTAINER

PAUSE = 1.0  # seconds until a log that broke off is read again
FORBIDDEN = 403


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
        last = ""  # the time of the last line; Kubernetes writes it before each, in full and sortable
        while True:
            is_last = self._over.is_set()
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
                    when, _, text = line.partition(" ")
                    if when > last:
                        last = when
                        self.say(f"{prefix}{text}")
            except client.ApiException as error:
                if error.status in (FORBIDDEN, MISSING):
                    return
            except urllib3.exceptions.HTTPError:
                pass
            if is_last:
                return
            self._over.wait(PAUSE)


def iterate_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """The lines of a stream of bytes. The last one may lack its line break."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole)
    if rest:
        yield rest.decode(errors="replace")
