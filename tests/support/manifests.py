"""What is wrong with Kubernetes manifests, found without a cluster: functions over parsed documents.

`schema_problems` is about the shape of one document. `problems` is about what no schema says: pod security, lengths of
names, selectors, retries, and that whatever a document names is among the documents, so a Job is checked together with
the build that it is to run in. Secrets are left out: people create them, and nobody commits them.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.support.manifest_schemas import minors, schema_problems, title, with_made
from tests.support.pod_security import STAGE, containers, pod_problems, pods

__all__ = ["minors", "problems", "rendered", "schema_problems"]

CLUSTER_WIDE = {"Namespace", "PriorityClass", "ClusterQueue", "ResourceFlavor"}
SCALED = {"Deployment", "StatefulSet", "DaemonSet", "ReplicaSet"}
QUEUE = "kueue.x-k8s.io/queue-name"
NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?")
LONGEST, LONGEST_JOB = 63, 52  # letters; an indexed Job's pods and hosts add up to eleven
SUFFIX = "-xxxxx"  # of a pod


def rendered(folder: Path) -> list[dict]:
    """The documents that `kubectl kustomize` makes of a folder."""
    made = subprocess.run(["kubectl", "kustomize", str(folder)], check=True, capture_output=True, text=True)
    return list(yaml.safe_load_all(made.stdout))


def problems(documents: list[dict]) -> list[str]:
    """Everything that is wrong with a build but the shape of its documents, as "Kind/name: what"."""
    found = []
    for document in documents:
        for check in (_name, _labels, _namespace, _selector, _policy, _probes, _bindings, _queue):
            found += [f"{title(document)}: {problem}" for problem in check(document, documents)]
        for metadata, pod in pods(document):
            found += [f"{title(document)}: {problem}" for problem in pod_problems(metadata, pod)]
            found += [f"{title(document)}: {problem}" for problem in _references(pod, documents)]
    for job in with_made(documents):
        found += [f"{title(job)}: {problem}" for problem in _retries(job)] if job["kind"] == "Job" else []
    names = [f"{title(each)} of {each['metadata'].get('namespace')}" for each in documents]
    return found + [f"{name}: is there twice" for name in dict.fromkeys(names) if names.count(name) > 1]


def _find(documents: list[dict], kind: str, name: str | None) -> bool:
    return any(each["kind"] == kind and each["metadata"]["name"] == name for each in documents)


def _name(document: dict, documents: list[dict]) -> Iterator[str]:
    name, longest = document["metadata"]["name"], LONGEST
    if document["kind"] == "Job":
        longest = LONGEST_JOB
    if document["kind"] == "JobSet":
        longest = LONGEST - max(map(_added, document["spec"]["replicatedJobs"]))
    if len(name) > longest:
        yield f"its name has {len(name)} letters; {longest} are the most"
    if not NAME.fullmatch(name):
        yield "its name has other letters than a-z 0-9 - ."


def _added(replicated: dict) -> int:
    """Letters that a JobSet's pods add to its name: which Job, which of its kind, which pod, five at random."""
    jobs, completions = replicated.get("replicas", 1), replicated["template"]["spec"].get("completions", 1)
    return len(f"-{replicated['name']}-{jobs - 1}-{completions - 1}{SUFFIX}")


def _labels(document: dict, documents: list[dict]) -> Iterator[str]:
    for key, value in _pairs(document):
        if len(value) > LONGEST or not LABEL.fullmatch(value):
            yield f"label {key}: {value!r} is longer than {LONGEST} or has other letters than A-Z a-z 0-9 . _ -"


def _pairs(tree: object) -> Iterator[tuple[str, str]]:
    """Every label, and every label that is selected by, at any depth."""
    if isinstance(tree, list):
        for each in tree:
            yield from _pairs(each)
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from value.items() if key in ("labels", "matchLabels") else _pairs(value)


def _namespace(document: dict, documents: list[dict]) -> Iterator[str]:
    kind, namespace = document["kind"], document["metadata"].get("namespace")
    if kind == "Secret":
        yield "a Secret is created by people, never committed"
    if kind in CLUSTER_WIDE and namespace:
        yield f"has the namespace {namespace}, and belongs to the whole cluster"
    if kind not in CLUSTER_WIDE and not _find(documents, "Namespace", namespace):
        yield f"its namespace {namespace} is not here"


def _retries(job: dict) -> Iterator[str]:
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    if pod.get("restartPolicy") not in ("Never", "OnFailure"):
        yield "restartPolicy is neither Never nor OnFailure"
    if spec.get("completionMode") == "Indexed" and "completions" not in spec:
        yield "is Indexed without completions"
    if "podFailurePolicy" not in spec:
        return
    if pod.get("restartPolicy") != "Never":
        yield "podFailurePolicy needs restartPolicy Never"
    if spec.get("podReplacementPolicy", "Failed") != "Failed":
        yield "podFailurePolicy needs podReplacementPolicy Failed"
    for codes in [rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]:
        if codes.get("containerName") not in [None, *(each["name"] for each in containers(pod))]:
            yield f"podFailurePolicy names the container {codes['containerName']}, which is not there"
        if codes["operator"] == "In" and 0 in codes["values"]:
            yield "podFailurePolicy takes exit code 0 for a failure"


def _selector(document: dict, documents: list[dict]) -> Iterator[str]:
    kind, spec = document["kind"], document.get("spec", {})
    if kind in SCALED and not _selects(spec["selector"], spec["template"]["metadata"].get("labels", {})):
        yield "its selector does not match its own pods"
    if kind == "Service":
        labelled = [(metadata.get("labels", {}), pod) for each in documents for metadata, pod in pods(each)]
        chosen = [pod for labels, pod in labelled if spec["selector"].items() <= labels.items()]
        ports = {port.get("name") for pod in chosen for each in pod["containers"] for port in each.get("ports", [])}
        if not chosen:
            yield "selects no pod"
        for target in [port["targetPort"] for port in spec["ports"] if port["targetPort"] not in ports]:
            yield f"leads to the port {target}, which no pod that it selects has"


def _policy(document: dict, documents: list[dict]) -> Iterator[str]:
    if document["kind"] != "NetworkPolicy":
        return
    spec = document["spec"]
    peers = [peer for rule in spec.get("ingress", []) for peer in rule.get("from", [{}])]
    peers += [peer for rule in spec.get("egress", []) for peer in rule.get("to", [{}])]
    known = [STAGE, *(metadata.get("labels", {}) for each in documents for metadata, _ in pods(each))]
    own = [peer["podSelector"] for peer in peers if "podSelector" in peer and "namespaceSelector" not in peer]
    for selector in (spec["podSelector"], *own):
        if not any(_selects(selector, labels) for labels in known):
            yield f"{selector} selects no pod"
    for kind in ("ingress", "egress"):
        if spec.get(kind) and kind.capitalize() not in spec["policyTypes"]:
            yield f"has rules for {kind}, which is not among its policyTypes"
    if {} in peers:
        yield "has a rule that lets everybody through"
    for block in [peer["ipBlock"] for peer in peers if "ipBlock" in peer]:
        if block["cidr"] in ("0.0.0.0/0", "::/0") and not {"169.254.0.0/16", "fe80::/10"} & {*block.get("except", [])}:
            yield f"{block['cidr']} includes link-local addresses, where clouds hand out credentials"


def _selects(selector: dict, labels: dict) -> bool:
    """matchLabels and matchExpressions; of the operators In, the only one that we use."""
    expressions = selector.get("matchExpressions", [])
    chosen = all(each["operator"] == "In" and labels.get(each["key"]) in each["values"] for each in expressions)
    return chosen and selector.get("matchLabels", {}).items() <= labels.items()


def _probes(document: dict, documents: list[dict]) -> Iterator[str]:
    if document["kind"] != "Deployment":
        return
    for container in document["spec"]["template"]["spec"]["containers"]:
        ports = {port.get("name") for port in container.get("ports", [])}
        for kind in ("livenessProbe", "readinessProbe"):
            if kind not in container:
                yield f"container {container['name']}: has no {kind}"
        for kind in ("livenessProbe", "readinessProbe", "startupProbe"):
            probe = container.get(kind, {})
            asked = probe.get("httpGet", probe.get("tcpSocket", {})).get("port")
            if asked is not None and asked not in ports:
                yield f"container {container['name']}: {kind} asks the port {asked}, which it does not have"


def _bindings(document: dict, documents: list[dict]) -> Iterator[str]:
    for each in [document["roleRef"], *document["subjects"]] if document["kind"] == "RoleBinding" else []:
        if not _find(documents, each["kind"], each["name"]):
            yield f"{each['kind']} {each['name']} is not here"


def _references(pod: dict, documents: list[dict]) -> Iterator[str]:
    wanted = {("ServiceAccount", pod.get("serviceAccountName")), ("PriorityClass", pod.get("priorityClassName"))}
    for volume in pod.get("volumes", []):
        if not volume.get("configMap", {}).get("optional"):  # people may create it
            wanted.add(("ConfigMap", volume.get("configMap", {}).get("name")))
        wanted.add(("PersistentVolumeClaim", volume.get("persistentVolumeClaim", {}).get("claimName")))
    for container in containers(pod):
        wanted |= {("ConfigMap", each.get("configMapRef", {}).get("name")) for each in container.get("envFrom", [])}
        sources = [each.get("valueFrom", {}) for each in container.get("env", [])]
        wanted |= {("ConfigMap", each.get("configMapKeyRef", {}).get("name")) for each in sources}
    for kind, name in sorted((kind, name) for kind, name in wanted if name):
        if not _find(documents, kind, name):
            yield f"{kind} {name} is not here"


def _queue(document: dict, documents: list[dict]) -> Iterator[str]:
    kind, spec = document["kind"], document.get("spec", {})
    queue = document["metadata"].get("labels", {}).get(QUEUE)
    if queue and not _find(documents, "LocalQueue", queue):
        yield f"LocalQueue {queue} is not here"
    if kind == "LocalQueue" and not _find(documents, "ClusterQueue", spec["clusterQueue"]):
        yield f"ClusterQueue {spec['clusterQueue']} is not here"
    for group in spec["resourceGroups"] if kind == "ClusterQueue" else []:
        for flavor in group["flavors"]:
            if [each["name"] for each in flavor["resources"]] != group["coveredResources"]:
                yield f"flavor {flavor['name']} does not list the covered resources, in their order"
            if not _find(documents, "ResourceFlavor", flavor["name"]):
                yield f"ResourceFlavor {flavor['name']} is not here"
        queued = [pod for each in documents if QUEUE in each["metadata"].get("labels", {}) for _, pod in pods(each)]
        asked = {name for pod in queued for each in containers(pod) for name in each["resources"].get("limits", {})}
        for name in sorted(asked - {*group["coveredResources"]}):
            yield f"does not cover {name}, which a queued pod asks for: Kueue would never admit it"
