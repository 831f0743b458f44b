"""The Kubernetes objects that the launcher creates and reads. Of those it reads, only the fields that it needs."""

from __future__ import annotations

from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.alias_generators import to_camel

from flows.launch.labels import ATTEMPT, FLOW_RUN

Manifest = dict[str, object]  # an object to create, or a part of one, as Kubernetes' JSON has it
ENDS = {
    "Complete": True,
    "Completed": True,
    "Failed": False,
}  # the conditions that end a Job or a JobSet: went it well?


class FromCluster(BaseModel):
    """Part of an object as the API server writes it: camelCase, with fields that we do not know, and with nulls."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: object) -> object:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class Metadata(FromCluster):
    """What every object has. deletion_timestamp: somebody has deleted it, and it is still ending."""

    name: str
    uid: str = ""
    resource_version: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None


class Condition(FromCluster):
    """Something that is so or not. status: "True", "False" or "Unknown"."""

    type: str
    status: str
    reason: str | None = None
    message: str | None = None


class JobSpec(FromCluster):
    """suspend: a queue holds the Job back."""

    suspend: bool = False


class JobStatus(FromCluster):
    """How far a Job is."""

    conditions: tuple[Condition, ...] = ()


class Job(FromCluster):
    """A Job or a JobSet: one attempt at a stage."""

    metadata: Metadata
    spec: JobSpec = JobSpec()
    status: JobStatus = JobStatus()

    @property
    def name(self) -> str:
        return self.metadata.name

    @property
    def attempt(self) -> int:
        return int(self.metadata.labels[ATTEMPT])

    @property
    def owner(self) -> str | None:
        """The flow run that created it; None for a Job that was created by hand."""
        return self.metadata.labels.get(FLOW_RUN)

    @property
    def is_ending(self) -> bool:
        """Whether somebody has deleted it, so that it will soon be gone."""
        return self.metadata.deletion_timestamp is not None

    @property
    def succeeded(self) -> bool | None:
        """Whether it ended well; None while it has not ended."""
        for condition in self.status.conditions:
            if condition.type in ENDS and condition.status == "True":
                return ENDS[condition.type]
        return None


class JobList(FromCluster):
    """The answer to a list request."""

    items: tuple[Job, ...] = ()


class Waiting(FromCluster):
    """Why a container does not run yet."""

    reason: str = ""
    message: str | None = None


class Terminated(FromCluster):
    """How a container ended."""

    exit_code: int
    reason: str | None = None


class Running(FromCluster):
    """A container runs."""


class ContainerState(FromCluster):
    """One of the three."""

    waiting: Waiting | None = None
    running: Running | None = None
    terminated: Terminated | None = None


class ContainerStatus(FromCluster):
    """A container of a pod."""

    name: str
    state: ContainerState = ContainerState()


class PodStatus(FromCluster):
    """How far a pod is. phase: Pending, Running, Succeeded, Failed or Unknown. reason: of an eviction, for example."""

    phase: str = ""
    reason: str | None = None
    conditions: tuple[Condition, ...] = ()
    container_statuses: tuple[ContainerStatus, ...] = ()
    init_container_statuses: tuple[ContainerStatus, ...] = ()


class Pod(FromCluster):
    """A pod of a stage."""

    metadata: Metadata
    status: PodStatus = PodStatus()

    @property
    def name(self) -> str:
        return self.metadata.name


class PodList(FromCluster):
    """The answer to a list request."""

    items: tuple[Pod, ...] = ()


class EventSeries(FromCluster):
    """How often an event came again."""

    last_observed_time: datetime | None = None


class Event(FromCluster):
    """Something that a controller tells of an object. type: Normal or Warning. Which of its times there are depends on
    the controller."""

    metadata: Metadata
    type: str = ""
    reason: str = ""
    message: str = ""
    first_timestamp: datetime | None = None
    last_timestamp: datetime | None = None
    event_time: datetime | None = None
    series: EventSeries = EventSeries()

    @property
    def when(self) -> datetime:
        """When it last happened."""
        times = (self.series.last_observed_time, self.last_timestamp, self.event_time, self.first_timestamp)
        created = self.metadata.creation_timestamp or datetime.min.replace(tzinfo=UTC)
        return next((time for time in times if time is not None), created)


class EventList(FromCluster):
    """The answer to a list request."""

    items: tuple[Event, ...] = ()
