"""The Job, or for several nodes the JobSet, that a stage runs as on Kubernetes: data, never a text template.

1. Everything is in this one object: the config file is an annotation of the pod, which mounts it. So the flow needs no
   right but to create Jobs, and `kubectl create -f` of what `dmdr render` prints needs nothing else either.
2. A name is a function of run, stage and attempt, so that a second creation finds the first.
3. One node: a Job of one indexed pod. Exit codes of bad input end the Job. A pod that was told to stop is replaced and
   not counted. Its exit code says that it was told, by a node that is drained or by kubectl delete pod; where a person
   deleted it, nothing else in its status does. A pod that is killed before its checkpoint is written counts.
4. Several nodes: a JobSet. If one pod is told to stop, all write a checkpoint, end with the same code and are replaced.
   A pod that ends in another way restarts all of them, since the others wait for it. Each pod starts its own ranks and
   finds the first pod by its host name. torchrun is not used: it turns every exit code into 1 and kills ranks 30 s
   after SIGTERM, whatever their checkpoint needs.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from dmdr.config.identity import fingerprint, identity
from dmdr.config.stages import TABLE
from dmdr.errors import FINAL, ConfigError, Stopped
from flows.launch.labels import (
    ATTEMPT,
    CONFIG,
    FLOW_RUN,
    IDENTITY,
    NODE,
    ONE_DOMAIN_BY_JOBSET,
    ONE_DOMAIN_BY_KUEUE,
    RUN,
    STAGE,
    STORE,
    TEACHER,
    WAITS,
    to_label,
)
from flows.launch.objects import Job, Manifest
from flows.launch.stage import Stage, build_options
from stages.store.published_teachers import teacher_name

COMPONENT = {"app.kubernetes.io/name": "dmdr", "app.kubernetes.io/component": "stage"}
CONTAINER = "stage"
MOUNT, SCRATCH = "/etc/dmdr", "/scratch"
PORT = 29500  # where the ranks of other nodes find the first one
NOBODY = 10001  # user and group
LONGEST = 46  # characters of a name: the pods of a JobSet add up to 17, and 63 is the limit


@dataclass(frozen=True)
class Claim:
    """A volume of the cluster that the pods read. folder: where they see it."""

    volume: str
    folder: str
    claim: str


def job_name(run: str, stage: str, attempt: int) -> str:
    """A host name of at most LONGEST characters. Where the run's name has to be changed for it, a digest tells it from
    others that would become the same."""
    suffix = f"-{stage.replace('_', '-')}-{attempt}"
    full = f"dmdr-{run}"
    plain = re.sub(r"[^a-z0-9-]", "-", full)
    if plain != full or len(plain) + len(suffix) > LONGEST:
        digest = hashlib.sha256(run.encode()).hexdigest()[:8]
        plain = f"{plain[: LONGEST - len(suffix) - 9].rstrip('-')}-{digest}"
    return plain.rstrip("-") + suffix


def build_mark(flow_run: str | None, deployment: str | None) -> dict[str, str]:
    """The annotation that tells others that a flow run waits for a Job, and the id of that flow run's deployment."""
    return {f"{WAITS}{flow_run}": deployment or ""} if flow_run else {}


def read_marks(job: Job) -> dict[str, str]:
    """The flow runs that wait for a Job or once did: id -> id of the deployment, or "" if it has none."""
    owner = {} if job.owner is None else {job.owner: ""}
    marks = {key: value for key, value in job.metadata.annotations.items() if key.startswith(WAITS)}
    return owner | {key.removeprefix(WAITS): value for key, value in marks.items()}


def build_annotations(stage: Stage) -> dict[str, str]:
    """What tells the Jobs of a stage from those of another store, of other settings, or of a run of similar name."""
    teacher, start = stage.teacher or stage.config.teacher.path, stage.config.student.start
    settings = {"settings": identity(stage.config, stage.name), "teacher": teacher}
    if start is not None:  # its place is in no identity, and only a pod can look at it
        settings["start"] = start.path
    named = stage.config.list_rewards(stage.name)
    if own := {name: reward.place for name, reward in stage.config.rewards.items() if name in named}:
        settings["rewards"] = own  # likewise
    return {STORE: stage.store, IDENTITY: fingerprint(settings), RUN: stage.run}


def build_manifest(stage: Stage, attempt: int, flow_run: str | None = None, deployment: str | None = None) -> Manifest:
    """The object to create.

    flow_run: the one that creates it, and stops it when it is cancelled itself. deployment: of that flow run.

    Raises:
        ConfigError: the store is a folder that no pod can see.
    """
    _check_store(stage)
    name = job_name(stage.run, stage.name, attempt)
    pod_labels = {
        **COMPONENT,
        RUN: stage.run_label,
        STAGE: stage.name,
        TEACHER: to_label(teacher_name(stage.teacher or stage.config.teacher.path)),
        ATTEMPT: str(attempt),
    }
    labels = dict(pod_labels)
    if flow_run:
        labels[FLOW_RUN] = flow_run
    if stage.cluster.queue:
        labels["kueue.x-k8s.io/queue-name"] = stage.cluster.queue
    metadata: Manifest = {
        "name": name,
        "namespace": stage.cluster.namespace,
        "labels": labels,
        "annotations": build_annotations(stage) | build_mark(flow_run, deployment),
    }
    job = _build_job(stage, pod_labels, name)
    if not stage.is_set:
        job["ttlSecondsAfterFinished"] = stage.cluster.ttl
        return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job}
    bad_input = {"action": "FailJobSet", "name": "input_stays_bad", "onJobFailureReasons": ["PodFailurePolicy"]}
    about: Manifest = {"labels": pod_labels}
    if stage.pods.topology and not stage.cluster.queue:
        about["annotations"] = {ONE_DOMAIN_BY_JOBSET: stage.pods.topology}
    template: Manifest = {"metadata": about, "spec": job}
    spec: Manifest = {
        "network": {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": True},
        "failurePolicy": {"maxRestarts": stage.pods.retries, "rules": [bad_input]},
        "ttlSecondsAfterFinished": stage.cluster.ttl,
        "replicatedJobs": [{"name": "nodes", "replicas": 1, "template": template}],
    }
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}


def _check_store(stage: Stage) -> None:
    store = stage.store.removeprefix("file://")
    if "://" not in store and not any(PurePosixPath(store).is_relative_to(folder) for folder in stage.cluster.claims):
        raise ConfigError(
            f"the store is the folder {stage.store}, which no pod of the cluster sees; give --store s3://BUCKET/PREFIX"
        )


def _build_job(stage: Stage, labels: dict[str, str], name: str) -> Manifest:
    pods = stage.pods
    bad_input = {"containerName": CONTAINER, "operator": "In", "values": sorted(FINAL)}
    told_to_stop = {"containerName": CONTAINER, "operator": "In", "values": [Stopped.exit_code]}
    rules: list[Manifest] = [
        {"action": "FailJob", "onExitCodes": bad_input},
        {"action": "Ignore", "onExitCodes": told_to_stop},
    ]
    if not stage.is_set:
        evicted = {"type": "DisruptionTarget", "status": "True"}
        rules.append({"action": "Ignore", "onPodConditions": [evicted]})
    annotations = {CONFIG: stage.text}
    if stage.is_set and pods.topology and stage.cluster.queue:
        annotations[ONE_DOMAIN_BY_KUEUE] = pods.topology
    job: Manifest = {
        "completionMode": "Indexed",
        "completions": pods.nodes,
        "parallelism": pods.nodes,
        "backoffLimit": 0 if stage.is_set else pods.retries,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": rules},
        "template": {
            "metadata": {"labels": labels, "annotations": annotations},
            "spec": _build_pod(stage, name),
        },
    }
    if pods.deadline:
        job["activeDeadlineSeconds"] = pods.deadline
    return job


def _build_pod(stage: Stage, name: str) -> Manifest:
    cluster, pods = stage.cluster, stage.pods
    user = {"runAsNonRoot": True, "runAsUser": NOBODY, "runAsGroup": NOBODY, "fsGroup": NOBODY}
    spec: Manifest = {
        "restartPolicy": "Never",
        "serviceAccountName": cluster.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": pods.grace,
        "securityContext": {**user, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [_build_container(stage, name)],
        "volumes": _build_volumes(stage),
    }
    optional: Manifest = {
        "nodeSelector": dict(pods.node_selector),
        "tolerations": [each.model_dump(exclude_none=True) for each in pods.tolerations] if count_gpus(stage) else [],
        "priorityClassName": pods.priority_class,
        "imagePullSecrets": [{"name": cluster.pull_secret}] if cluster.pull_secret else [],
    }
    return spec | {key: value for key, value in optional.items() if value}


def count_gpus(stage: Stage) -> int:
    """GPUs of one pod."""
    if stage.pods.gpus is not None:
        return stage.pods.gpus
    if stage.config.execution.device == "cpu":
        return 0
    return stage.config.execution.processes if TABLE[stage.name].in_ranks else 1


def _build_container(stage: Stage, name: str) -> Manifest:
    pods = stage.pods
    limits = {"cpu": pods.cpu, "memory": pods.memory, "ephemeral-storage": pods.scratch}
    if count_gpus(stage):
        limits[pods.gpu_resource] = str(count_gpus(stage))
    options = build_options(f"{MOUNT}/config.yaml", stage.run, stage.store, stage.teacher, stage.adopt)
    mounts: list[Manifest] = [
        {"name": "config", "mountPath": MOUNT, "readOnly": True},
        {"name": "scratch", "mountPath": SCRATCH},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    mounts += [{"name": each.volume, "mountPath": each.folder, "readOnly": True} for each in _list_claims(stage)]
    return {
        "name": CONTAINER,
        "image": pods.image,
        "command": ["python", "-m", "stages"],
        "args": [stage.name, *options],
        "env": _build_environment(stage, name),
        "envFrom": [{"secretRef": {"name": secret}} for secret in stage.cluster.secrets],
        "resources": {"limits": limits, "requests": dict(limits)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }


def _build_environment(stage: Stage, name: str) -> list[Manifest]:
    values = {"HOME": SCRATCH, "TMPDIR": SCRATCH, "PYTHONUNBUFFERED": "1", **stage.cluster.environment}
    if not stage.is_set:
        return [{"name": key, "value": value} for key, value in values.items()]
    values |= {"MASTER_ADDR": f"{name}-nodes-0-0.{name}", "MASTER_PORT": str(PORT), "NNODES": str(stage.pods.nodes)}
    node_rank = {"fieldRef": {"fieldPath": f"metadata.annotations['{NODE}']"}}
    environment: list[Manifest] = [{"name": key, "value": value} for key, value in values.items()]
    return [*environment, {"name": "NODE_RANK", "valueFrom": node_rank}]


def _build_volumes(stage: Stage) -> list[Manifest]:
    file = {"path": "config.yaml", "fieldRef": {"fieldPath": f"metadata.annotations['{CONFIG}']"}}
    volumes: list[Manifest] = [
        {"name": "config", "downwardAPI": {"items": [file]}},
        {"name": "scratch", "emptyDir": {"sizeLimit": stage.pods.scratch}},
        {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": stage.pods.shared_memory}},
    ]
    for each in _list_claims(stage):
        source = {"claimName": each.claim, "readOnly": True}
        volumes.append({"name": each.volume, "persistentVolumeClaim": source})
    return volumes


def _list_claims(stage: Stage) -> list[Claim]:
    claims = enumerate(stage.cluster.claims.items())
    return [Claim(f"claim-{number}", folder, claim) for number, (folder, claim) in claims]
