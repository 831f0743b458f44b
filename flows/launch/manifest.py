"""The Job, or for several nodes the JobSet, that a stage runs as on Kubernetes: data, never text that is filled in.

1. Everything is in the one object: the config file is an annotation of the pod, which mounts it. So the flow needs no
   right but to create Jobs, and `kubectl create -f` of what `dmdr render` prints needs nothing else either.
2. A name is a function of run, stage and attempt, so that a second creation meets the first.
3. One node: a Job of one indexed pod. Evictions replace it and are not counted, exit codes 64 to 66 end it at once.
4. Several nodes: a JobSet. A pod that ends badly, evicted or not, restarts all of them, since the others wait for it;
   each pod starts its own ranks and finds the first pod by its host name. torchrun is not used: it turns every exit
   code into 1 and kills ranks 30 s after SIGTERM, whatever their checkpoint needs.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import PurePosixPath

from dmdr.config.identity import fingerprint, identity
from dmdr.config.stages import TABLE
from dmdr.errors import ConfigError
from flows.launch.failure import FINAL
from flows.launch.stage import PREFIX, RUN, STAGE, Stage, build_options, to_label
from stages.reports.provenance import teacher_name

TEACHER, ATTEMPT, FLOW_RUN = (f"{PREFIX}/{n}" for n in ("teacher", "attempt", "flow-run"))
WAITS = f"flow-run.{PREFIX}/"  # and its id: the annotations of all flow runs that wait for a Job
STORE, IDENTITY, CONFIG = f"{PREFIX}/store", f"{PREFIX}/identity", f"{PREFIX}/config"
COMPONENT = {"app.kubernetes.io/name": "dmdr", "app.kubernetes.io/component": "stage"}
CONTAINER = "stage"
MOUNT, SCRATCH = "/etc/dmdr", "/scratch"
PORT = 29500  # where the first rank is found by those of other nodes
NOBODY = 10001
LONGEST = 46  # of a name: the pods of a JobSet add up to 17 letters, and 63 is the limit


def job_name(run: str, stage: str, attempt: int) -> str:
    """A host name of at most LONGEST letters; a run whose name has to be changed for that adds a digest of it."""
    last = f"-{stage.replace('_', '-')}-{attempt}"
    whole = f"dmdr-{run}"
    plain = re.sub(r"[^a-z0-9-]", "-", whole)
    if plain != whole or len(plain) + len(last) > LONGEST:
        digest = hashlib.sha256(run.encode()).hexdigest()[:8]
        plain = f"{plain[: LONGEST - len(last) - 9].rstrip('-')}-{digest}"
    return plain.rstrip("-") + last


def build_mark(flow_run: str | None, deployment: str | None) -> dict[str, str]:
    """The annotation by which others know that a flow run waits for a Job, and of which deployment it is a run."""
    return {f"{WAITS}{flow_run}": deployment or ""} if flow_run else {}


def read_marks(job: dict) -> dict[str, str]:
    """flow run -> deployment, or "", of all that wait for a Job or once did."""
    about = job["metadata"].get("annotations") or {}
    owner = job["metadata"]["labels"].get(FLOW_RUN)
    found = {owner: ""} if owner else {}
    return found | {key.removeprefix(WAITS): value for key, value in about.items() if key.startswith(WAITS)}


def build_manifest(stage: Stage, attempt: int, flow_run: str | None = None, deployment: str | None = None) -> dict:
    """The object to create. flow_run: who starts it, and stops it when it is cancelled itself; deployment: of which.

    Raises:
        ConfigError: the store is a folder that no pod can see.
    """
    _check_store(stage)
    called = job_name(stage.run, stage.name, attempt)
    teacher = teacher_name(stage.teacher or stage.config.teacher.path)
    labels = {
        **COMPONENT,
        RUN: stage.run_label,
        STAGE: stage.name,
        TEACHER: to_label(teacher),
        ATTEMPT: str(attempt),
    }
    marks = labels | ({FLOW_RUN: flow_run} if flow_run else {})
    marks |= {"kueue.x-k8s.io/queue-name": stage.cluster.queue} if stage.cluster.queue else {}
    settings = {"settings": identity(stage.config, stage.name), "teacher": stage.teacher or stage.config.teacher.path}
    about = {STORE: stage.store, IDENTITY: fingerprint(settings)}
    metadata = {"name": called, "namespace": stage.cluster.namespace, "labels": marks, "annotations": about}
    metadata["annotations"] |= {f"{PREFIX}/run": stage.run, **build_mark(flow_run, deployment)}
    job = _build_job(stage, labels, called)
    if not stage.is_set:
        job |= {"ttlSecondsAfterFinished": stage.cluster.ttl}
        return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job}
    again = {"action": "FailJobSet", "name": "input_stays_bad", "onJobFailureReasons": ["PodFailurePolicy"]}
    spec = {
        "network": {"enableDNSHostnames": True, "subdomain": called, "publishNotReadyAddresses": True},
        "failurePolicy": {"maxRestarts": stage.pods.retries, "rules": [again]},
        "ttlSecondsAfterFinished": stage.cluster.ttl,
        "replicatedJobs": [{"name": "nodes", "replicas": 1, "template": {"metadata": {"labels": labels}, "spec": job}}],
    }
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}


def _check_store(stage: Stage) -> None:
    store = stage.store.removeprefix("file://")
    if "://" not in store and not any(PurePosixPath(store).is_relative_to(folder) for folder in stage.cluster.claims):
        raise ConfigError(
            f"the store is the folder {stage.store}, which no pod of the cluster sees; give --store s3://BUCKET/PREFIX"
        )


def _build_job(stage: Stage, labels: dict[str, str], called: str) -> dict:
    pods = stage.pods
    rules = [
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [*FINAL]},
        }
    ]
    if not stage.is_set:
        evicted = {"type": "DisruptionTarget", "status": "True"}
        rules.append({"action": "Ignore", "onPodConditions": [evicted]})
    template = {
        "metadata": {"labels": labels, "annotations": {CONFIG: stage.text}},
        "spec": _build_pod(stage, called),
    }
    job = {
        "completionMode": "Indexed",
        "completions": pods.nodes,
        "parallelism": pods.nodes,
        "backoffLimit": 0 if stage.is_set else pods.retries,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": rules},
        "template": template,
    }
    return job | ({"activeDeadlineSeconds": pods.deadline} if pods.deadline else {})


def _build_pod(stage: Stage, called: str) -> dict:
    cluster, pods = stage.cluster, stage.pods
    user = {"runAsNonRoot": True, "runAsUser": NOBODY, "runAsGroup": NOBODY, "fsGroup": NOBODY}
    spec = {
        "restartPolicy": "Never",
        "serviceAccountName": cluster.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": pods.grace,
        "securityContext": {**user, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [_build_container(stage, called)],
        "volumes": _build_volumes(stage),
    }
    optional = {
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


def _build_container(stage: Stage, called: str) -> dict:
    pods = stage.pods
    limits = {"cpu": pods.cpu, "memory": pods.memory, "ephemeral-storage": pods.scratch}
    limits |= {pods.gpu_resource: str(count_gpus(stage))} if count_gpus(stage) else {}
    return {
        "name": CONTAINER,
        "image": pods.image,
        "command": ["python", "-m", "stages"],
        "args": [
            stage.name,
            *build_options(f"{MOUNT}/config.yaml", stage.run, stage.store, stage.teacher, stage.adopt),
        ],
        "env": _build_environment(stage, called),
        "envFrom": [{"secretRef": {"name": secret}} for secret in stage.cluster.secrets],
        "resources": {"limits": limits, "requests": dict(limits)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "config", "mountPath": MOUNT, "readOnly": True},
            {"name": "scratch", "mountPath": SCRATCH},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
            *({"name": volume, "mountPath": at, "readOnly": True} for volume, at, _ in _list_claims(stage)),
        ],
    }


def _build_environment(stage: Stage, called: str) -> list[dict]:
    ours = {"HOME": SCRATCH, "TMPDIR": SCRATCH, "PYTHONUNBUFFERED": "1"}
    found = [{"name": key, "value": value} for key, value in {**ours, **stage.cluster.environment}.items()]
    if stage.is_set:
        first, nodes = f"{called}-nodes-0-0.{called}", str(stage.pods.nodes)
        meet = {"MASTER_ADDR": first, "MASTER_PORT": str(PORT), "NNODES": nodes}
        found += [{"name": key, "value": value} for key, value in meet.items()]
        index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        found.append({"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": index}}})
    return found


def _build_volumes(stage: Stage) -> list[dict]:
    file = {"path": "config.yaml", "fieldRef": {"fieldPath": f"metadata.annotations['{CONFIG}']"}}
    return [
        {"name": "config", "downwardAPI": {"items": [file]}},
        {"name": "scratch", "emptyDir": {"sizeLimit": stage.pods.scratch}},
        {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": stage.pods.shared_memory}},
        *(
            {"name": volume, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
            for volume, _, claim in _list_claims(stage)
        ),
    ]


def _list_claims(stage: Stage) -> list[tuple[str, str, str]]:
    """(name of the volume, folder in the pod, claim)."""
    return [(f"claim-{n}", at, claim) for n, (at, claim) in enumerate(stage.cluster.claims.items())]
