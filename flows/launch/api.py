"""The API server of a cluster: where it is, and the requests about Jobs that the launcher sends to it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import urllib3
import yaml
from kubernetes import client, watch
from kubernetes import config as kubeconfig

from dmdr.errors import ConfigError
from flows.launch.cluster_errors import ignore_missing
from flows.launch.failure import StageFailed
from flows.launch.objects import Job, JobList, Manifest

TIMEOUT = (5, 30)  # seconds to connect and to answer
MERGE = "application/merge-patch+json"  # every kind of object takes this one


@dataclass(frozen=True)
class ResourceKind:
    """A kind of object, as the API server addresses it."""

    group: str
    version: str
    plural: str

    @property
    def singular(self) -> str:
        return self.plural.removesuffix("s")


JOB = ResourceKind("batch", "v1", "jobs")  # a stage on one node
JOB_SET = ResourceKind("jobset.x-k8s.io", "v1alpha2", "jobsets")  # a stage on several


@dataclass(frozen=True)
class JobApi:
    """Requests about one kind of Job in one namespace. What the client raises is not translated here."""

    api: client.CustomObjectsApi
    kind: ResourceKind
    namespace: str

    @property
    def place(self) -> tuple[str, str, str, str]:
        """The first four arguments of every request."""
        return self.kind.group, self.kind.version, self.namespace, self.kind.plural

    def list_jobs(self, selector: str) -> tuple[Job, ...]:
        """The Jobs that have certain labels."""
        answer = self.api.list_namespaced_custom_object(*self.place, label_selector=selector, _request_timeout=TIMEOUT)
        return JobList.model_validate(answer).items

    def create_job(self, manifest: Manifest) -> Job:
        """Create a Job; 409 if there is one of its name."""
        answer = self.api.create_namespaced_custom_object(*self.place, manifest, _request_timeout=TIMEOUT)
        return Job.model_validate(answer)

    def read_job(self, name: str) -> Job:
        """The Job of that name."""
        answer = self.api.get_namespaced_custom_object(*self.place, name, _request_timeout=TIMEOUT)
        return Job.model_validate(answer)

    def annotate_job(self, name: str, annotations: dict[str, str]) -> Job:
        """Add annotations to a Job; returns it as it is then."""
        patch: Manifest = {"metadata": {"annotations": annotations}}
        answer = self.api.patch_namespaced_custom_object(
            *self.place, name, patch, _content_type=MERGE, _request_timeout=TIMEOUT
        )
        return Job.model_validate(answer)

    def delete_job(self, name: str, *, unchanged: Job | None = None) -> None:
        """Delete a Job with its pods, in the background of the cluster. It may be gone already.

        unchanged: the Job as it was read. If it has changed since, or is another by now, the cluster answers 409.
        """
        as_read = None
        if unchanged is not None:
            about = unchanged.metadata
            as_read = client.V1Preconditions(uid=about.uid, resource_version=about.resource_version)
        options = client.V1DeleteOptions(propagation_policy="Foreground", preconditions=as_read)
        with ignore_missing():
            self.api.delete_namespaced_custom_object(*self.place, name, body=options, _request_timeout=TIMEOUT)

    def wait_for_event(self, job: Job, seconds: int) -> None:
        """Return at the first event of a Job after it was read, or after `seconds`."""
        events = watch.Watch()
        try:
            for _ in events.stream(
                self.api.list_namespaced_custom_object,
                *self.place,
                timeout_seconds=seconds,
                field_selector=f"metadata.name={job.name}",
                resource_version=job.metadata.resource_version,
                _request_timeout=(5, seconds + 10),
            ):
                return
        except (client.ApiException, urllib3.exceptions.HTTPError, ValueError):
            time.sleep(1)  # 410 when the version is too old, a broken connection, half an event
        finally:
            events.stop()


def find_kubeconfig() -> str:
    """The files that kubectl would read."""
    return os.environ.get("KUBECONFIG") or str(Path("~/.kube/config").expanduser())


def is_known() -> bool:
    """Whether anything says where a cluster is."""
    if "KUBECONFIG" in os.environ or "KUBERNETES_SERVICE_HOST" in os.environ:
        return True
    return Path(find_kubeconfig()).exists()


def connect(stage: str) -> client.ApiClient:
    """A client of the cluster that kubectl would speak to, or of the one that this process runs in.

    Raises:
        StageFailed: there is none.
    """
    files = find_kubeconfig()
    is_pod = "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ
    try:
        if is_pod:
            kubeconfig.load_incluster_config()
        else:
            kubeconfig.load_kube_config(files)
    except (kubeconfig.ConfigException, OSError, yaml.YAMLError) as error:
        why = (
            f"no cluster to run on ({files}: {' '.join(str(error).split())}); set KUBECONFIG, or leave "
            "execution.cluster out to run on this machine"
        )
        raise StageFailed(stage, ConfigError.exit_code, why, final=True) from error
    settings = client.Configuration.get_default_copy()
    settings.retries = False  # Backoff repeats requests, and tells the user
    return client.ApiClient(settings)
