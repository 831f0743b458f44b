"""The events of a cluster: what its controllers and nodes could not do, in their own words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime, timedelta

import urllib3
from kubernetes import client

from flows.launch.api import TIMEOUT
from flows.launch.objects import Event, EventList

FORBIDDEN = 403
COARSE = timedelta(seconds=1)  # times of objects are whole seconds, those of events may be finer
ADDED = ("(combined from similar events): ", "Error creating: ")  # what Kubernetes puts before the reason


def read_events(core: client.CoreV1Api, namespace: str, name: str) -> tuple[Event, ...] | None:
    """The events about the object of a name, of whatever kind; None where the cluster does not let us read them.

    What else the client raises is not translated here.
    """
    try:
        answer: urllib3.HTTPResponse = core.list_namespaced_event(  # type: ignore[assignment]  # no CoreV1EventList:
            namespace,
            field_selector=f"involvedObject.name={name}",
            _request_timeout=TIMEOUT,
            _preload_content=False,  # with it, the client returns the response itself
        )
    except client.ApiException as error:
        if error.status == FORBIDDEN:
            return None
        raise
    return EventList.model_validate_json(answer.data).items


def find_newest(events: Iterable[Event], *, since: datetime, about: str = "") -> Event | None:
    """The newest event since a time; None if there is none. about: a part of its reason."""
    fitting = [event for event in events if event.when >= since - COARSE and about in event.reason]
    return max(fitting, key=lambda event: event.when, default=None)


def explain_event(event: Event) -> str:
    """Its message on one line, without what Kubernetes adds to it."""
    text = " ".join(event.message.split())
    for beginning in ADDED:
        text = text.removeprefix(beginning)
    return text.rstrip(".;")


def name_fault(event: Event) -> str:
    """The same text for the same fault of pods of other names: without names in quotes and figures."""
    return re.sub(r'"[^"]*"|\d+', "", explain_event(event))
