"""Controllers, scheduler and kubelet of the fake cluster: Jobs become pods, and pods are processes of this machine.

A pod runs the command of its one container, with its environment, its secrets and its config file, as a fork of an
interpreter that has the libraries. An image may have a program of its own in the place of `python -m stages`.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from pathlib import Path

from tests.support.fake_cluster.objects import Objects, now
from tests.support.stage_process import Process

FOREGROUND = "foregroundDeletion"
ROOT = Path(__file__).parents[3]


class Kubelet:
    """Brings about what the objects ask for, in a thread of its own.

    gpus: of the one node. secrets: name -> environment. missing: images that cannot be pulled. images: with programs.
    accounts, priorities: the ServiceAccounts and PriorityClasses there are. most_pods, most_jobs: a quota; None: none.
    webhook: what an admission webhook says of every pod. unmounted: what a node says of the volumes of every pod.
    """

    def __init__(self, objects: Objects, folder: Path) -> None:
        self.objects, self.folder = objects, folder
        self.gpus, self.secrets, self.missing, self.images = 8, {}, set(), {}
        self.accounts, self.priorities = {"dmdr-stage"}, {"dmdr-train", "dmdr-evaluate"}
        self.most_pods: int | None = None
        self.most_jobs: int | None = None
        self.webhook = self.unmounted = ""
        self.started: list[str] = []  # names of all pods that ever ran
        self.suspends = False  # as a queue does: Jobs begin suspended
        self._pods: dict[str, Process] = {}
        self._evicted: set[str] = set()
        self._out_of_memory: set[str] = set()
        self._verdicts: dict[str, dict[str, str]] = {}  # uid of a Job -> uid of a failed pod -> action of its policy
        self._again: dict[str, float] = {}  # object -> when its controller tries again what has failed
        self._numbers = itertools.count()  # a Job of the same name as one that was deleted has other pods
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for process in self._pods.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def evict(self, pod: str) -> None:
        """As a node does that is drained: SIGTERM, and a condition that says so."""
        self._evicted.add(pod)
        self._pods[pod].send_signal(signal.SIGTERM)

    def delete_pod(self, pod: str) -> None:
        """As `kubectl delete pod` does: SIGTERM and a grace period, and no condition that says why."""
        self._ask_to_end(self.objects.read("pods", pod))

    def kill_for_memory(self, pod: str) -> None:
        self._out_of_memory.add(pod)
        pid = self._pods[pod].pid
        while os.getpgid(pid) != pid:  # a fork that has not run yet is still of its host's group
            time.sleep(0.01)
        os.killpg(pid, signal.SIGKILL)

    def running(self) -> list[str]:
        return [name for name, process in list(self._pods.items()) if process.poll() is None]

    @property
    def ended(self) -> dict[str, int]:
        """Exit codes by pod, of those that have ended."""
        pods = list(self._pods.items())  # the thread adds to them
        return {name: process.returncode for name, process in pods if process.poll() is not None}

    def log(self, pod: str) -> Path:
        return self.folder / f"{pod}.log"

    def _work(self) -> None:
        while not self._stop.is_set():
            for job in self.objects.list("jobsets")[0]:
                self._jobset(job)
            for job in self.objects.list("jobs")[0]:
                self._job(job)
            for pod in self.objects.list("pods")[0]:
                self._pod(pod)
            time.sleep(0.02)

    # JobSets: one Job, made again when it fails, unless its input stays bad

    def _jobset(self, whole: dict) -> None:
        name = whole["metadata"]["name"]
        child = f"{name}-nodes-0"
        found = [each for each in self.objects.list("jobs")[0] if each["metadata"]["name"] == child]
        if "deletionTimestamp" in whole["metadata"]:
            if found:
                self.delete_job(child)
            else:
                self.objects.remove("jobsets", name)
            return
        if _ended(whole) or whole["spec"].get("suspend"):
            return
        if not found:
            template = whole["spec"]["replicatedJobs"][0]["template"]
            labels = {**template["metadata"]["labels"], "jobset.sigs.k8s.io/jobset-name": name}
            if self._must_wait(name):
                return
            if (refusal := self.refuse_job(child)) is not None:
                return self._tell(whole, "JobSet", "JobCreationFailed", refusal)
            self.objects.create("jobs", {"metadata": {"name": child, "labels": labels}, "spec": template["spec"]})
            return
        end = _ended(found[0])
        if end is None:
            return
        restarts = whole["status"].get("restarts", 0)
        if end["type"] == "Complete":
            done = _condition("Completed", "AllJobsCompleted", "")
            self.objects.update("jobsets", name, status={"conditions": [done]})
        elif end["reason"] == "PodFailurePolicy" or restarts >= whole["spec"]["failurePolicy"]["maxRestarts"]:
            why = _condition("Failed", "FailJobSetFailurePolicyAction", end["message"])
            self.objects.update("jobsets", name, status={"conditions": [why]})
        else:
            self.objects.update("jobsets", name, status={"restarts": restarts + 1})
            self.delete_job(child)

    def delete_job(self, name: str) -> None:
        self.objects.update("jobs", name, metadata={"deletionTimestamp": now(), "finalizers": [FOREGROUND]})

    # Jobs: indexed pods, failures counted by the pod failure policy

    def _job(self, job: dict) -> None:
        name, spec = job["metadata"]["name"], job["spec"]
        mine = self.objects.list("pods", f"batch.kubernetes.io/job-name={name}")[0]
        if "deletionTimestamp" in job["metadata"]:
            for pod in mine:
                self._ask_to_end(pod)
            if not mine:
                self.objects.remove("jobs", name)
            return
        if _ended(job) or spec.get("suspend"):
            return
        succeeded = {_index(pod) for pod in mine if pod["status"].get("phase") == "Succeeded"}
        alive = {_index(pod) for pod in mine if pod["status"].get("phase") in (None, "Pending", "Running")}
        failed = [pod for pod in mine if pod["status"].get("phase") == "Failed"]
        verdicts = self._verdicts.setdefault(job["metadata"]["uid"], {})  # they outlive the pods, which may be deleted
        verdicts |= {pod["metadata"]["uid"]: self._policy(job, pod) for pod in failed}
        counted = [verdict for verdict in verdicts.values() if verdict == "Count"]
        status = {"active": len(alive), "failed": len(counted), "succeeded": len(succeeded)}
        final = next((pod for pod in failed if self._policy(job, pod) == "FailJob"), None)
        if final is not None:
            code = final["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"]
            why = f"Container stage of pod {final['metadata']['name']} failed with exit code {code}, which ends the Job"
            return self._end(name, mine, status, _condition("Failed", "PodFailurePolicy", why))
        if len(counted) > spec["backoffLimit"]:
            reached = _condition("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
            return self._end(name, mine, status, reached)
        if len(succeeded) == spec["completions"]:
            return self._end(name, mine, status, _condition("Complete", "CompletionsReached", ""))
        before = {key: job["status"].get(key) for key in status}
        if before != status:
            self.objects.update("jobs", name, status=status)
        for index in range(spec["completions"]):
            if index not in succeeded | alive:
                self._create_pod(job, index)

    def _end(self, name: str, mine: list[dict], status: dict, condition: dict) -> None:
        for pod in mine:
            self._ask_to_end(pod)
        self.objects.update("jobs", name, status={**status, "conditions": [condition]})

    def _policy(self, job: dict, pod: dict) -> str:
        """The action of the first rule that a failed pod meets; Count if none does."""
        states = [each["state"].get("terminated") for each in pod["status"].get("containerStatuses", [])]
        for rule in job["spec"]["podFailurePolicy"]["rules"]:
            codes = rule.get("onExitCodes", {}).get("values", [])
            if any(state and state["exitCode"] in codes for state in states):
                return rule["action"]
            asked = {each["type"] for each in rule.get("onPodConditions", [])}
            if asked & {each["type"] for each in pod["status"].get("conditions", [])}:
                return rule["action"]
        return "Count"

    def _create_pod(self, job: dict, index: int) -> None:
        template, name = job["spec"]["template"], job["metadata"]["name"]
        if self._must_wait(name):
            return
        labels = {**template["metadata"]["labels"], "batch.kubernetes.io/job-name": name}
        annotations = {**template["metadata"]["annotations"], "batch.kubernetes.io/job-completion-index": str(index)}
        called = f"{name}-{index}-{next(self._numbers)}x"
        if (refusal := self._refuse_pod(template["spec"])) is not None:
            return self._tell(job, "Job", "FailedCreate", f'Error creating: pods "{called}" is forbidden: {refusal}')
        metadata = {"name": called, "labels": labels, "annotations": annotations}
        self.objects.create("pods", {"metadata": metadata, "spec": template["spec"], "status": {"phase": "Pending"}})
        self._tell(job, "Job", "SuccessfulCreate", f"Created pod: {called}", kind="Normal")

    def _refuse_pod(self, spec: dict) -> str | None:
        """What the API server's admission says of a new pod."""
        account, priority = spec["serviceAccountName"], spec.get("priorityClassName")
        if account not in self.accounts:
            return f'error looking up service account dmdr/{account}: serviceaccount "{account}" not found'
        if priority and priority not in self.priorities:
            return f"no PriorityClass with name {priority} was found"
        if self.webhook:
            return f'admission webhook "policy.example.org" denied the request: {self.webhook}'
        used = sum(pod["status"].get("phase") in ("Pending", "Running") for pod in self.objects.list("pods")[0])
        if self.most_pods is not None and used >= self.most_pods:
            return f"exceeded quota: dmdr, requested: pods=1, used: pods={used}, limited: pods={self.most_pods}"
        return None

    def refuse_job(self, name: str) -> str | None:
        """The same of a new Job."""
        used = len(self.objects.list("jobs")[0])
        if self.most_jobs is None or used < self.most_jobs:
            return None
        return (
            f'jobs.batch "{name}" is forbidden: exceeded quota: dmdr, requested: count/jobs.batch=1, used: '
            f"count/jobs.batch={used}, limited: count/jobs.batch={self.most_jobs}"
        )

    def _must_wait(self, name: str) -> bool:
        """Whether a controller still pauses after a failure."""
        return time.monotonic() < self._again.get(name, 0.0)

    def _tell(self, about: dict, of: str, reason: str, message: str, kind: str = "Warning") -> None:
        """An event, as client-go records it: the same once more is counted, and similar ones become one."""
        name, uid = about["metadata"]["name"], about["metadata"]["uid"]
        if kind == "Warning":
            self._again[name] = time.monotonic() + 0.4
        similar = [each for each in self.objects.list("events")[0] if each["involvedObject"]["uid"] == uid]
        similar = [each for each in similar if each["reason"] == reason]
        if len(similar) > 2:
            if not message.startswith("(combined"):
                message = f"(combined from similar events): {message}"
            last = similar[-1]
            again = {"count": last["count"] + 1, "lastTimestamp": now(), "message": message}
            self.objects.replace("events", last["metadata"]["name"], again)
            return
        event = {
            "metadata": {"name": f"{name}.{next(self._numbers):016x}", "namespace": "dmdr"},
            "involvedObject": {"kind": of, "namespace": "dmdr", "name": name, "uid": uid},
            "reason": reason,
            "message": message,
            "type": kind,
            "source": {"component": "kubelet" if of == "Pod" else "job-controller"},
            "firstTimestamp": now(),
            "lastTimestamp": now(),
            "eventTime": None,
            "count": 1,
        }
        self.objects.create("events", event)

    # Pods

    def _pod(self, pod: dict) -> None:
        name, process = pod["metadata"]["name"], self._pods.get(pod["metadata"]["name"])
        if process is None:
            if "deletionTimestamp" in pod["metadata"]:
                self.objects.remove("pods", name)
            elif pod["status"].get("phase") == "Pending":
                self._try_to_start(pod)
            return
        if process.poll() is not None and pod["status"]["phase"] == "Running":
            return self._report(name, process.returncode)
        if "deletionTimestamp" in pod["metadata"]:
            if process.poll() is not None:
                if self._is_accounted_for(pod):
                    self.objects.remove("pods", name)
            elif time.monotonic() > pod["metadata"]["deadline"]:
                os.killpg(process.pid, signal.SIGKILL)

    def _is_accounted_for(self, pod: dict) -> bool:
        """Whether its Job has counted it: until then the finalizer batch.kubernetes.io/job-tracking keeps it."""
        job = self.objects.list("jobs", name=pod["metadata"]["labels"]["batch.kubernetes.io/job-name"])[0]
        if not job or "deletionTimestamp" in job[0]["metadata"] or _ended(job[0]):
            return True
        failed = pod["status"]["phase"] == "Failed"
        return not failed or pod["metadata"]["uid"] in self._verdicts.get(job[0]["metadata"]["uid"], {})

    def _ask_to_end(self, pod: dict) -> None:
        name, process = pod["metadata"]["name"], self._pods.get(pod["metadata"]["name"])
        if "deletionTimestamp" not in pod["metadata"] and pod["status"].get("phase") in ("Pending", "Running"):
            grace = pod["spec"]["terminationGracePeriodSeconds"]
            self.objects.update(
                "pods",
                name,
                metadata={
                    "deletionTimestamp": now(),
                    "deadline": time.monotonic() + grace,
                },
            )
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
        elif pod["status"].get("phase") in ("Succeeded", "Failed"):
            job = self.objects.list("jobs", name=pod["metadata"]["labels"]["batch.kubernetes.io/job-name"])[0]
            if job and "deletionTimestamp" in job[0]["metadata"]:
                self.objects.remove("pods", name)

    def _try_to_start(self, pod: dict) -> None:
        container = pod["spec"]["containers"][0]
        wanted = int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
        if wanted > self.gpus - self._count_held_gpus():
            why = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu. preemption: not eligible"
            self._condition(pod, _condition("PodScheduled", "Unschedulable", why, "False"))
        elif container["image"] in self.missing:
            message = f'failed to pull and unpack image "{container["image"]}": not found'
            if int(time.monotonic() / 0.4) % 2:  # a try, and a pause, and a try
                self._wait(pod, "ErrImagePull", message)
            else:
                self._wait(
                    pod, "ImagePullBackOff", f'Back-off pulling image "{container["image"]}": ErrImagePull: {message}'
                )
        elif self.unmounted:
            self._wait(pod, "ContainerCreating", "")
            if not self._must_wait(pod["metadata"]["name"]):
                self._tell(pod, "Pod", "FailedMount", self.unmounted)
        elif lacking := [each for each in _secrets(container) if each not in self.secrets]:
            self._wait(pod, "CreateContainerConfigError", f'secret "{lacking[0]}" not found')
        else:
            self._start(pod, container)

    def _count_held_gpus(self) -> int:
        """GPUs of pods that run, or have been told to end and have not yet."""
        running = set(self.running())
        boxes = [p["spec"]["containers"][0] for p in self.objects.list("pods")[0] if p["metadata"]["name"] in running]
        return sum(int(box["resources"]["limits"].get("nvidia.com/gpu", 0)) for box in boxes)

    def _condition(self, pod: dict, condition: dict) -> None:
        if not pod["status"].get("conditions"):
            self.objects.update("pods", pod["metadata"]["name"], status={"conditions": [condition]})

    def _wait(self, pod: dict, reason: str, message: str) -> None:
        statuses = [_status({"waiting": {"reason": reason, "message": message}})]
        if pod["status"].get("containerStatuses") != statuses:
            self.objects.update("pods", pod["metadata"]["name"], status={"containerStatuses": statuses})

    def _start(self, pod: dict, container: dict) -> None:
        name, annotations = pod["metadata"]["name"], pod["metadata"]["annotations"]
        file = self.folder / f"{name}.yaml"
        mount = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}["config"]
        item = next(v for v in pod["spec"]["volumes"] if v["name"] == "config")["downwardAPI"]["items"][0]
        file.write_text(annotations[item["fieldRef"]["fieldPath"].split("'")[1]])
        program = self.images.get(container["image"])
        _, *module = program or container["command"][1:]  # python -m MODULE
        arguments = [each.replace(f"{mount}/{item['path']}", str(file)) for each in container["args"]]
        scratch = self.folder / f"{name}.scratch"
        scratch.mkdir()
        given = {
            each["name"]: each["value"]
            if "value" in each
            else annotations[each["valueFrom"]["fieldRef"]["fieldPath"].split("'")[1]]
            for each in container["env"]
        }
        for secret in _secrets(container):
            given |= self.secrets[secret]
        given |= {"HOME": str(scratch), "TMPDIR": str(scratch)}
        if "MASTER_ADDR" in given:
            given["MASTER_ADDR"] = "127.0.0.1"  # where all hosts of this cluster are
        machine = {key: os.environ[key] for key in ("PATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE") if key in os.environ}
        with self.log(name).open("w") as out:
            self._pods[name] = Process(
                [*module, *arguments],
                environment={**machine, "PYTHONPATH": str(ROOT), **given},
                output=out.fileno(),
            )
        self.started.append(name)
        self.objects.update(
            "pods",
            name,
            status={
                "phase": "Running",
                "containerStatuses": [_status({"running": {"startedAt": now()}})],
                "conditions": [_condition("PodScheduled", "", "")],
            },
        )

    def _report(self, name: str, code: int) -> None:
        reason = "Completed" if code == 0 else "OOMKilled" if name in self._out_of_memory else "Error"
        end = {"exitCode": code if code >= 0 else 128 - code, "reason": reason, "finishedAt": now()}
        conditions = [_condition("DisruptionTarget", "EvictionByEvictionAPI", "")] if name in self._evicted else []
        self.objects.update(
            "pods",
            name,
            status={
                "phase": "Succeeded" if code == 0 else "Failed",
                "containerStatuses": [_status({"terminated": end})],
                "conditions": conditions,
            },
        )


def _secrets(container: dict) -> list[str]:
    return [each["secretRef"]["name"] for each in container.get("envFrom", [])]


def _status(state: dict) -> dict:
    return {"name": "stage", "state": state}


def _ended(job: dict) -> dict | None:
    ends = ("Complete", "Completed", "Failed")
    return next((each for each in job["status"].get("conditions", []) if each["type"] in ends), None)


def _index(pod: dict) -> int:
    return int(pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"])


def _condition(kind: str, reason: str, message: str, status: str = "True") -> dict:
    return {"type": kind, "status": status, "reason": reason, "message": message}
