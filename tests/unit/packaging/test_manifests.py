"""What is wrong with manifests is found: a build of k8s/ with stages in it, and one thing broken at a time."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.support.manifests import minors, problems, rendered, schema_problems

MANY_NODES = Path(__file__).parents[3] / "k8s" / "overlays" / "many-nodes"
GONE = object()  # as a value: take the key away

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which renders k8s/, is not installed"),
]

STAGES = yaml.safe_load("""
- &job
  apiVersion: batch/v1
  kind: Job
  metadata: &metadata
    name: dmdr-my-run-joint-0
    namespace: dmdr
    labels: &labels
      app.kubernetes.io/name: dmdr
      app.kubernetes.io/component: stage
      dmdr.dev/run: my-run
      dmdr.dev/stage: joint
      dmdr.dev/teacher: sdxl
      kueue.x-k8s.io/queue-name: dmdr
  spec: &spec
    completionMode: Indexed
    completions: 1
    parallelism: 1
    backoffLimit: 3
    podReplacementPolicy: Failed
    podFailurePolicy:
      rules:
        - {action: FailJob, onExitCodes: {containerName: stage, operator: In, values: [64, 65, 66]}}
        - {action: Ignore, onPodConditions: [{type: DisruptionTarget, status: "True"}]}
    template:
      metadata: {labels: *labels}
      spec:
        restartPolicy: Never
        serviceAccountName: dmdr-stage
        automountServiceAccountToken: false
        enableServiceLinks: false
        priorityClassName: dmdr-train
        securityContext: {runAsNonRoot: true, runAsUser: 10001, seccompProfile: {type: RuntimeDefault}}
        containers:
          - name: stage
            image: dmdr-train@sha256:0000000000000000000000000000000000000000000000000000000000000000
            env: [{name: HOME, value: /scratch}]
            envFrom: [{secretRef: {name: dmdr-store}}]
            resources:
              limits: &limits {cpu: "8", memory: 64Gi, ephemeral-storage: 100Gi, nvidia.com/gpu: "8"}
              requests: *limits
            securityContext:
              {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
            volumeMounts: [{name: scratch, mountPath: /scratch}, {name: shm, mountPath: /dev/shm}]
        volumes:
          - {name: scratch, emptyDir: {sizeLimit: 100Gi}}
          - {name: shm, emptyDir: {medium: Memory, sizeLimit: 8Gi}}
          - {name: models, persistentVolumeClaim: {claimName: models, readOnly: true}}
- apiVersion: jobset.x-k8s.io/v1alpha2
  kind: JobSet
  metadata: {<<: *metadata, name: dmdr-my-run-cold-start-0}
  spec:
    network: {enableDNSHostnames: true, publishNotReadyAddresses: true}
    failurePolicy:
      maxRestarts: 3
      rules: [{name: stays_bad, action: FailJobSet, onJobFailureReasons: [PodFailurePolicy]}]
    replicatedJobs:
      - {name: nodes, replicas: 1, template: {metadata: {labels: *labels}, spec: *spec}}
- apiVersion: v1
  kind: PersistentVolumeClaim
  metadata: {name: models, namespace: dmdr}
  spec: {accessModes: [ReadOnlyMany], resources: {requests: {storage: 500Gi}}}
""")


def whole() -> list[dict]:
    """A build with a stage as a Job and one as a JobSet in it: new each time, nothing shared in it."""
    return json.loads(_whole())


@cache
def _whole() -> str:
    return json.dumps(rendered(MANY_NODES) + STAGES)


def broken(title: str, path: str, value: object) -> list[dict]:
    """`whole` with one thing changed. path: keys and indices, of which + is a new last one."""
    documents = whole()
    [document] = [each for each in documents if f"{each['kind']}/{each['metadata']['name']}" == title]
    *way, last = [int(key) if key.isdigit() else key for key in path.split()]
    place = document
    for key in way:
        place = place[key] if isinstance(place, list) else place.setdefault(key, {})
    if value is GONE:
        del place[last]
    elif last == "+":
        place.append(value)
    else:
        place[last] = value
    return documents


def test_nothing_is_wrong_before_it_is_broken():
    assert problems(whole()) == []
    assert [schema_problems(whole(), minor) for minor in minors()] == [[], [], []]


JOB, SET, SERVER, WORKER = (
    "Job/dmdr-my-run-joint-0",
    "JobSet/dmdr-my-run-cold-start-0",
    "Deployment/prefect-server",
    "Deployment/prefect-worker",
)
POD = "spec template spec"
BOX, INIT = f"{POD} containers 0", f"{POD} initContainers 0"
IN_SET = "spec replicatedJobs 0 template spec template spec"
ROOT = {"runAsUser": 0, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}

WRONG = [
    # the standard: pods
    (SERVER, f"{POD} hostNetwork", True, "hostNetwork is set"),
    (SERVER, f"{POD} hostPID", True, "hostPID is set"),
    (JOB, f"{POD} hostIPC", True, "hostIPC is set"),
    (JOB, f"{POD} hostAliases", [{"ip": "127.0.0.1", "hostnames": ["store"]}], "hostAliases is set"),
    (JOB, f"{POD} volumes +", {"name": "host", "hostPath": {"path": "/"}}, "volume host is hostPath"),
    (JOB, f"{POD} volumes +", {"name": "share", "nfs": {"server": "s", "path": "/"}}, "volume share is nfs"),
    (WORKER, f"{POD} securityContext runAsUser", 0, "runAsUser is root"),
    (WORKER, f"{POD} securityContext runAsNonRoot", GONE, "runAsNonRoot is not true"),
    (WORKER, f"{POD} securityContext seccompProfile", GONE, "has no seccompProfile"),
    (WORKER, f"{POD} securityContext seccompProfile type", "Unconfined", "seccompProfile is Unconfined"),
    (WORKER, f"{POD} securityContext appArmorProfile", {"type": "Unconfined"}, "appArmorProfile is Unconfined"),
    (WORKER, f"{POD} securityContext sysctls", [{"name": "kernel.msgmax", "value": "1"}], "has sysctls"),
    (WORKER, f"{POD} securityContext seLinuxOptions", {"type": "spc_t"}, "has seLinuxOptions"),
    (WORKER, f"{POD} securityContext windowsOptions", {"hostProcess": True}, "has windowsOptions"),
    (
        JOB,
        "spec template metadata annotations",
        {"container.apparmor.security.beta.kubernetes.io/stage": "unconfined"},
        "AppArmor is unconfined",
    ),
    # the standard: containers, of every sort, in documents of every kind
    (SERVER, f"{BOX} securityContext", GONE, "allowPrivilegeEscalation is not false"),
    (SERVER, f"{BOX} securityContext allowPrivilegeEscalation", True, "allowPrivilegeEscalation is not false"),
    (SERVER, f"{BOX} securityContext privileged", True, "is privileged"),
    (SERVER, f"{BOX} securityContext capabilities", GONE, "capabilities are not just"),
    (SERVER, f"{BOX} securityContext capabilities add", ["NET_BIND_SERVICE"], "capabilities are not just"),
    (SERVER, f"{BOX} securityContext runAsNonRoot", False, "runAsNonRoot is not true"),
    (SERVER, f"{BOX} securityContext runAsUser", 0, "runAsUser is root"),
    (SERVER, f"{BOX} securityContext seccompProfile", {"type": "Unconfined"}, "seccompProfile is Unconfined"),
    (SERVER, f"{BOX} securityContext procMount", "Unmasked", "has procMount"),
    (SERVER, f"{BOX} ports 0 hostPort", 4200, "has a hostPort"),
    (SERVER, f"{BOX} livenessProbe httpGet host", "10.0.0.1", "a probe or hook asks another host"),
    (SERVER, f"{BOX} lifecycle", {"preStop": {"tcpSocket": {"host": "h", "port": 1}}}, "asks another host"),
    (WORKER, f"{INIT} securityContext", ROOT, "container deploy: runAsUser is root"),
    (WORKER, f"{INIT} securityContext privileged", True, "container deploy: is privileged"),
    (WORKER, f"{POD} ephemeralContainers", [{"name": "look", "image": "busybox"}], "container look: has no limit"),
    (SET, f"{IN_SET} hostNetwork", True, "hostNetwork is set"),
    (SET, f"{IN_SET} containers 0 securityContext capabilities", GONE, "capabilities are not just"),
    # beyond the standard
    (JOB, f"{BOX} securityContext readOnlyRootFilesystem", False, "readOnlyRootFilesystem is not true"),
    (JOB, f"{POD} securityContext runAsUser", GONE, "has no runAsUser"),
    (JOB, f"{BOX} image", "dmdr-train:latest", "is not named by digest"),
    (JOB, f"{BOX} image", "dmdr-train@sha256:00", "is not named by digest"),
    (WORKER, f"{INIT} image", "dmdr-flow", "container deploy: image dmdr-flow is not named by digest"),
    (JOB, f"{BOX} resources", {}, "has no limit of memory"),
    (JOB, f"{BOX} resources limits cpu", GONE, "has no limit of cpu"),
    (SET, f"{IN_SET} containers 0 resources limits memory", GONE, "has no limit of memory"),
    (WORKER, f"{INIT} resources limits ephemeral-storage", GONE, "has no limit of ephemeral-storage"),
    (JOB, f"{BOX} resources limits nvidia.com/gpu", GONE, "requests nvidia.com/gpu without the same limit"),
    (JOB, f"{BOX} resources requests nvidia.com/gpu", "4", "requests nvidia.com/gpu without the same limit"),
    (JOB, f"{BOX} resources requests memory", "65Gi", "requests more memory than its limit"),
    (JOB, f"{BOX} env +", {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}, "is written in the open"),
    (JOB, f"{BOX} volumeMounts +", {"name": "cache", "mountPath": "/cache"}, "mounts cache, which is no volume"),
    (JOB, f"{POD} volumes 1 emptyDir sizeLimit", "64Gi", "may fill all of its memory"),
    (JOB, f"{POD} volumes 0 emptyDir", {}, "emptyDir scratch has no sizeLimit"),
    (SERVER, f"{POD} volumes 1 emptyDir", {}, "emptyDir tmp has no sizeLimit"),
    (JOB, f"{POD} automountServiceAccountToken", True, "automountServiceAccountToken is not false"),
    (SET, f"{IN_SET} automountServiceAccountToken", GONE, "automountServiceAccountToken is not false"),
    (SERVER, f"{POD} automountServiceAccountToken", GONE, "automountServiceAccountToken is not false"),
    (SERVER, f"{POD} enableServiceLinks", True, "enableServiceLinks is not false"),
    (JOB, f"{POD} serviceAccountName", "dmdr-flow", "a stage runs as dmdr-flow"),
    (JOB, f"{POD} serviceAccountName", GONE, "a stage runs as None"),
    (JOB, "spec template metadata labels dmdr.dev/run", GONE, "has no label dmdr.dev/run"),
    # names and labels
    (JOB, "metadata name", "a" * 53, "its name has 53 letters; 52 are the most"),
    (SET, "metadata name", "a" * 48, "its name has 48 letters; 47 are the most"),
    (SERVER, "metadata name", "a" * 64, "its name has 64 letters; 63 are the most"),
    (JOB, "metadata name", "dmdr-my_run", "its name has other letters"),
    (JOB, "metadata labels dmdr.dev/teacher", "hub:owner/name", "label dmdr.dev/teacher"),
    (JOB, "spec template metadata labels dmdr.dev/teacher", "a" * 64, "label dmdr.dev/teacher"),
    (SERVER, "metadata namespace", "prefect", "its namespace prefect is not here"),
    (JOB, "metadata namespace", GONE, "its namespace None is not here"),
    ("ClusterQueue/dmdr", "metadata namespace", "dmdr", "belongs to the whole cluster"),
    ("PersistentVolumeClaim/models", "kind", "Secret", "is created by people"),
    # Jobs
    (JOB, f"{POD} restartPolicy", "OnFailure", "podFailurePolicy needs restartPolicy Never"),
    (JOB, f"{POD} restartPolicy", GONE, "neither Never nor OnFailure"),
    (SET, f"{IN_SET} restartPolicy", "OnFailure", "podFailurePolicy needs restartPolicy Never"),
    (JOB, "spec podReplacementPolicy", "TerminatingOrFailed", "needs podReplacementPolicy Failed"),
    (JOB, "spec podFailurePolicy rules 0 onExitCodes containerName", "main", "names the container main"),
    (JOB, "spec podFailurePolicy rules 0 onExitCodes values", [0, 64], "takes exit code 0 for a failure"),
    (JOB, "spec completions", GONE, "is Indexed without completions"),
    # what leads nowhere
    (SERVER, "spec selector matchLabels app.kubernetes.io/component", "x", "does not match its own pods"),
    ("Service/prefect-server", "spec selector app.kubernetes.io/component", "x", "selects no pod"),
    ("Service/prefect-server", "spec ports 0 targetPort", "https", "leads to the port https"),
    (SERVER, f"{BOX} readinessProbe httpGet port", "https", "readinessProbe asks the port https"),
    (SERVER, f"{BOX} livenessProbe", GONE, "has no livenessProbe"),
    ("NetworkPolicy/worker", "spec podSelector matchLabels app.kubernetes.io/component", "x", "selects no pod"),
    ("NetworkPolicy/server", "spec ingress 0 from 0 podSelector matchLabels x", "y", "selects no pod"),
    ("NetworkPolicy/stages", "spec policyTypes", ["Ingress"], "rules for egress, which is not among"),
    ("NetworkPolicy/stages", "spec ingress 0 from", GONE, "lets everybody through"),
    ("NetworkPolicy/store", "spec egress 0 to 0 ipBlock except", GONE, "includes link-local addresses"),
    ("RoleBinding/dmdr-flow", "subjects 0 name", "flow", "ServiceAccount flow is not here"),
    ("RoleBinding/dmdr-flow", "roleRef name", "flow", "Role flow is not here"),
    (WORKER, f"{POD} serviceAccountName", "worker", "ServiceAccount worker is not here"),
    (WORKER, f"{BOX} envFrom 0 configMapRef name", "settings", "ConfigMap settings is not here"),
    (WORKER, f"{POD} volumes 2 configMap name", "settings", "ConfigMap settings is not here"),
    (JOB, f"{BOX} env +", {"name": "A", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "k"}}}, "ConfigMap c is"),
    (JOB, f"{POD} priorityClassName", "high", "PriorityClass high is not here"),
    (JOB, f"{POD} volumes 2 persistentVolumeClaim claimName", "m", "PersistentVolumeClaim m is not here"),
    # Kueue
    (JOB, "metadata labels kueue.x-k8s.io/queue-name", "gpus", "LocalQueue gpus is not here"),
    ("LocalQueue/dmdr", "spec clusterQueue", "gpus", "ClusterQueue gpus is not here"),
    ("ClusterQueue/dmdr", "spec resourceGroups 0 flavors 0 name", "gpus", "ResourceFlavor gpus is not here"),
    ("ClusterQueue/dmdr", "spec resourceGroups 0 coveredResources +", "pods", "does not list the covered resources"),
    (JOB, f"{BOX} resources limits rdma/hca", "1", "does not cover rdma/hca"),
]


@pytest.mark.parametrize(("title", "path", "value", "found"), WRONG, ids=[f"{row[0]}-{row[3]}" for row in WRONG])
def test_what_is_wrong_is_found(title: str, path: str, value: object, found: str):
    assert any(found in problem for problem in problems(broken(title, path, value)))


def test_a_document_that_is_there_twice_is_found():
    assert any("is there twice" in problem for problem in problems(whole() + STAGES[:1]))


MISSHAPEN = [
    (SERVER, "spec replica", 1, "replica"),
    (SERVER, f"{BOX} livenessProbe httpGet prot", 1, "prot"),
    (SERVER, f"{BOX} ports 0 containerPort", "4200", "4200"),
    (SERVER, "kind", "Deploymnt", "schema"),
    (JOB, "apiVersion", "batch/v2", "schema"),
    (JOB, "spec podFailurePolicy rules 0 onExitCodes value", [64], "value"),
    (SET, "spec replicatedJobs 0 template spec backofLimit", 0, "backofLimit"),
    (SET, f"{IN_SET} restartPolicys", "Never", "restartPolicys"),
    (SET, "spec failurePolicy rules 0 name", "stays-bad", "stays-bad"),
    (SET, "spec failurePolicy rules 0 action", "Fail", "Fail"),
    (SET, "spec failurePolicy maxRestart", 3, "maxRestart"),
    (SET, "spec replicatedJobs", [], "replicatedJobs"),
    (SET, "apiVersion", "jobset.x-k8s.io/v1", "schema"),
    ("ClusterQueue/dmdr", "spec cohort", "all", "cohort"),
    ("ClusterQueue/dmdr", "spec namespaceSelector", GONE, "namespaceSelector"),
    ("ClusterQueue/dmdr", "spec resourceGroups 0 flavors 0 resources 0 nominalQuota", GONE, "nominalQuota"),
    ("LocalQueue/dmdr", "spec clusterQueue", 1, "clusterQueue"),
]


@pytest.mark.parametrize(("title", "path", "value", "found"), MISSHAPEN, ids=[f"{r[0]}-{r[3]}" for r in MISSHAPEN])
def test_a_wrong_shape_is_found_in_every_minor(title: str, path: str, value: object, found: str):
    for minor in minors():
        assert any(found in problem for problem in schema_problems(broken(title, path, value), minor))
