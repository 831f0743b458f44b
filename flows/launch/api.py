"""The API server of a cluster: how it is found, and how long it may not answer."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from kubernetes import client
from kubernetes import config as kubeconfig

from flows.launch.failure import StageFailed

CONFIG, IO = 64, 74  # exit codes, as in stages/__main__.py
OUTAGE = 900  # seconds that the cluster may not answer
FIRST = 20  # the same, before it has ever answered
SHORTEST, TOLD, LONGEST = 0.125, 1.0, 8.0  # pauses between tries, in seconds; from the second on they are told of
TIMEOUT = (5, 30)  # seconds to connect and to answer
MERGE = "application/merge-patch+json"  # the one that every kind of object takes
KINDS = {False: ("batch", "v1", "jobs"), True: ("jobset.x-k8s.io", "v1alpha2", "jobsets")}


class ClusterUnavailable(Exception):
    """The cluster did not answer, or not sensibly; worth another try."""


class NameTaken(ClusterUnavailable):
    """The name is taken: somebody was quicker, or the answer to our own creation was lost."""


class Backoff:
    """With a cluster that does not answer: pauses that grow, and an end."""

    def __init__(self, stage: str, say: Callable[[str], None]) -> None:
        self.stage, self.say = stage, say
        self.seconds = FIRST  # until it has answered once
        self.answered()

    def answered(self) -> None:
        self.until, self.pause = None, SHORTEST

    def reached(self) -> None:
        """It answered, if only in part: what fails from now on is an outage, not a wrong address."""
        if self.seconds != OUTAGE:
            self.seconds = OUTAGE
            self.answered()

    def wait(self, error: ClusterUnavailable) -> None:
        """Pause before another try.

        Raises:
            StageFailed: it has been long enough.
        """
        now = time.monotonic()
        if self.until is None:
            self.until = now + self.seconds
        elif now > self.until:
            remedy = "see that the cluster runs and kubectl reaches it, then repeat the command"
            raise StageFailed(self.stage, IO, f"{error}; {remedy}", final=True) from error
        if self.pause == TOLD and not isinstance(error, NameTaken):
            self.say(f"{self.stage}: {error}; trying again for {self.seconds} s")
        time.sleep(self.pause)
        self.pause = min(2 * self.pause, LONGEST)


def kubeconfig_files() -> str:
    return os.environ.get("KUBECONFIG") or str(Path("~/.kube/config").expanduser())


def is_known() -> bool:
    """Whether anything says where a cluster is."""
    return bool({"KUBECONFIG", "KUBERNETES_SERVICE_HOST"} & os.environ.keys()) or Path(kubeconfig_files()).exists()


def connect(stage: str) -> tuple[client.CustomObjectsApi, client.CoreV1Api]:
    """The cluster that kubectl would speak to, or the one that this process runs in.

    Raises:
        StageFailed: there is none.
    """
    files = kubeconfig_files()
    is_pod = "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ
    try:
        kubeconfig.load_incluster_config() if is_pod else kubeconfig.load_kube_config(files)
    except (kubeconfig.ConfigException, OSError, yaml.YAMLError) as error:
        why = (
            f"no cluster to run on ({files}: {' '.join(str(error).split())}); set KUBECONFIG, or leave "
            "execution.cluster out to run on this machine"
        )
        raise StageFailed(stage, CONFIG, why, final=True) from error
    settings = client.Configuration.get_default_copy()
    settings.retries = False  # Patience does it, and tells
    api = client.ApiClient(settings)
    return client.CustomObjectsApi(api), client.CoreV1Api(api)


def delete_job(api: client.CustomObjectsApi, where: tuple[str, ...], name: str, *, only: dict | None = None) -> None:
    """Delete a Job with its pods, in the background of the cluster; it may be gone already.

    only: the Job as it was read; if it has changed since, or is another by now, the cluster refuses with 409.
    """
    as_read = {key: only["metadata"][key] for key in ("uid", "resourceVersion")} if only else None
    body = client.V1DeleteOptions(propagation_policy="Foreground", preconditions=as_read)
    try:
        api.delete_namespaced_custom_object(*where, name, body=body, _request_timeout=TIMEOUT)
    except client.ApiException as error:
        if error.status != 404:
            raise


def error_message(error: client.ApiException) -> str:
    """What the API server said, without its JSON."""
    try:
        said = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        said = f"{error.status} {error.reason}"
    return " ".join(said.split()).rstrip(".")
