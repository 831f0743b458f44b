"""What the stages of a run ask of a Kubernetes cluster: plain settings, which `flows` turns into manifests."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dmdr.config.section import Positive, Section
from dmdr.config.stages import STAGES, TRAINING_STAGES, StageName

Amount = Annotated[str, Field(pattern=r"^[1-9][0-9]*(\.[0-9]+)?(m|Ki|Mi|Gi|Ti)?$")]  # a Kubernetes quantity
Label = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")]  # the name of an object there
IMAGE = r"^[^\s@]+@sha256:[0-9a-f]{64}$"
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


class Toleration(Section):
    """A taint that pods do not mind; Kubernetes' own words."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Pods(Section):
    """The pods of a stage, one a node."""

    image: str = Field(pattern=IMAGE)  # by digest: a tag may mean another image tomorrow
    nodes: Positive = 1  # above 1 a JobSet, and execution.processes ranks on each
    # of a pod; None: execution.processes in training and evaluation, else 1, and 0 on device: cpu
    gpus: int | None = Field(None, ge=0)
    gpu_resource: str = Field("nvidia.com/gpu", min_length=1)
    cpu: Amount = "8"
    memory: Amount = "64Gi"  # shared memory counts
    shared_memory: Amount = "8Gi"
    scratch: Amount = "100Gi"  # of the node's disk: downloads, checkpoints before they are uploaded
    node_selector: dict[str, str] = Field({})
    tolerations: tuple[Toleration, ...] = Field((Toleration(key="nvidia.com/gpu"),), strict=False)
    priority_class: Label | None = None
    retries: int = Field(
        3, ge=0
    )  # pods that fail; evictions do not count on one node; a bad config or input ends it at once
    deadline: Positive | None = None  # seconds from the start, all retries together
    patience: Positive = 1800  # seconds that a pod may wait for a node, an image or a secret; queued is not waiting
    grace: Positive = 300  # seconds from SIGTERM on, for the last step and its checkpoint


class Cluster(Pods):
    """Where the stages run as Jobs; `stages` changes what is asked for one of them."""

    namespace: Label = "dmdr"
    service_account: Label = "dmdr-stage"
    queue: Label | None = None  # a LocalQueue of Kueue
    pull_secret: Label | None = None
    environment: dict[str, str] = Field({})  # no secrets: it is read by whoever may read Jobs
    secrets: tuple[Label, ...] = Field((), strict=False)  # whose keys become environment variables
    claims: dict[str, Label] = Field({})  # folder in the pod -> PersistentVolumeClaim, read-only: models, prompts
    ttl: Positive = 86400  # seconds that a finished Job stays to be looked at
    stages: dict[StageName, Pods] = Field({})

    @model_validator(mode="before")
    @classmethod
    def _stages_change_what_is_asked_for_all(cls, data: object) -> object:
        if not isinstance(data, dict) or not isinstance(data.get("stages"), dict):
            return data
        for_all = {name: value for name, value in data.items() if name in Pods.model_fields}
        changed = {
            stage: {**for_all, **asked} if isinstance(asked, dict) else asked for stage, asked in data["stages"].items()
        }
        return {**data, "stages": changed}

    @model_validator(mode="after")
    def _pods_are_possible(self) -> Cluster:
        for name in self.environment:
            if SECRET.search(name):
                raise ValueError(
                    f"execution.cluster.environment has {name}, which reads like a secret, and whoever may read Jobs "
                    "would read it; put it into a Kubernetes Secret and name that in execution.cluster.secrets"
                )
        for folder in self.claims:
            if not re.fullmatch(r"(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+", folder):
                raise ValueError(f"execution.cluster.claims has {folder!r}, which is no absolute folder; mend it")
        for stage in STAGES:
            if stage not in TRAINING_STAGES and (nodes := self.of(stage).nodes) > 1:
                raise ValueError(
                    f"execution.cluster asks for {nodes} nodes for {stage}, which runs in one process; set nodes under "
                    "execution.cluster.stages.{"
                    and ".join(TRAINING_STAGES)}"
                )
        return self

    def of(self, stage: StageName) -> Pods:
        """What one stage asks for."""
        return self.stages.get(stage, self)
