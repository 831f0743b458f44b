"""The flow `reap` with a real Prefect server and a cluster: it stops what nobody waits for, and nothing else."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.launch import api, kubernetes
from flows.launch.failure import StageFailed
from flows.launch.labels import FLOW_RUN
from flows.launch.manifest import build_manifest, read_marks
from flows.launch.owned import OwnedJobs
from flows.launch.stage import Stage, prepare_stage
from flows.prefect_support import owners
from tests.support import program
from tests.support.fake_cluster.server import QUICK, Cluster
from tests.support.prefect_server import ROOT, asked, prefect
from tests.support.stage_process import Process

pytestmark = pytest.mark.process

FLOW = "import sys; from flows.distil import dmdr; dmdr(*sys.argv[1:])"
REAP = "import sys; from flows.reap import reap; [reap(after=int(seconds)) for seconds in sys.argv[1:]]"


class Scene:
    """Runs with a Job each, and who waits for it."""

    def __init__(self, environment: dict[str, str], cluster: Cluster, tiny_config: Callable, folder: Path) -> None:
        self.environment = environment | {"KUBECONFIG": os.environ["KUBECONFIG"]}
        self.cluster, self.store = cluster, str(folder / "store")
        about = {"image": QUICK, "environment": {"QUICK_SECONDS": "600"}, "grace": 20}
        about["claims"] = {str(folder.parent): "everything"}
        self.config = str(tiny_config(execution={"device": "cpu", "cluster": about}))
        self.deployment = asked(self.environment, "/deployments/name/reap/left-behind")
        self.processes: list[Process] = []

    def stage(self, run: str) -> Stage:
        return prepare_stage("prompts", self.config, run, self.store)

    def flow(self, run: str) -> Process:
        """The flow dmdr in a process of its own; returns when its Job is at work."""
        arguments = FLOW, self.config, run, self.store
        with open(os.devnull, "w") as nothing:
            flow = program.start(*arguments, environment=self.environment, output=nothing.fileno())
        self.processes.append(flow)
        return self.processes[-1]

    def at_work(self, run: str) -> str:
        """Wait for a run's Job to be at work; the flow run that owns it."""
        until(lambda: any("at work" in self.log(pod) for pod in self.cluster.kubelet.running() if f"-{run}-" in pod))
        return self.job(run)["metadata"]["labels"][FLOW_RUN]

    def log(self, pod: str) -> str:
        return self.cluster.kubelet.log(pod).read_text()

    def job(self, run: str) -> dict:
        return self.cluster.objects.read("jobs", f"dmdr-{run}-prompts-1")

    def jobs(self) -> set[str]:
        return {each["metadata"]["name"].split("-")[1] for each in self.cluster.objects.list("jobs")[0]}

    def flow_run(self, state: str, deployment: bool = False) -> str:
        """One that Prefect knows of, without a process."""
        path = "/flow_runs/" if not deployment else f"/deployments/{self.deployment['id']}/create_flow_run"
        body = {} if deployment else {"flow_id": self.deployment["flow_id"]}
        found = asked(self.environment, path, body)["id"]
        self.set_state(found, state)
        return found

    def set_state(self, flow_run: str, state: str) -> None:
        """As Prefect's automation does."""
        body = {"state": {"type": state, "name": state.title()}, "force": True}
        asked(self.environment, f"/flow_runs/{flow_run}/set_state", body)

    def heartbeat(self, flow_run: str, minutes_ago: float) -> None:
        about = {"id": str(uuid4()), "occurred": (datetime.now(UTC) - timedelta(minutes=minutes_ago)).isoformat()}
        resource = {"prefect.resource.id": f"prefect.flow-run.{flow_run}"}
        event = {**about, "event": "prefect.flow-run.heartbeat", "resource": resource}
        asked(self.environment, "/events", [event])
        kind = {"event": {"name": [event["event"]]}, "resource": {"id": [resource["prefect.resource.id"]]}}
        until(lambda: asked(self.environment, "/events/filter", {"filter": kind})["events"])

    def begin(self, run: str, *flow_runs: str, deployment: str | None = None) -> None:
        """A Job that the first flow run made and the others met."""
        for flow_run in flow_runs:
            kubernetes.Jobs(self.stage(run), print, deployment).begin(flow_run)

    def reap(self, *seconds: int) -> str:
        """Reap so many times; what was said."""
        done = program.run(REAP, *map(str, seconds), environment=self.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture
def scene(prefect_server: dict[str, str], cluster: Cluster, tiny_config: Callable, tmp_path: Path) -> Iterator[Scene]:
    made = Scene(prefect_server, cluster, tiny_config, tmp_path)
    yield made
    for process in made.processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_jobs_of_a_flow_that_died_are_stopped_and_no_others(scene: Scene) -> None:
    """The process of one run is killed without a word, that of another lives; a third Job was made by hand."""
    dead = scene.flow("dead")
    scene.flow("alive")
    scene.cluster.objects.create("jobs", build_manifest(scene.stage("hand"), 1))
    lives, died = scene.at_work("alive"), scene.at_work("dead")
    scene.begin("hand", died)  # a flow that waited for it died
    os.killpg(dead.pid, signal.SIGKILL)
    dead.wait()
    scene.reap(1)  # Prefect does not know yet
    assert scene.jobs() == {"dead", "alive", "hand"}
    scene.set_state(died, "CRASHED")
    scene.begin("met", died, lives)
    scene.cluster.kubelet.suspends = True
    scene.begin("queued", lives)
    time.sleep(1.1)
    scene.reap(3600)
    assert scene.jobs() == {"dead", "alive", "hand", "met", "queued"}
    pod = next(pod for pod in scene.cluster.kubelet.running() if "-dead-" in pod)
    assert "stopped dmdr-dead-prompts-1" in scene.reap(1)
    until(lambda: scene.jobs() == {"alive", "hand", "met", "queued"})
    assert scene.cluster.kubelet.ended == {pod: 75}, "it had its time for a checkpoint"
    assert not scene.cluster.objects.list("pods", "dmdr.dev/run=dead")[0]
    assert scene.processes[1].poll() is None


def test_who_is_over_and_who_may_live(scene: Scene) -> None:
    scene.cluster.kubelet.suspends = True
    for state in ("FAILED", "CANCELLED", "COMPLETED", "CRASHED", "SCHEDULED", "PENDING", "RUNNING", "PAUSED"):
        scene.begin(state.lower(), scene.flow_run(state))
    scene.begin("both", scene.flow_run("CRASHED"), scene.flow_run("FAILED"))
    scene.begin("unknown", str(uuid4()))  # of a `dmdr run` with a server of its own
    scene.begin("elsewhere", str(uuid4()), deployment=str(uuid4()))
    scene.begin("visited", scene.flow_run("CRASHED"), str(uuid4()))
    deleted = scene.flow_run("RUNNING", deployment=True)
    scene.begin("deleted", deleted, deployment=scene.deployment["id"])
    asked(scene.environment, f"/flow_runs/{deleted}", {}, method="DELETE")
    heartbeats = {"silent": ("RUNNING", 40, True), "beats": ("RUNNING", 10, False), "revived": ("CRASHED", 0, False)}
    for run, (state, minutes, is_over) in heartbeats.items():
        flow_run = scene.flow_run(state)
        scene.heartbeat(flow_run, minutes)
        scene.begin(run, flow_run)
        with temporary_settings({PREFECT_API_URL: scene.environment["PREFECT_API_URL"]}):
            assert owners.is_over(flow_run, "") is is_over, run  # what a flow asks that is stopped
    stay = {"scheduled", "pending", "running", "paused", "unknown", "elsewhere", "visited", "beats", "revived"}
    go = {"failed", "cancelled", "completed", "crashed", "both", "deleted", "silent"}
    assert scene.jobs() == stay | go
    time.sleep(1.1)
    scene.reap(1)
    until(lambda: scene.jobs() <= stay)
    assert scene.jobs() == stay


def test_a_job_that_somebody_attaches_to_meanwhile_is_kept(scene: Scene) -> None:
    """By the API's own word: what has changed since it was read is not deleted."""
    scene.cluster.kubelet.suspends = True
    scene.begin("met", "one")
    owned = OwnedJobs("reap", "dmdr")
    [before] = owned.list_jobs()
    scene.begin("met", "two")
    assert not owned.stop(before, unchanged=True) and scene.jobs() == {"met"}
    [now] = owned.list_jobs()
    assert read_marks(now.job) == {"one": "", "two": ""}
    assert owned.stop(now, unchanged=True)
    until(lambda: not scene.jobs())


def test_without_a_cluster_there_is_nothing_to_do(scene: Scene, tmp_path: Path) -> None:
    scene.environment.pop("KUBECONFIG")
    scene.environment["HOME"] = str(tmp_path)
    assert "no cluster here" in scene.reap(900)


def test_what_the_cluster_refuses_is_one_line(scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scene.cluster.kubelet.suspends = True
    scene.begin("met", "one")
    owned = OwnedJobs("reap", "dmdr")
    [job] = owned.list_jobs()
    for verb, ask in [("list", owned.list_jobs), ("delete", lambda: owned.stop(job))]:
        scene.cluster.denied = {(verb, "jobs")}
        said = rf"reap: the cluster does not let this flow {verb} jobs in .* dmdr: .*k8s/base"
        with pytest.raises(StageFailed, match=said):
            ask()
    scene.cluster.port = 9  # discard
    monkeypatch.setenv("KUBECONFIG", str(scene.cluster.kubeconfig(tmp_path)))
    monkeypatch.setattr(api, "TIMEOUT", (1, 1))
    with pytest.raises(StageFailed, match="does not answer") as caught:
        OwnedJobs("reap", "dmdr").list_jobs()
    assert caught.value.exit_code == 74


def test_a_cluster_looks_every_ten_minutes(scene: Scene) -> None:
    """prefect.yaml schedules nothing; the worker of a cluster does, each time that it starts."""
    assert scene.deployment["schedules"] == []
    worker = (ROOT / "k8s/base/worker.yaml").read_text().splitlines()
    [command] = [line.split() for line in worker if "schedule create" in line]
    for _ in range(2):
        prefect(*command[1:], environment=scene.environment)
        [schedule] = asked(scene.environment, "/deployments/name/reap/left-behind")["schedules"]
        assert (schedule["active"], schedule["schedule"]["interval"]) == (True, 600.0)
    prefect("deployment", "schedule", "clear", "reap/left-behind", "--accept-yes", environment=scene.environment)


def until(holds: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.1)
