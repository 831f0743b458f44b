"""The API server of the fake cluster: what the official client and kubectl ask for, with faults on demand."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.support.fake_cluster.kubelet import Kubelet
from tests.support.fake_cluster.objects import Objects, Refused, now

NAMESPACE = "dmdr"
IMAGE = f"images.example.org/dmdr-train@sha256:{'1' * 64}"  # has `python -m stages`
QUICK = f"images.example.org/quick@sha256:{'2' * 64}"  # has quick_stage.py
GROUPS = {"jobs": ("batch", "v1", "Job"), "jobsets": ("jobset.x-k8s.io", "v1alpha2", "JobSet")}
CORE = {"pods": "Pod", "events": "Event"}
PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/(?P<version>[^/]+)/namespaces/(?P<namespace>[^/]+)/(?P<resource>jobs|jobsets|pods|events)"
    r"(?:/(?P<name>[^/]+))?(?P<log>/log)?"
)


class Cluster:
    """The faults that tests turn on, and what they look at afterwards."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.objects = Objects()
        self.kubelet = Kubelet(self.objects, folder)
        self.kubelet.images[QUICK] = ["-m", "tests.support.fake_cluster.quick_stage"]
        self.random, self._lock = random.Random(seed), threading.Lock()
        self.lost = self.failing = self.dropped = 0.0  # shares: of replies, of requests, of watches
        self.denied: set[tuple[str, str]] = set()  # (verb, resource)
        self.has_jobsets = True
        self.asked: set[tuple[str, str]] = set()  # all (verb, resource) there were
        self.port = 0
        self.kubelet_says: list[str] = []  # in the place of a log, one each time that one is asked for

    def happens(self, share: float) -> bool:
        with self._lock:
            return self.random.random() < share

    def delete(self, resource: str, name: str) -> None:
        """Begin to delete an object; its controller ends what belongs to it."""
        if resource == "jobs":
            self.kubelet.delete_job(name)
        elif resource == "pods":
            self.kubelet.delete_pod(name)
        else:
            self.objects.update(resource, name, metadata={"deletionTimestamp": now()})

    def kubeconfig(self, folder: Path) -> Path:
        entry = {"name": "fake", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}
        context = {"name": "fake", "context": {"cluster": "fake", "user": "fake", "namespace": NAMESPACE}}
        file = folder / "kubeconfig"
        file.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "fake",
                    "clusters": [entry],
                    "contexts": [context],
                    "users": [{"name": "fake", "user": {}}],
                }
            )
        )
        return file


@contextmanager
def fake_cluster(folder: Path, seed: int = 0) -> Iterator[Cluster]:
    """A cluster with the namespace dmdr and one node, until the block ends."""
    cluster = Cluster(folder, seed)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"cluster": cluster}))
    server.daemon_threads = True
    cluster.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()
        cluster.kubelet.close()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    cluster: Cluster
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing; the tests look at what became of it."""

    def do_GET(self) -> None:
        self._answer("get")

    def do_POST(self) -> None:
        self._answer("create")

    def do_PATCH(self) -> None:
        self._answer("patch")

    def do_DELETE(self) -> None:
        self._answer("delete")

    def _answer(self, verb: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"null")
        url = urlsplit(self.path)
        asked = {key: values[0] for key, values in parse_qs(url.query).items()}
        try:
            if (found := discovery(url.path, self.cluster)) is not None:
                return self._send(200, found)
            if (place := PATH.fullmatch(url.path)) is None:
                raise Refused(404, "NotFound", "the server could not find the requested resource")
            self._act(verb, place, asked, body)
        except Refused as error:
            self._send(
                error.status,
                {
                    "kind": "Status",
                    "apiVersion": "v1",
                    "status": "Failure",
                    "message": error.message,
                    "reason": error.reason,
                    "code": error.status,
                },
            )
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _act(self, verb: str, place: re.Match, asked: dict, body: dict | None) -> None:
        resource, name = place["resource"], place["name"]
        watches = asked.get("watch", "").lower() in ("true", "1")
        if verb == "get" and name is None:
            verb = "watch" if watches else "list"
        self.cluster.asked.add((verb, f"{resource}{place['log'] or ''}"))
        self._check(verb, resource, place["namespace"])
        objects = self.cluster.objects
        if place["log"]:
            return self._log(name, asked)
        if verb == "watch":
            return self._watch(resource, asked)
        if verb == "list":
            found, version = objects.list(resource, asked.get("labelSelector", ""), _named(asked))
            if resource == "events":
                found = [each for each in found if each["involvedObject"]["name"] == _involved(asked)]
            kind = f"{CORE[resource]}List" if resource in CORE else f"{GROUPS[resource][2]}List"
            answer = {"kind": kind, "apiVersion": _version(resource), "metadata": {"resourceVersion": str(version)}}
            return self._send(200, {**answer, "items": found})
        if verb == "create":
            if resource == "jobs" and (refusal := self.cluster.kubelet.refuse_job(body["metadata"]["name"])):
                raise Refused(403, "Forbidden", refusal)
            if self.cluster.kubelet.suspends:
                body["spec"]["suspend"] = True
            return self._send(201, objects.create(resource, body))
        if verb == "patch":
            assert self.headers["Content-Type"] == "application/merge-patch+json", "JobSets take no strategic one"
            return self._send(200, objects.annotate(resource, name, body["metadata"]["annotations"]))
        if verb == "delete":
            objects.check(resource, name, (body or {}).get("preconditions", {}))
            self.cluster.delete(resource, name)
        self._send(200, objects.read(resource, name))

    def _check(self, verb: str, resource: str, namespace: str) -> None:
        if self.cluster.happens(self.cluster.failing):
            raise Refused(500, "InternalError", "etcdserver: request timed out")
        if (verb, resource) in self.cluster.denied:
            group = GROUPS.get(resource, ("",))[0]
            raise Refused(
                403,
                "Forbidden",
                (
                    f'{resource} is forbidden: User "system:serviceaccount:dmdr:dmdr-flow" cannot {verb} resource '
                    f'"{resource}" in API group "{group}" in the namespace "{namespace}"'
                ),
            )
        if resource == "jobsets" and not self.cluster.has_jobsets:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        if verb == "create" and namespace != NAMESPACE:
            raise Refused(404, "NotFound", f'namespaces "{namespace}" not found')

    def _send(self, status: int, answer: dict) -> None:
        if self.cluster.happens(self.cluster.lost):
            self.close_connection = True
            return
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        """A part of a stream; an empty one is its end."""
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _watch(self, resource: str, asked: dict) -> None:
        until = time.monotonic() + float(asked.get("timeoutSeconds", 60))
        version = int(asked.get("resourceVersion") or 0)
        first = self.cluster.objects.events(resource, version, _named(asked), 0)  # 410 is a status, not an event
        self._stream()
        if self.cluster.happens(self.cluster.dropped):
            return
        while time.monotonic() < until:
            for kind, each in first:
                each = {"kind": CORE.get(resource) or GROUPS[resource][2], "apiVersion": _version(resource), **each}
                self._chunk(json.dumps({"type": kind, "object": each}).encode() + b"\n")
                version = int(each["metadata"]["resourceVersion"])
            first = self.cluster.objects.events(resource, version, _named(asked), min(0.5, until - time.monotonic()))
        self._chunk(b"")

    def _log(self, pod: str, asked: dict) -> None:
        self.cluster.objects.read("pods", pod)
        if self.cluster.kubelet_says:
            self._stream()
            self._chunk(self.cluster.kubelet_says.pop(0).encode())
            return self._chunk(b"")
        file, told = self.cluster.kubelet.log(pod), 0
        self._stream()
        while True:
            over = pod not in self.cluster.kubelet.running()
            lines = file.read_text(errors="replace").splitlines() if file.exists() else []
            for number, line in enumerate(lines[told:], told):
                self._chunk(f"2026-01-01T00:00:00.{number:09d}Z {line}\n".encode())
            told = len(lines)
            if over or asked.get("follow", "").lower() != "true":
                return self._chunk(b"")
            time.sleep(0.05)


def _named(asked: dict) -> str | None:
    selector = asked.get("fieldSelector", "")
    return selector.removeprefix("metadata.name=") if selector.startswith("metadata.name=") else None


def _involved(asked: dict) -> str:
    return dict(each.split("=", 1) for each in asked["fieldSelector"].split(","))["involvedObject.name"]


def _version(resource: str) -> str:
    return "v1" if resource in CORE else "/".join(GROUPS[resource][:2])


def discovery(path: str, cluster: Cluster) -> dict | None:
    """What kubectl asks for before anything else."""
    groups = {name: of for name, of in GROUPS.items() if name != "jobsets" or cluster.has_jobsets}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        versions = {
            group: {"groupVersion": f"{group}/{version}", "version": version} for group, version, _ in groups.values()
        }
        listed = [{"name": group, "versions": [each], "preferredVersion": each} for group, each in versions.items()]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    pods = {"/api/v1": ("v1", "pods", "Pod")}
    known = pods | {f"/apis/{g}/{v}": (f"{g}/{v}", name, kind) for name, (g, v, kind) in groups.items()}
    if path not in known:
        return None
    version, name, kind = known[path]
    verbs = ["create", "delete", "get", "list", "patch", "watch"]
    resource = {"name": name, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": verbs}
    return {"kind": "APIResourceList", "groupVersion": version, "resources": [resource]}
