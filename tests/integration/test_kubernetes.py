"""The launcher against a cluster that speaks the real API over HTTP and whose pods are real processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dmdr.config.stages import STAGES
from flows.launch import backoff, kubernetes, owned
from flows.launch.api import JobApi
from flows.launch.labels import RUN, STAGE
from flows.launch.manifest import LONGEST, build_manifest, job_name
from flows.launch.stage import Stage, prepare_stage
from stages.store.artifacts import Artifact
from tests.support import program
from tests.support.fake_cluster.server import IMAGE, Cluster
from tests.support.job_stage import TWO_NODES, failed, jobs, launched, until
from tests.support.manifests import minors, problems, rendered, schema_problems

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("watches_are_short")]

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("DMDR_KILLS", "6"))


def test_a_stage_is_a_job_whose_lines_are_told(cluster: Cluster, stage: Callable[..., Stage]):
    said = launched(stage())
    assert said == ["prompts: created job dmdr-tiny-prompts-1", "prompts: at work", "prompts: sealed"]
    assert Artifact(stage().store, "tiny", "prompts").record() is not None
    assert len(cluster.kubelet.started) == 1


def test_names_are_a_function_of_run_stage_and_attempt():
    runs = ["a", "a.b", "a-b", "a_b", "x" * 63, "x" * 62 + "y", "1-2-", "a" * 40 + ".b"]
    names = [job_name(run, each, attempt) for run in runs for each in STAGES for attempt in (1, 2, 10)]
    assert len(set(names)) == len(names)
    for each in names:
        assert len(each) <= LONGEST and each[-1].isalnum() and set(each) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert names == [job_name(run, each, attempt) for run in runs for each in STAGES for attempt in (1, 2, 10)]


def test_replies_that_get_lost_double_nothing(cluster: Cluster, stage: Callable[..., Stage], monkeypatch):
    """200 creations of which 30 % of the replies are lost: 200 Jobs."""
    cluster.kubelet.suspends, cluster.lost = True, 0.3
    monkeypatch.setattr(backoff, "FIRST", 120)  # on a busy machine 20 s are few tries
    base = stage()

    def create(number: int) -> None:
        mine = Stage(base.name, f"run-{number}", base.store, base.config, base.text)
        kubernetes.Jobs(mine, print).begin("me")

    with ThreadPoolExecutor(8) as pool:  # what takes its time is waiting before it is asked again
        list(pool.map(create, range(200)))
    cluster.lost = 0.0
    assert sorted(jobs(cluster)) == sorted(f"dmdr-run-{number}-prompts-1" for number in range(200))


def test_a_flow_goes_on_through_dropped_watches_errors_and_a_forgotten_history(cluster, stage):
    cluster.failing, cluster.dropped, cluster.lost = 0.2, 0.5, 0.1
    forgets = threading.Thread(
        target=lambda: [(time.sleep(0.1), cluster.objects.forget_history()) for _ in range(20)], daemon=True
    )
    forgets.start()
    said = launched(stage(environment={"QUICK_SECONDS": "2"}))
    assert [line for line in said if line == "prompts: at work"] == ["prompts: at work"]
    assert jobs(cluster) == ["dmdr-tiny-prompts-1"] and len(cluster.kubelet.started) == 1
    assert ("watch", "jobs") in cluster.asked


def test_a_suspended_job_waits_in_its_queue(cluster: Cluster, stage: Callable[..., Stage]):
    cluster.kubelet.suspends = True

    def admit() -> None:
        until(lambda: jobs(cluster))
        time.sleep(1)
        spec = cluster.objects.read("jobs", "dmdr-tiny-prompts-1")["spec"]
        cluster.objects.update("jobs", "dmdr-tiny-prompts-1", spec={**spec, "suspend": False})

    threading.Thread(target=admit, daemon=True).start()
    said = launched(stage(patience=1))
    assert said[1] == "prompts: dmdr-tiny-prompts-1 waits in the queue" and said[-1] == "prompts: sealed"


def test_what_fails_is_tried_again_by_the_cluster_and_what_stays_bad_is_not(cluster, stage, tmp_path):
    once = {"QUICK_EXIT": "74", "QUICK_ONCE": str(tmp_path / "once")}
    launched(stage(environment=once))
    assert len(cluster.kubelet.started) == 2
    failure = failed(stage("export", environment={"QUICK_EXIT": "65"}))
    assert failure.exit_code == 65 and failure.final and len(cluster.kubelet.started) == 3
    failure = failed(stage("evaluate", environment={"QUICK_EXIT": "74"}, retries=1))
    assert failure.exit_code == 74 and failure.final and len(cluster.kubelet.started) == 5
    assert "BackoffLimitExceeded" in str(failure)
    launched(stage("evaluate"))  # the next attempt has the next number
    assert "dmdr-tiny-evaluate-2" in jobs(cluster)


def test_an_eviction_does_not_count(cluster: Cluster, stage: Callable[..., Stage]):
    asked = stage(environment={"QUICK_SECONDS": "2"}, retries=0)
    flow = threading.Thread(target=launched, args=(asked,), daemon=True)
    flow.start()
    for number in range(3):
        until(lambda number=number: len(cluster.kubelet.started) == number + 1)
        time.sleep(1)
        cluster.kubelet.evict(cluster.kubelet.started[-1])
    flow.join(30)
    assert Artifact(asked.store, "tiny", "prompts").record() is not None and len(cluster.kubelet.started) == 4


def test_a_pod_that_is_killed_for_memory_says_so(cluster: Cluster, stage: Callable[..., Stage]):
    asked = stage("joint", environment={"QUICK_SECONDS": "60"}, retries=0, memory="3Gi")

    def kill() -> None:
        until(lambda: cluster.kubelet.running())
        time.sleep(0.5)
        cluster.kubelet.kill_for_memory(cluster.kubelet.started[-1])

    threading.Thread(target=kill, daemon=True).start()
    failure = failed(asked)
    assert failure.exit_code == 137 and "killed for memory" in str(failure) and "3Gi" in str(failure)
    assert "execution.cluster.stages.joint.memory" in str(failure)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_pod_that_somebody_deletes_does_not_count(cluster: Cluster, stage: Callable[..., Stage], nodes: int):
    """More often than `retries`; of two pods, both are told, as ranks tell each other."""
    asked = stage("joint", environment={"QUICK_SECONDS": "3"}, retries=0, stages=TWO_NODES if nodes == 2 else {})
    flow = threading.Thread(target=launched, args=(asked,), daemon=True)
    flow.start()
    for times in (1, 2):
        until(lambda times=times: len(cluster.kubelet.started) == times * nodes)
        time.sleep(0.7)  # they have their handlers
        told = cluster.kubelet.running()
        for pod in told:
            cluster.delete("pods", pod)
        until(lambda told=told: cluster.kubelet.ended.keys() >= set(told))  # the first may have a successor by then
    flow.join(30)
    assert Artifact(asked.store, "tiny", "joint").record() is not None
    assert len(cluster.kubelet.started) == 3 * nodes
    assert sorted(cluster.kubelet.ended.values()) == [0] * nodes + [75] * 2 * nodes


def test_a_pod_that_fails_by_itself_counts_although_others_were_deleted(cluster, stage):
    asked = stage(environment={"QUICK_SECONDS": "1", "QUICK_EXIT": "74"}, retries=0)

    def delete() -> None:
        until(lambda: cluster.kubelet.running())
        time.sleep(0.5)
        cluster.delete("pods", cluster.kubelet.started[-1])

    threading.Thread(target=delete, daemon=True).start()
    failure = failed(asked)
    assert failure.exit_code == 74 and len(cluster.kubelet.started) == 2


@pytest.mark.parametrize(
    ("owner", "why"), [("alive", "the flow run alive may wait for it"), (None, "somebody created it by hand")]
)
def test_a_flow_that_leaves_a_job_says_so_and_how_to_stop_it(cluster, stage, owner, why):
    cluster.kubelet.suspends = True
    asked, said = stage(), []
    kubernetes.Jobs(asked, print).begin(owner)

    def interrupt(line: str) -> None:
        said.append(line)
        if "waits in the queue" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kubernetes.run_job(asked, say=interrupt, sealed=lambda: False, flow_run="me")
    stop = "kubectl -n dmdr delete job dmdr-tiny-prompts-1"
    assert said[-1] == f"prompts: dmdr-tiny-prompts-1 runs on, because {why}; to stop it: {stop}"
    assert jobs(cluster) == ["dmdr-tiny-prompts-1"]


def test_a_job_whose_owner_dies_while_we_wait_is_stopped_with_us(cluster: Cluster, stage: Callable[..., Stage]):
    cluster.kubelet.suspends = True
    asked, over = stage(), set()
    kubernetes.Jobs(asked, print).begin("owner")

    def interrupt(line: str) -> None:
        if "waits in the queue" in line:
            over.add("owner")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kubernetes.run_job(
            asked, say=interrupt, sealed=lambda: False, flow_run="me", is_over=lambda flow, _: flow in over
        )
    until(lambda: not jobs(cluster))


def test_a_job_that_somebody_deletes_is_noticed(cluster: Cluster, stage: Callable[..., Stage]):
    kubectl = shutil.which("kubectl")
    asked = stage(environment={"QUICK_SECONDS": "60"})

    def delete() -> None:
        until(lambda: cluster.kubelet.running())
        if kubectl:
            subprocess.run([kubectl, "delete", "job", "dmdr-tiny-prompts-1", "--wait=false"], check=True)
        else:
            cluster.kubelet.delete_job("dmdr-tiny-prompts-1")

    threading.Thread(target=delete, daemon=True).start()
    failure = failed(asked)
    assert failure.exit_code == 75 and failure.final and "deleted by somebody" in str(failure)


def test_two_flows_at_once_share_a_job(cluster: Cluster, stage: Callable[..., Stage]):
    asked, said = stage(environment={"QUICK_SECONDS": "1"}), {}

    def flow(me: str) -> None:
        said[me] = launched(asked, flow_run=me)

    both = [threading.Thread(target=flow, args=(me,), daemon=True) for me in ("one", "two")]
    for each in both:
        each.start()
    for each in both:
        each.join(30)
    assert sorted(said) == ["one", "two"] and jobs(cluster) == ["dmdr-tiny-prompts-1"]
    assert len(cluster.kubelet.started) == 1
    assert [line for line in said["one"] + said["two"] if "attached" in line] == [
        "prompts: attached to dmdr-tiny-prompts-1"
    ]


def test_a_stage_that_was_sealed_since_we_looked_gets_no_second_job(cluster: Cluster, stage: Callable[..., Stage]):
    launched(stage())
    assert launched(stage()) == [] and jobs(cluster) == ["dmdr-tiny-prompts-1"]


def test_a_job_of_another_store_is_left_alone(cluster: Cluster, stage: Callable[..., Stage], tmp_path: Path):
    cluster.kubelet.suspends = True
    ours = stage()
    kubernetes.Jobs(ours, print).begin("me")
    other = Stage(ours.name, ours.run, f"{tmp_path}/other", ours.config, ours.text)
    failure = failed(other)
    assert failure.exit_code == 64 and "another store" in str(failure) and jobs(cluster) == ["dmdr-tiny-prompts-1"]


@pytest.mark.parametrize(("owner", "stays"), [("me", False), ("over", False), ("alive", True), (None, True)])
def test_a_cancelled_flow_stops_its_own_jobs_and_no_other(cluster: Cluster, stage: Callable[..., Stage], owner, stays):
    asked = stage(environment={"QUICK_SECONDS": "60"})
    kubernetes.Jobs(asked, print).begin(owner)
    until(lambda: cluster.kubelet.running())
    time.sleep(0.7)  # it has its handler

    class Cancelled(BaseException):
        pass

    def say(line: str) -> None:
        if "at work" in line:
            raise_in_main.set()

    raise_in_main = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        look = kubernetes.Jobs.list_pods

        def cancelled(self, job):
            if raise_in_main.wait(0.2):
                raise Cancelled
            return look(self, job)

        patch.setattr(kubernetes.Jobs, "list_pods", cancelled)
        with pytest.raises(Cancelled):
            kubernetes.run_job(
                asked, say=say, sealed=lambda: False, flow_run="me", is_over=lambda flow, _: flow == "over"
            )
    assert bool(jobs(cluster)) == stays and bool(cluster.kubelet.running()) == stays
    if not stays:
        assert [*cluster.kubelet.ended.values()] == [75], "it had its time to checkpoint"


def test_a_flow_that_is_cancelled_before_it_hears_of_its_job_stops_it(cluster: Cluster, stage: Callable[..., Stage]):
    """The cluster has created the Job, and its answer is on the way."""

    class Cancelled(BaseException):
        pass

    def create(self, manifest):
        begin(self, manifest)
        until(lambda: cluster.kubelet.running())
        time.sleep(0.7)  # it has its handler
        raise Cancelled

    begin = JobApi.create_job
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobApi, "create_job", create)
        with pytest.raises(Cancelled):
            asked = stage(environment={"QUICK_SECONDS": "60"})
            kubernetes.run_job(asked, say=print, sealed=lambda: False, flow_run="me")
    assert jobs(cluster) == cluster.kubelet.running() == []
    assert [*cluster.kubelet.ended.values()] == [75], "it had its time to checkpoint"


def test_the_second_chance_stops_what_a_flow_run_started(cluster: Cluster, stage: Callable[..., Stage]):
    cluster.kubelet.suspends = True
    kubernetes.Jobs(stage("prompts"), print).begin("me")
    kubernetes.Jobs(stage("export"), print).begin("somebody")
    assert owned.stop_all("dmdr", "me") == ["dmdr-tiny-prompts-1"]
    until(lambda: jobs(cluster) == ["dmdr-tiny-export-1"])


FLOW = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))  # as dmdr run has it
from flows.launch import kubernetes
from flows.launch.stage import prepare_stage
from stages.store.artifacts import Artifact
kubernetes.POLL = 1
config, store = sys.argv[1:]
for name in ("prompts", "cold_start", "joint", "export", "evaluate"):
    artifact = Artifact(store, "tiny", name)
    if artifact.record() is None:
        stage = prepare_stage(name, config, "tiny", store)
        kubernetes.run_job(stage, say=print, sealed=lambda: artifact.record() is not None, flow_run="me")
"""


def test_flows_that_are_killed_run_nothing_twice(cluster: Cluster, stage: Callable[..., Stage], tmp_path: Path):
    """A flow that is killed without a word at random instants, and begun again each time: a Job a stage, each run once.
    Set DMDR_KILLS for more."""
    pace = KILLS * 3 / len(STAGES)  # a kill comes every 2 seconds, so they fall into all of the stages
    log = tmp_path / "starts"
    asked = stage(environment={"QUICK_LOG": str(log), "QUICK_SECONDS": str(pace)})
    kills, enough = 0, 60 + 2 * len(STAGES) * pace
    while True:
        flow = program.start(FLOW, str(tmp_path / "tiny.yaml"), asked.store)
        try:
            code = flow.wait(cluster.random.uniform(0.5, 3.5) if kills < KILLS else enough)
            assert code == 0
            break
        except subprocess.TimeoutExpired:
            flow.kill()
            flow.wait()
            kills += 1
    assert kills == KILLS, f"done after {kills} kills"
    assert sorted(jobs(cluster)) == sorted(job_name("tiny", each, 1) for each in STAGES)
    assert log.read_text().split() == list(STAGES)


def test_a_flow_that_is_cancelled_in_any_stage_leaves_no_pod_and_goes_on(
    cluster: Cluster, stage: Callable[..., Stage], tmp_path: Path
):
    """Cancelled once in each stage, begun again each time: each stage is begun twice and sealed once."""
    log = tmp_path / "starts"
    asked = stage(environment={"QUICK_LOG": str(log), "QUICK_SECONDS": "3"}, grace=20)
    arguments = FLOW, str(tmp_path / "tiny.yaml"), asked.store
    for number, each in enumerate(STAGES):
        with program.start(*arguments) as flow:
            try:
                so_far = [*twice(STAGES[:number]), each]
                until(lambda so_far=so_far: began(log) == so_far, 60)
                flow.terminate()
                assert flow.wait(30) == 75
            finally:
                flow.kill()
        assert not cluster.kubelet.running() and not cluster.objects.list("pods", f"{STAGE}={each}")[0]
        assert cluster.kubelet.ended[cluster.kubelet.started[-1]] == 75, "it had its time for a checkpoint"
        assert sorted(jobs(cluster)) == sorted(job_name("tiny", before, 1) for before in STAGES[:number])
    assert program.run(*arguments).returncode == 0
    assert all(Artifact(asked.store, "tiny", each).record() is not None for each in STAGES)
    assert began(log) == twice(STAGES)


def twice(stages: Iterable[str]) -> list[str]:
    return [each for each in stages for _ in range(2)]


def began(log: Path) -> list[str]:
    return log.read_text().split() if log.exists() else []


def test_kubectl_alone_runs_a_stage(cluster: Cluster, stage: Callable[..., Stage], tmp_path: Path):
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    asked = stage()
    render = [sys.executable, "-m", "flows.cli", "render", str(tmp_path / "tiny.yaml"), "--stage", "prompts"]
    printed = subprocess.run([*render, "--store", asked.store], cwd=ROOT, capture_output=True, text=True, check=True)
    create = ["kubectl", "create", "--validate=false", "-f", "-"]
    subprocess.run(create, input=printed.stdout, text=True, check=True)
    artifact = Artifact(asked.store, "tiny", "prompts")
    until(lambda: artifact.record() is not None)
    listed = subprocess.run(
        ["kubectl", "get", "jobs", "-l", f"{RUN}=tiny", "-o", "name"], capture_output=True, text=True, check=True
    )
    assert listed.stdout.split() == ["job.batch/dmdr-tiny-prompts-1"]


def test_several_nodes_train_as_one(cluster: Cluster, tiny_config: Callable[..., Path], tmp_path: Path):
    """A JobSet of two pods, each with its rank; the seal says that two processes made it."""
    from dmdr.config.load import load_config
    from tests.support.trained_run import seal_stage  # imports torch

    store = tmp_path / "store"
    about = {
        "image": IMAGE,
        "claims": {str(tmp_path.parent): "everything"},
        "stages": {
            "cold_start": {"nodes": 2},
            "joint": {"nodes": 2},
        },
    }
    training = {
        "updates": 2,
        "batch_size": 4,
        "fake_updates": 2,
        "student": {"learning_rate": 1e-4},
        "fake_score": {"learning_rate": 2e-4},
    }
    config = tiny_config(execution={"device": "cpu", "cluster": about}, cold_start=training, joint=training)
    seal_stage(load_config(config), store, "prompts")
    said = launched(prepare_stage("cold_start", str(config), "tiny", str(store)))
    assert Artifact(str(store), "tiny", "cold_start").record().provenance.processes == 2
    assert any(line.startswith("node 0: ") for line in said) and len(cluster.kubelet.started) == 2


def test_the_launcher_uses_no_right_that_its_role_lacks(cluster: Cluster, stage: Callable[..., Stage]):
    launched(stage(environment={"QUICK_SECONDS": "1"}))
    owned.stop_all("dmdr", "me")
    verbs = ("create", "get", "list", "watch", "patch", "delete")
    allowed = {(verb, kind) for verb in verbs for kind in ("jobs", "jobsets")}
    allowed |= {("get", "pods"), ("list", "pods"), ("watch", "pods"), ("get", "pods/log")}
    allowed |= {("get", "events"), ("list", "events")}
    assert cluster.asked <= allowed, cluster.asked - allowed


@pytest.mark.parametrize("minor", minors())
def test_what_is_rendered_is_valid_and_restricted(stage: Callable[..., Stage], minor: str):
    """In the build that it runs in: one node and several, all that can be asked for."""
    several = {"cold_start": {"nodes": 16, "gpus": 8}, "joint": {"nodes": 2, "gpus": 8, "deadline": 3600}}
    asked = {
        "queue": "dmdr",
        "priority_class": "dmdr-train",
        "secrets": ["dmdr-store"],
        "pull_secret": "registry",
        "node_selector": {"kind": "big"},
        "environment": {"NCCL_DEBUG": "WARN"},
        "stages": several,
        "claims": {"/models": "models", "/prompts": "models"},
        "gpus": 1,
        "topology": "example.com/rack",
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "models", "namespace": "dmdr"},
        "spec": {"accessModes": ["ReadOnlyMany"], "resources": {"requests": {"storage": "1Ti"}}},
    }
    stages = [stage(each, run="x" * 63, **asked) for each in STAGES]
    jobs = [
        build_manifest(Stage(s.name, s.run, "s3://b/p", s.config, s.text, "hub:owner/a_b@1"), 99, "me") for s in stages
    ]
    build = rendered(ROOT / "k8s/overlays/many-nodes") if shutil.which("kubectl") else None
    assert {each["kind"] for each in jobs} == {"Job", "JobSet"}
    assert schema_problems([*jobs, claim], minor) == []
    if build is not None:
        assert problems([*build, *jobs, claim]) == []


@pytest.mark.parametrize("queue", [None, "dmdr"])
def test_the_nodes_of_a_stage_are_kept_in_one_topology_domain_where_asked(stage: Callable[..., Stage], queue):
    """By the annotations of JobSet's and Kueue's documentation, each where its controller reads it."""
    asked = {"queue": queue, "topology": "example.com/rack", "stages": {"joint": {"nodes": 2}}}
    stages = {name: stage(name, **asked) for name in ("prompts", "joint")}
    manifests = {
        name: build_manifest(Stage(name, each.run, "s3://b/p", each.config, each.text), 1)
        for name, each in stages.items()
    }
    [nodes] = manifests["joint"]["spec"]["replicatedJobs"]
    of_job = nodes["template"]["metadata"].get("annotations", {})
    of_pod = nodes["template"]["spec"]["template"]["metadata"]["annotations"]
    if queue is None:
        assert of_job == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "example.com/rack"}
        assert "kueue.x-k8s.io/podset-required-topology" not in of_pod
    else:
        assert of_job == {} and of_pod["kueue.x-k8s.io/podset-required-topology"] == "example.com/rack"
    alone = manifests["prompts"]["spec"]["template"]["metadata"]["annotations"]
    assert [*alone] == ["dmdr.dev/config"], "one node is in one domain anyway"


def test_no_pod_would_see_a_folder_of_ours(stage: Callable[..., Stage]):
    from dmdr.errors import ConfigError

    asked = stage(claims={"/models": "models"})
    with pytest.raises(ConfigError, match="s3://BUCKET/PREFIX"):
        build_manifest(asked, 1)
