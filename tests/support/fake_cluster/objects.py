"""What the API server of the fake cluster keeps: objects with versions, and a history that watches read.

After Kubernetes' API conventions: creating a name twice is a conflict, a version counts every change, a watch from a
version that the history no longer reaches is 410 Gone, a deleted object with a foreground finalizer stays until its
dependents are gone.
"""

from __future__ import annotations

import copy
import itertools
import threading
from datetime import UTC, datetime
from uuid import uuid4

HISTORY = 200  # events that watches can go back


class Refused(Exception):
    """An answer that is an error. status: of HTTP; reason and message as Kubernetes gives them."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message


class Objects:
    """All objects by (resource, name), of one namespace."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self._objects: dict[tuple[str, str], dict] = {}
        self._events: list[tuple[int, str, str, dict]] = []  # version, resource, kind of event, object
        self._versions = itertools.count(1)
        self._version = 0

    def create(self, resource: str, body: dict) -> dict:
        with self.changed:
            name = body["metadata"]["name"]
            if (resource, name) in self._objects:
                raise Refused(409, "AlreadyExists", f'{resource} "{name}" already exists')
            made = copy.deepcopy(body)
            made["metadata"] |= {"uid": str(uuid4()), "creationTimestamp": now()}
            if resource != "events":
                made.setdefault("status", {})
            self._objects[resource, name] = made
            return self._record(resource, "ADDED", made)

    def read(self, resource: str, name: str) -> dict:
        with self.changed:
            if (resource, name) not in self._objects:
                raise Refused(404, "NotFound", f'{resource} "{name}" not found')
            return copy.deepcopy(self._objects[resource, name])

    def list(self, resource: str, labels: str = "", name: str | None = None) -> tuple[list[dict], int]:
        """Objects whose labels are as `labels` (a=b,c=d,e) says, and the version of the list."""
        wanted = dict(each.split("=", 1) for each in labels.split(",") if "=" in each)
        present = {each for each in labels.split(",") if each and "=" not in each}
        with self.changed:
            found = [
                copy.deepcopy(each)
                for (kind, called), each in self._objects.items()
                if kind == resource
                and name in (None, called)
                and wanted.items() <= each["metadata"].get("labels", {}).items()
                and present <= each["metadata"].get("labels", {}).keys()
            ]
            return found, self._version

    def update(self, resource: str, name: str, **parts: dict) -> dict | None:
        """Merge into metadata, spec or status; None if the object is gone."""
        with self.changed:
            found = self._objects.get((resource, name))
            if found is None:
                return None
            for part, changes in parts.items():
                found[part] = {**found.get(part, {}), **changes}
            return self._record(resource, "MODIFIED", found)

    def replace(self, resource: str, name: str, fields: dict) -> None:
        """Set top-level fields of an object, if it is still there."""
        with self.changed:
            found = self._objects.get((resource, name))
            if found is not None:
                found.update(fields)
                self._record(resource, "MODIFIED", found)

    def annotate(self, resource: str, name: str, annotations: dict[str, str]) -> dict:
        with self.changed:
            before = self.read(resource, name)["metadata"].get("annotations", {})
            return self.update(resource, name, metadata={"annotations": {**before, **annotations}})

    def check(self, resource: str, name: str, preconditions: dict[str, str]) -> None:
        """Refuse unless the object is as it was read."""
        found = self.read(resource, name)["metadata"]
        if any(found[key] != value for key, value in preconditions.items()):
            raise Refused(409, "Conflict", f'{resource} "{name}": the object has been modified')

    def remove(self, resource: str, name: str) -> None:
        """For good."""
        with self.changed:
            found = self._objects.pop((resource, name), None)
            if found is not None:
                self._record(resource, "DELETED", found)

    def events(self, resource: str, after: int, name: str | None, seconds: float) -> list[tuple[str, dict]]:
        """What happened after a version; waits up to `seconds` for something to.

        Raises:
            Refused: the history does not go back so far.
        """
        with self.changed:
            if self._events and after < self._events[0][0] - 1:
                raise Refused(410, "Expired", f"too old resource version: {after} ({self._events[0][0]})")

            def found() -> list[tuple[str, dict]]:
                return [
                    (kind, copy.deepcopy(each))
                    for version, of, kind, each in self._events
                    if version > after and of == resource and name in (None, each["metadata"]["name"])
                ]

            self.changed.wait_for(found, seconds)
            return found()

    def forget_history(self) -> None:
        with self.changed:
            self._version = next(self._versions)
            self._events = [(self._version, "", "", {"metadata": {"name": ""}})]

    def _record(self, resource: str, kind: str, each: dict) -> dict:
        self._version = next(self._versions)
        each["metadata"]["resourceVersion"] = str(self._version)
        self._events = [*self._events[-HISTORY:], (self._version, resource, kind, copy.deepcopy(each))]
        self.changed.notify_all()
        return copy.deepcopy(each)


def now() -> str:
    """As objects have it: in whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
