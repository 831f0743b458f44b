"""What a cluster answers when it does not do what it is asked, as one line with the remedy."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

import urllib3
from kubernetes import client

from dmdr.errors import ConfigError
from flows.launch.failure import StageFailed

MISSING, CONFLICT = 404, 409  # HTTP's
RIGHT_IS_MISSING = re.compile(r" cannot \w+ resource ")  # how RBAC refuses; quotas and webhooks answer 403, too


class ClusterUnavailable(Exception):
    """The cluster did not answer, or not sensibly. Another try may help."""


class NameTaken(ClusterUnavailable):
    """The cluster has an object of this name: another flow was quicker, or the answer to our own creation was lost."""


@contextmanager
def explain_errors(stage: str, verb: str, resource: str, *, namespace: str, host: str) -> Iterator[None]:
    """Translate what the client raises inside the block.

    verb, resource: of the request, for example "list" and "jobs". host: the address of the cluster.

    Raises:
        ClusterUnavailable: another try may help.
        StageFailed: the cluster refuses.
    """
    try:
        yield
    except urllib3.exceptions.HTTPError as error:
        raise ClusterUnavailable(f"the cluster at {host} does not answer") from error
    except client.ApiException as error:
        if error.status == CONFLICT:
            raise NameTaken(f"the cluster has an object of that name already: {read_message(error)}") from error
        if is_outage(error):
            raise ClusterUnavailable(f"the cluster answered {error.status}: {read_message(error)}") from error
        why = explain_refusal(error, verb, resource, namespace)
        raise StageFailed(stage, ConfigError.exit_code, why, final=True) from error


@contextmanager
def ignore_missing() -> Iterator[None]:
    """Leave the block where the cluster has no such object."""
    try:
        yield
    except client.ApiException as error:
        if error.status != MISSING:
            raise


def is_outage(error: client.ApiException) -> bool:
    """Whether the cluster is busy or broken, rather than that it refuses."""
    return error.status == 429 or (error.status or 0) >= 500


def explain_refusal(error: client.ApiException, verb: str, resource: str, namespace: str) -> str:
    """What the cluster refuses, why, and what to do."""
    message = read_message(error)
    if error.status == 401:
        return (
            f"the cluster does not know who this flow is ({message}); renew the credentials in KUBECONFIG, or the "
            "ServiceAccount's token"
        )
    if error.status == 403 and RIGHT_IS_MISSING.search(message):
        return (
            f"the cluster does not let this flow {verb} {resource} in the namespace {namespace}: {message}; "
            "k8s/base has the Role that it needs"
        )
    if error.status == 403 and " quota" in message:
        return (
            f"the namespace {namespace} has no room for more {resource}: {message}; delete those that have ended, or "
            "raise that quota"
        )
    if error.status == MISSING and "namespace" in message:
        return f"the cluster has no namespace {namespace}; create it (k8s/base), or set execution.cluster.namespace"
    if error.status == MISSING:
        return f"the cluster knows no {resource}, which several nodes need ({message}); install JobSet or set nodes: 1"
    return f"the cluster refuses to {verb} {resource} in the namespace {namespace}: {message}"


def read_message(error: client.ApiException) -> str:
    """The API server's message, without the JSON around it."""
    try:
        message = str(json.loads(error.body or "")["message"])
    except (TypeError, ValueError, KeyError):
        message = f"{error.status} {error.reason}"
    return " ".join(message.split()).rstrip(".")
