"""What a run needs of a Kubernetes cluster: plain settings, which `flows` turns into manifests."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dmdr.config.secrets import has_secret, is_secret_name
from dmdr.config.section import Positive, Section
from dmdr.config.stages import STAGES, TRAINING_STAGES, StageName

Amount = Annotated[str, Field(pattern=r"^[1-9][0-9]*(\.[0-9]+)?(m|Ki|Mi|Gi|Ti)?$")]  # a Kubernetes quantity
Label = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")]  # the name of a Kubernetes object
LabelKey = Annotated[str, Field(pattern=r"^([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")]
IMAGE = r"^[^\s@]+@sha256:[0-9a-f]{64}$"


class Toleration(Section):
    """A node taint that the pods tolerate. The fields are those of Kubernetes."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Pods(Section):
    """The pods of a stage, one on each node."""

    image: str = Field(pattern=IMAGE)  # by digest, because a tag may point to another image tomorrow
    nodes: Positive = 1  # above 1 the stage is a JobSet, with execution.processes ranks on each node
    # GPUs in each pod. None: execution.processes for training and evaluation, 1 for other stages, 0 on device: cpu
    gpus: int | None = Field(None, ge=0)
    gpu_resource: str = Field("nvidia.com/gpu", min_length=1)
    cpu: Amount = "8"
    memory: Amount = "64Gi"  # includes shared memory
    shared_memory: Amount = "8Gi"
    scratch: Amount = "100Gi"  # on the node's disk, for downloads and for checkpoints before their upload
    node_selector: dict[str, str] = Field({})
    # A label of nodes, such as that of their rack: all nodes of a stage over several shall have one value of it. With a
    # queue, Kueue's topology-aware scheduling sees to it; without, JobSet does, and keeps other JobSets off that rack
    topology: LabelKey | None = None
    tolerations: tuple[Toleration, ...] = Field((Toleration(key="nvidia.com/gpu"),), strict=False)
    priority_class: Label | None = None
    # How many pods may fail before the stage fails. A pod that was told to stop and wrote its checkpoint does not
    # count: one that was evicted, or deleted by kubectl. A bad config or a bad input is not retried.
    retries: int = Field(3, ge=0)
    deadline: Positive | None = None  # seconds from the Job's start until it fails, including all retries
    # Seconds that a pod may wait for a node, an image or a secret, or may not even be created, because of a quota for
    # example. Time in Kueue's queue does not count.
    patience: Positive = 1800
    grace: Positive = 300  # seconds between SIGTERM and SIGKILL, to finish a step and save its checkpoint


class Cluster(Pods):
    """The cluster where the stages run as Jobs. `stages` overrides the settings of the pods for single stages."""

    namespace: Label = "dmdr"
    service_account: Label = "dmdr-stage"
    queue: Label | None = None  # the name of a Kueue LocalQueue
    pull_secret: Label | None = None
    environment: dict[str, str] = Field({})  # no secrets: everybody who may read Jobs can read it
    secrets: tuple[Label, ...] = Field((), strict=False)  # names of Secrets; their keys become environment variables
    # folder in the pod -> PersistentVolumeClaim, mounted read-only: models, prompts
    claims: dict[str, Label] = Field({})
    ttl: Positive = 86400  # seconds until Kubernetes deletes a finished Job
    stages: dict[StageName, Pods] = Field({})

    @model_validator(mode="before")
    @classmethod
    def _fill_stages(cls, data: object) -> object:
        """Add to each entry of `stages` the settings that it does not override."""
        if not isinstance(data, dict) or not isinstance(data.get("stages"), dict):
            return data
        defaults = {name: value for name, value in data.items() if name in Pods.model_fields}
        stages = {
            stage: {**defaults, **overrides} if isinstance(overrides, dict) else overrides
            for stage, overrides in data["stages"].items()
        }
        return {**data, "stages": stages}

    @model_validator(mode="after")
    def _check_pods(self) -> Cluster:
        for name, value in self.environment.items():
            if is_secret_name(name) or has_secret(value):
                what = "which looks like a secret" if is_secret_name(name) else "whose value looks like a secret"
                raise ValueError(
                    f"execution.cluster.environment has {name}, {what}, and everybody who may read Jobs could read it; "
                    f"put it into a Kubernetes Secret (kubectl create secret generic NAME --from-literal={name}=...) "
                    "and list NAME in execution.cluster.secrets"
                )
        for folder in self.claims:
            if not re.fullmatch(r"(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+", folder):
                raise ValueError(f"execution.cluster.claims has {folder!r}, which is not an absolute path; give one")
        for stage in STAGES:
            if stage not in TRAINING_STAGES and (nodes := self.of(stage).nodes) > 1:
                raise ValueError(
                    f"execution.cluster asks for {nodes} nodes for {stage}, which runs on one node; set nodes under "
                    f"execution.cluster.stages.{' and '.join(TRAINING_STAGES)}"
                )
        asked = [self.of(stage) for stage in STAGES]
        if (keys := [each.topology for each in asked if each.topology]) and not any(
            each.topology and each.nodes > 1 for each in asked
        ):
            raise ValueError(
                f"execution.cluster.topology is {keys[0]}, which keeps the nodes of a stage together, but every stage "
                "runs on one node; set nodes for a training stage, or drop topology"
            )
        return self

    def of(self, stage: StageName) -> Pods:
        """The settings of the pods of one stage."""
        return self.stages.get(stage, self)
