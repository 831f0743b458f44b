"""The shape of Kubernetes manifests: the schemas of a minor, strictly; of Kueue's and JobSet's objects what we use.

A key of a custom resource that is not listed here is refused: with nobody to read it, a typing error would be a setting
that is silently not set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache

import jsonschema
import kubernetes_validate
from kubernetes_validate.utils import all_versions


def minors() -> list[str]:
    """The last three Kubernetes minors whose schemas are installed, such as 1.36."""
    return [*dict.fromkeys(".".join(version.split(".")[:2]) for version in all_versions())][-3:]


def _only(required: str = "", **properties: object) -> dict:
    """An object with these keys and no others."""
    keys = {"type": "object", "additionalProperties": False}
    return {**keys, "required": required.split(), "properties": properties}


def _list(items: object) -> dict:
    return {"type": "array", "items": items, "minItems": 1}


TEXT, FLAG, OBJECT = {"type": "string"}, {"type": "boolean"}, {"type": "object"}
COUNT = {"type": "integer", "minimum": 0}
QUOTA = _only("name nominalQuota", name=TEXT, nominalQuota={"type": ["string", "integer"]})
FLAVOR = _only("name resources", name=TEXT, resources=_list(QUOTA))
GROUP = _only("coveredResources flavors", coveredResources=_list(TEXT), flavors=_list(FLAVOR))
REASONS = "BackoffLimitExceeded DeadlineExceeded FailedIndexes MaxFailedIndexesExceeded PodFailurePolicy"
RULE = _only(
    "name action",
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons=_list({"enum": REASONS.split()}),
    targetReplicatedJobs=_list(TEXT),
)
SPECS = {  # from the Go types of Kueue and JobSet
    ("kueue.x-k8s.io/v1beta2", "ResourceFlavor"): _only(
        nodeLabels=OBJECT, nodeTaints=_list(OBJECT), tolerations=_list(OBJECT)
    ),
    ("kueue.x-k8s.io/v1beta2", "ClusterQueue"): _only(
        "namespaceSelector resourceGroups",
        namespaceSelector=OBJECT,
        queueingStrategy={"enum": ["StrictFIFO", "BestEffortFIFO"]},
        preemption=_only(withinClusterQueue={"enum": ["Never", "LowerPriority", "LowerOrNewerEqualPriority"]}),
        resourceGroups=_list(GROUP),
    ),
    ("kueue.x-k8s.io/v1beta2", "LocalQueue"): _only("clusterQueue", clusterQueue=TEXT),
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): _only(
        "replicatedJobs",
        replicatedJobs=_list(_only("name template", name=TEXT, replicas=COUNT, template=OBJECT)),
        network=_only(enableDNSHostnames=FLAG, subdomain=TEXT, publishNotReadyAddresses=FLAG),
        failurePolicy=_only(
            maxRestarts=COUNT, restartStrategy={"enum": ["Recreate", "BlockingRecreate"]}, rules=_list(RULE)
        ),
        suspend=FLAG,
        ttlSecondsAfterFinished=COUNT,
    ),
}
WHOLE = {
    key: _only("apiVersion kind metadata spec", apiVersion=TEXT, kind=TEXT, metadata=OBJECT, spec=spec)
    for key, spec in SPECS.items()
}


def title(document: dict) -> str:
    """How a document is called in what we find."""
    return f"{document['kind']}/{document['metadata']['name']}"


def with_made(documents: list[dict]) -> Iterator[dict]:
    """The documents, and the Jobs that JobSets among them make: of each kind of Job the last."""
    for document in documents:
        yield document
        if document["kind"] == "JobSet":
            yield from (_made(document, each) for each in document["spec"]["replicatedJobs"])


def _made(jobset: dict, replicated: dict) -> dict:
    last = replicated.get("replicas", 1) - 1
    metadata = jobset["metadata"] | replicated["template"].get("metadata", {})
    metadata["name"] = f"{jobset['metadata']['name']}-{replicated['name']}-{last}"
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": replicated["template"]["spec"]}


def schema_problems(documents: list[dict], minor: str) -> list[str]:
    """What the schemas of a Kubernetes minor, such as "1.36", refuse; of each document the first fault only."""
    found = (_fault(json.dumps(each, sort_keys=True), minor) for each in with_made(documents))
    return [fault for fault in found if fault]


@cache  # most documents are in every build, and a schema takes a moment to load
def _fault(text: str, minor: str) -> str | None:
    document = json.loads(text)
    custom = WHOLE.get((document["apiVersion"], document["kind"]))
    try:
        if custom:
            jsonschema.validate(document, custom)
        else:
            kubernetes_validate.validate(document, minor, strict=True)
    except jsonschema.ValidationError as error:
        return f"{title(document)}: {'.'.join(map(str, error.path))}: {error.message} (Kubernetes {minor})"
    except kubernetes_validate.SchemaNotFoundError as error:
        return f"{title(document)}: {error.message}"
    return None
