"""The lines of a stage's pods, as they come. To lose some harms nothing: what matters is in the artifact."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from threading import Event, Thread

import urllib3
from kubernetes import client

from flows.launch.manifest import CONTAINER

PAUSE = 1.0  # seconds until a log that broke off is asked for again


class Logs:
    """A thread a pod, each following the log of its stage."""

    def __init__(self, core: client.CoreV1Api, namespace: str, say: Callable[[str], None]) -> None:
        self.core, self.namespace, self.say = core, namespace, say
        self._threads: dict[str, Thread] = {}
        self._over = Event()

    def follow(self, pod: str, rank: str) -> None:
        """Begin with a pod, once. rank: its index among several, which its lines then begin with."""
        if pod not in self._threads:
            self._threads[pod] = Thread(target=self._follow, args=(pod, rank), daemon=True)
            self._threads[pod].start()

    def finish(self, seconds: float) -> None:
        """Give the last lines so long to come."""
        self._over.set()
        until = time.monotonic() + seconds
        for thread in self._threads.values():
            thread.join(max(0.0, until - time.monotonic()))

    def _follow(self, pod: str, rank: str) -> None:
        last = ""  # the time of the last line; Kubernetes writes it before each, in full and sortable
        while True:
            is_last = self._over.is_set()
            try:
                stream = self.core.read_namespaced_pod_log(
                    pod,
                    self.namespace,
                    container=CONTAINER,
                    follow=not is_last,
                    timestamps=True,
                    _preload_content=False,
                    _request_timeout=(5, 3600),
                )
                for line in iterate_lines(stream.stream(decode_content=False)):
                    when, _, text = line.partition(" ")
                    if when > last:
                        last = when
                        self.say(f"{rank}{text}")
            except client.ApiException as error:
                if error.status in (403, 404):
                    return
            except urllib3.exceptions.HTTPError:
                pass
            if is_last:
                return
            self._over.wait(PAUSE)


def iterate_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Whole lines of a stream of bytes, the last one even if it has no end."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole)
    if rest:
        yield rest.decode(errors="replace")
