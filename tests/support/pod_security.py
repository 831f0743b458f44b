"""The Pod Security Standard *restricted*, and what we ask beyond it, over pods and pod templates of any kind.

1. Where the standard leaves a choice that we never need, there is none: no added capability, no sysctl, no SELinux or
   Windows option, no procMount.
2. Beyond it: a read-only root file system, a numeric user, limits, images by digest, a bound for every emptyDir, no
   secret in the open, and the API's token for the flow alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

STAGE = {"app.kubernetes.io/name": "dmdr", "app.kubernetes.io/component": "stage"}
STAGE_LABELS = ("dmdr.dev/run", "dmdr.dev/stage", "dmdr.dev/teacher")
FLOW_ACCOUNT, STAGE_ACCOUNT = "dmdr-flow", "dmdr-stage"
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
PROFILES = {"seccompProfile", "appArmorProfile"}
FOREIGN = ("seLinuxOptions", "windowsOptions", "procMount", "sysctls")
HOST = ("hostNetwork", "hostPID", "hostIPC", "hostAliases")
IMAGE = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL|AUTH|CONNECTION", re.IGNORECASE)
UNITS = {"m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def pods(tree: object) -> Iterator[tuple[dict, dict]]:
    """(metadata, spec) of every pod and pod template at any depth of a document, whatever kind it is."""
    if isinstance(tree, list):
        for each in tree:
            yield from pods(each)
    if isinstance(tree, dict):
        spec = tree.get("spec")
        if isinstance(spec, dict) and isinstance(spec.get("containers"), list):
            yield tree.get("metadata", {}), spec
        else:
            yield from pods(list(tree.values()))


def containers(pod: dict) -> list[dict]:
    """All containers of a pod, those that start it and those that debug it too."""
    return [each for kind in ("containers", "initContainers", "ephemeralContainers") for each in pod.get(kind, [])]


def pod_problems(metadata: dict, pod: dict) -> Iterator[str]:
    """What is insecure or unbounded about a pod."""
    yield from _pod_standard(metadata, pod)
    yield from _pod_rules(metadata, pod)
    for container in containers(pod):
        for check in (_container_standard, _container_rules, _resources, _mounts):
            yield from (f"container {container['name']}: {problem}" for problem in check(container, pod))


def _pod_standard(metadata: dict, pod: dict) -> Iterator[str]:
    yield from (f"{key} is set" for key in HOST if pod.get(key))
    for volume in pod.get("volumes", []):
        yield from (f"volume {volume['name']} is {kind}" for kind in volume.keys() - {"name"} - VOLUMES)
    yield from _context(pod.get("securityContext", {}))
    for key, value in metadata.get("annotations", {}).items():
        if key.startswith("container.apparmor.security.beta.kubernetes.io/") and value == "unconfined":
            yield "AppArmor is unconfined"


def _context(context: dict) -> Iterator[str]:
    """What neither a pod's nor a container's securityContext may say."""
    yield from (f"securityContext has {key}" for key in FOREIGN if key in context)
    for profile in PROFILES & context.keys():
        if context[profile].get("type") not in ("RuntimeDefault", "Localhost"):
            yield f"{profile} is {context[profile].get('type')}"
    if context.get("runAsUser") == 0:
        yield "runAsUser is root"


def _container_standard(container: dict, pod: dict) -> Iterator[str]:
    own = container.get("securityContext", {})
    both = pod.get("securityContext", {}) | own
    yield from _context(own)
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if own.get("privileged"):
        yield "is privileged"
    if own.get("capabilities") != {"drop": ["ALL"]}:
        yield "capabilities are not just {drop: [ALL]}"
    if both.get("runAsNonRoot") is not True:
        yield "runAsNonRoot is not true"
    if "seccompProfile" not in both:
        yield "has no seccompProfile"
    yield from ("has a hostPort" for port in container.get("ports", []) if "hostPort" in port)
    hooks = [container.get(f"{kind}Probe", {}) for kind in ("liveness", "readiness", "startup")]
    hooks += container.get("lifecycle", {}).values()
    actions = [action for hook in hooks for action in hook.values() if isinstance(action, dict)]
    yield from ("a probe or hook asks another host" for action in actions if "host" in action)


def _container_rules(container: dict, pod: dict) -> Iterator[str]:
    own = container.get("securityContext", {})
    if own.get("readOnlyRootFilesystem") is not True:
        yield "readOnlyRootFilesystem is not true"
    if "runAsUser" not in pod.get("securityContext", {}) | own:
        yield "has no runAsUser"  # of an image's user that has a name, the node cannot tell that it is not root
    if not IMAGE.fullmatch(container.get("image", "")):
        yield f"image {container.get('image')} is not named by digest"
    for variable in container.get("env", []):
        if SECRET.search(variable["name"]) and variable.get("value"):
            yield f"{variable['name']} is written in the open; take it from a Secret"


def _resources(container: dict, pod: dict) -> Iterator[str]:
    resources = container.get("resources", {})
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    yield from (f"has no limit of {each}" for each in ("cpu", "memory", "ephemeral-storage") if each not in limits)
    for name, value in requests.items():
        if "/" in name and limits.get(name) != value:  # a device: the API takes limits, and requests that are equal
            yield f"requests {name} without the same limit"
        elif name in limits and amount(value) > amount(limits[name]):
            yield f"requests more {name} than its limit"
    volumes = {volume["name"]: volume.get("emptyDir") or {} for volume in pod.get("volumes", [])}
    mounted = [volumes.get(mount["name"], {}) for mount in container.get("volumeMounts", [])]
    taken = sum(amount(each.get("sizeLimit", 0)) for each in mounted if each.get("medium") == "Memory")
    if taken and taken >= amount(limits.get("memory", 0)):
        yield "its emptyDirs in memory may fill all of its memory"


def amount(quantity: str | int) -> float:
    """A Kubernetes quantity as a number: "500m" is 0.5."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(quantity)).groups()
    return float(number) * UNITS[unit]


def _mounts(container: dict, pod: dict) -> Iterator[str]:
    volumes = [volume["name"] for volume in pod.get("volumes", [])]
    for mount in container.get("volumeMounts", []):
        if mount["name"] not in volumes:
            yield f"mounts {mount['name']}, which is no volume of its pod"


def _pod_rules(metadata: dict, pod: dict) -> Iterator[str]:
    for volume in pod.get("volumes", []):
        if "emptyDir" in volume and "sizeLimit" not in (volume["emptyDir"] or {}):
            yield f"emptyDir {volume['name']} has no sizeLimit"
    account, labels = pod.get("serviceAccountName"), metadata.get("labels", {})
    if account != FLOW_ACCOUNT and pod.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken is not false"
    if pod.get("enableServiceLinks") is not False:
        yield "enableServiceLinks is not false"  # the Service prefect-server would set variables that Prefect reads
    if STAGE.items() <= labels.items():
        yield from (f"a stage's pod has no label {label}" for label in STAGE_LABELS if not labels.get(label))
        if account != STAGE_ACCOUNT:
            yield f"a stage runs as {account}, not as {STAGE_ACCOUNT}"
