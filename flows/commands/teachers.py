"""`dmdr teachers`: publishes a teacher, tells Prefect of it, and lists published teachers."""

from __future__ import annotations

import math
import sys

from dmdr.config.plain_text import to_line
from dmdr.errors import StoreError
from dmdr.teacher import hub
from dmdr.teacher.index import FAMILIES
from flows.prefect_support import connection
from stages.reports.scorecard_text import format_table
from stages.runtime.progress import Progress
from stages.store.address import shorten
from stages.store.published_teachers import PublishedTeacher, list_published, publish_teacher

EVENT, RESOURCE = "teacher.published", "dmdr.teacher"  # what prefect.yaml's trigger waits for
MEGABYTE = 10**6


def publish_folder(folder: str, name: str, revision: str | None, to: str) -> int:
    """Publish a teacher and emit the event; returns 0. The same command again continues, or only emits the event.

    Raises:
        ConfigError, InputMissing, DataError: as `stages.store.published_teachers.publish_teacher`.
        StoreError: as there, or the teacher is published but Prefect does not answer.
    """
    progress = Progress("published megabytes")

    def show_progress(copied: int, total: int) -> None:
        progress.update(copied // MEGABYTE, math.ceil(total / MEGABYTE))

    published = publish_teacher(folder, name, revision, to, show_progress)
    print(f"{published.name}@{published.revision}, sha256 {published.digest}, is published at {published.address}")
    announce_teacher(published)
    return 0


def print_resolved(repo: str) -> int:
    """Print the address of a model on the hub with its newest commit; returns 0.

    Raises:
        ConfigError, InputMissing: as `dmdr.teacher.hub.resolve`.
    """
    print(hub.resolve(repo))
    return 0


def print_published(at: str) -> int:
    """Print one line for each published teacher; returns 0."""
    rows = [["teacher", "family", "sha256", "megabytes", "published at", "address"]]
    for each in list_published(at):
        size = sum(file.size for file in each.record.files.values())
        kind = str(each.record.identity["class"])
        family = FAMILIES.get(kind, kind)
        digest = shorten(each.digest)
        label = f"{each.name}@{each.revision}"
        rows.append([label, family, digest, f"{size / MEGABYTE:,.1f}", each.record.published_at, each.address])
    print(format_table(rows) if len(rows) > 1 else f"no teachers at {at}")
    return 0


def announce_teacher(teacher: PublishedTeacher) -> None:
    """Emit the event teacher.published where a Prefect API is configured.

    Raises:
        StoreError: Prefect does not take the event.
    """
    from prefect.client.orchestration import get_client
    from prefect.events import Event, Resource

    later = "retrain/on-new-teacher finds it when its schedule fires next"
    address = connection.find_server()
    if address is None:
        print(f"no Prefect API is configured (PREFECT_API_URL), so no event was emitted; {later}", file=sys.stderr)
        return
    about = {
        "name": teacher.name,
        "revision": teacher.revision,
        "address": teacher.address,
        "digest": teacher.digest,
    }
    resource = Resource({"prefect.resource.id": f"{RESOURCE}.{teacher.name}"})
    event = Event(event=EVENT, resource=resource, payload=about)
    try:
        get_client(sync_client=True).request("POST", "/events", json=[event.model_dump(mode="json")])
    except Exception as error:
        raise StoreError(
            f"{teacher.address} is published, but the Prefect API at {address}, {connection.SETTING} "
            f"{connection.name_source()}, did not take the event ({type(error).__name__}: {to_line(error, 200)}); "
            f"repeat the command, or {later}"
        ) from error
    print(f"emitted {EVENT} for {RESOURCE}.{teacher.name}")
