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
from flows.launch import backoff, kubernetes, logs, owned, waiting
from flows.launch.backoff import Backoff
from flows.launch.cluster_errors import ClusterUnavailable, NameTaken
from flows.launch.failure import StageFailed
from flows.launch.labels import RUN, STAGE
from flows.launch.manifest import LONGEST, build_manifest, job_name
from flows.launch.stage import Stage, prepare_stage
from stages.store.artifacts import Artifact
from tests.support import program
from tests.support.fake_cluster.server import IMAGE, QUICK, Cluster
from tests.support.manifests import minors, problems, rendered, schema_problems

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
RATE = {"learning_rate": 1e-4}
TRAINING = {"updates": 2, "batch_size": 16, "fake_updates": 5, "student": RATE, "fake_score": RATE}
TWO_NODES = {"cold_start": {"nodes": 2}, "joint": {"nodes": 2}}
KILLS = int(os.environ.get("DMDR_KILLS", "6"))


@pytest.fixture(autouse=True)
def watches_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "POLL", 1)
    monkeypatch.setattr(waiting, "CREATION", 0.2)
    monkeypatch.setattr(waiting, "SETTLING", 0.5)


@pytest.fixture
def stage(tiny_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Stage]:
    """A stage of a quick run whose store is a folder that pods see; keywords change what the cluster is asked for."""

    def made(which: str = "prompts", environment: dict[str, str] | None = None, run: str = "tiny", **asked) -> Stage:
        claims = {str(tmp_path.parent): "everything"}
        about = {"image": QUICK, "environment": environment or {}, "claims": claims, "grace": 5, **asked}
        config = tiny_config(execution={"device": "cpu", "cluster": about}, cold_start=TRAINING, joint=TRAINING)
        return prepare_stage(which, str(config), run, str(tmp_path / "store"))

    return made


def launched(stage: Stage, **more) -> list[str]:
    """Run a stage; what was said."""
    said: list[str] = []
    artifact = Artifact(stage.store, stage.run, stage.name)
    kubernetes.run_job(stage, say=said.append, sealed=lambda: artifact.record() is not None, **more)
    return said


def failed(stage: Stage, **more) -> StageFailed:
    with pytest.raises(StageFailed) as failure:
        launched(stage, **more)
    assert "\n" not in str(failure.value)
    return failure.value


def jobs(cluster: Cluster) -> list[str]:
    return [each["metadata"]["name"] for each in cluster.objects.list("jobs")[0]]


def until(holds: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


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


def test_a_pod_that_no_node_takes_is_given_up(cluster: Cluster, stage: Callable[..., Stage]):
    cluster.kubelet.gpus = 4
    failure = failed(stage("joint", gpus=8, patience=2))
    assert (
        failure.exit_code == 64 and "8 nvidia.com/gpu" in str(failure) and "Insufficient nvidia.com/gpu" in str(failure)
    )
    until(lambda: not jobs(cluster))


def test_an_image_or_a_secret_that_is_missing_is_named(cluster: Cluster, stage: Callable[..., Stage]):
    cluster.kubelet.missing.add(IMAGE)
    failure = failed(stage(image=IMAGE, patience=1))
    assert failure.exit_code == 64 and "ErrImagePull" in str(failure) and IMAGE in str(failure)
    failure = failed(stage("export", secrets=["dmdr-store"], patience=1))
    assert failure.exit_code == 64 and 'secret "dmdr-store" not found' in str(failure)


REFUSALS = {
    "quota": ("most_pods", 0, {}, "exceeded quota: dmdr, requested: pods=1, used: pods=0, limited: pods=0; raise that"),
    "account": (
        "accounts",
        set(),
        {},
        'error looking up service account dmdr/dmdr-stage: serviceaccount "dmdr-stage" not found; create it',
    ),
    "priority": (
        "priorities",
        set(),
        {"priority_class": "dmdr-train"},
        "no PriorityClass with name dmdr-train was found; create it",
    ),
    "webhook": (
        "webhook",
        "images come from elsewhere",
        {},
        'admission webhook "policy.example.org" denied the request: images come from elsewhere; mend what it names',
    ),
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_pods_that_cannot_be_created_are_told_and_given_up(cluster: Cluster, stage: Callable[..., Stage], fault: str):
    attribute, value, asked, told = REFUSALS[fault]
    setattr(cluster.kubelet, attribute, value)
    said: list[str] = []
    with pytest.raises(StageFailed) as failure:
        kubernetes.run_job(stage(patience=1, **asked), say=said.append, sealed=lambda: False)
    assert failure.value.exit_code == 64 and failure.value.final
    why = str(failure.value)
    assert told in why and "it waited 1 s (execution.cluster.patience)" in why and "\n" not in why
    assert len(said) == 2 and said[1].startswith("prompts: dmdr-tiny-prompts-1 gets no pod: pods ") and told in said[1]
    until(lambda: not jobs(cluster))


def test_a_pod_of_several_that_cannot_be_created_is_told_too(cluster: Cluster, stage: Callable[..., Stage]):
    """The second pod of a JobSet is over the quota; then the Job that the JobSet makes is."""
    cluster.kubelet.most_pods = 1
    failure = failed(stage("joint", patience=1, environment={"QUICK_SECONDS": "60"}, stages=TWO_NODES))
    assert failure.exit_code == 64 and "lacks a pod: pods " in str(failure) and "used: pods=1" in str(failure)
    until(lambda: not cluster.objects.list("jobsets")[0])
    cluster.kubelet.most_pods, cluster.kubelet.most_jobs = None, 0
    failure = failed(stage("cold_start", patience=1, stages=TWO_NODES))
    assert (
        failure.exit_code == 64 and "gets no pod: jobs.batch " in str(failure) and "count/jobs.batch=0" in str(failure)
    )


def test_a_pod_that_is_created_after_all_runs(cluster: Cluster, stage: Callable[..., Stage]):
    cluster.kubelet.most_pods = 0

    def mend(line: str) -> None:
        said.append(line)
        if "exceeded quota" in line:
            cluster.kubelet.most_pods = 1

    said: list[str] = []
    asked = stage()
    artifact = Artifact(asked.store, asked.run, asked.name)
    kubernetes.run_job(asked, say=mend, sealed=lambda: artifact.record() is not None)
    assert artifact.record() is not None and len([line for line in said if "exceeded quota" in line]) == 1


def test_events_that_may_not_be_read_are_no_reason_to_wait_for_ever(cluster, stage, monkeypatch):
    """A Role of before, and a Job that no controller looks at."""
    monkeypatch.setattr(waiting, "SILENCE", 0.5)
    cluster.kubelet.most_pods = 0
    cluster.denied.add(("list", "events"))
    failure = failed(stage(patience=1))
    assert failure.exit_code == 64 and "kubectl -n dmdr describe job dmdr-tiny-prompts-1" in str(failure)
    assert "k8s/base has the Role" in str(failure)


def test_a_volume_that_cannot_be_mounted_is_told(cluster: Cluster, stage: Callable[..., Stage]):
    cluster.kubelet.unmounted = 'MountVolume.SetUp failed for volume "claim-0" : mount failed: exit status 32'
    failure = failed(stage(patience=1))
    assert failure.exit_code == 64 and "FailedMount: MountVolume.SetUp failed" in str(failure)


def test_a_reason_that_alternates_is_told_once(cluster: Cluster, stage: Callable[..., Stage]):
    cluster.kubelet.missing.add(IMAGE)
    said: list[str] = []
    with pytest.raises(StageFailed, match="patience"):
        kubernetes.run_job(stage(image=IMAGE, patience=3), say=said.append, sealed=lambda: False)
    assert len([line for line in said if "cannot start" in line]) == 1, said


def test_the_words_of_the_kubelet_are_no_lines_of_the_stage(cluster: Cluster, stage: Callable[..., Stage], monkeypatch):
    monkeypatch.setattr(logs, "PAUSE", 0.1)
    cluster.kubelet_says = [
        "unable to retrieve container logs for containerd://8cdfe489333df0",
        'failed to try resolving symlinks in path "/var/log/pods/dmdr_x/stage/0.log": lstat /var/log/pods/dmdr_x: no '
        "such file or directory\n",
    ]
    said = launched(stage(environment={"QUICK_SECONDS": "1"}))
    assert said == ["prompts: created job dmdr-tiny-prompts-1", "prompts: at work", "prompts: sealed"]


def test_a_log_is_read_on_from_where_it_broke_off():
    """Lines of one instant, times of another zone and words without a time."""
    place = logs.Place()
    lines = ["2026-01-01T00:00:00.000000001Z a", "2026-01-01T00:00:00.000000001Z b", "2026-01-01T00:00:00.000000002Z c"]
    assert [place.take(line) for line in lines] == ["a", "b", "c"]
    assert [place.take(line) for line in ("zzz", "2026-13-45T00:00:00Z no such day", "2026-01-01 ")] == [None] * 3
    place.start_over()
    more = ["2026-01-01T00:00:00.000000002Z d", "2026-01-01T02:00:00.000000001+02:00 b", "2026-01-01T02:00:01+02:00 e"]
    assert [place.take(line) for line in [*lines, *more]] == [None, None, None, "d", None, "e"]


def test_a_quota_on_jobs_is_no_missing_role(cluster: Cluster, stage: Callable[..., Stage]):
    cluster.kubelet.most_jobs = 0
    failure = failed(stage())
    assert failure.exit_code == 64 and "exceeded quota: dmdr, requested: count/jobs.batch=1" in str(failure)
    assert "Role" not in str(failure) and "no room for more jobs" in str(failure)


def test_a_node_that_the_pod_before_still_holds_is_no_alarm(cluster: Cluster, stage: Callable[..., Stage], monkeypatch):
    monkeypatch.setattr(waiting, "SETTLING", 0.2)
    on_gpus = {"gpus": 8, "grace": 20}
    before = stage("joint", environment={"QUICK_SECONDS": "60", "QUICK_GRACE": "3"}, **on_gpus)
    job = kubernetes.Jobs(before, print).begin("me")
    until(lambda: cluster.kubelet.running())
    time.sleep(0.7)  # it has its handler
    cluster.kubelet.delete_job(job.name)
    said = launched(stage("evaluate", **on_gpus))
    assert said == ["evaluate: created job dmdr-tiny-evaluate-1", "evaluate: at work", "evaluate: sealed"]


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


def test_what_the_cluster_refuses_is_one_line(cluster: Cluster, stage: Callable[..., Stage], monkeypatch, tmp_path):
    cluster.denied.add(("create", "jobs"))
    failure = failed(stage())
    assert failure.exit_code == 64 and failure.final and "create jobs" in str(failure) and "dmdr" in str(failure)
    cluster.denied.clear()
    failure = failed(stage(namespace="elsewhere"))
    assert failure.exit_code == 64 and "elsewhere" in str(failure)
    cluster.has_jobsets = False
    failure = failed(stage("joint", stages=TWO_NODES))
    assert failure.exit_code == 64 and "JobSet" in str(failure)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nothing"))
    failure = failed(stage())
    assert failure.exit_code == 64 and "KUBECONFIG" in str(failure)


def test_no_cluster_that_answers(cluster: Cluster, stage: Callable[..., Stage], monkeypatch, tmp_path):
    cluster.port = 9  # discard
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path)))
    monkeypatch.setattr(backoff, "FIRST", 1)
    failure = failed(stage())
    assert failure.exit_code == 74 and "127.0.0.1:9" in str(failure)


def test_a_cluster_that_has_answered_gets_the_time_of_an_outage(monkeypatch):
    monkeypatch.setattr(backoff, "FIRST", 0.1)
    answered, silent = Backoff("prompts", print), Backoff("prompts", print)
    answered.reach(lambda: "an answer")
    began = time.monotonic()

    def answer() -> str:
        if time.monotonic() < began + 0.3:
            raise ClusterUnavailable("the cluster does not answer")
        return "a second answer"

    with pytest.raises(StageFailed, match="does not answer; see that the cluster runs") as failure:
        silent.call(answer)
    assert failure.value.exit_code == 74 and failure.value.final
    assert answered.call(answer) == "a second answer"


@pytest.mark.parametrize(("error", "notices"), [(ClusterUnavailable, 1), (NameTaken, 0)])
def test_pauses_grow_and_one_notice_tells_of_them(error, notices, monkeypatch):
    pauses, said = [], []
    monkeypatch.setattr(time, "sleep", pauses.append)
    patient = Backoff("prompts", said.append)

    def answer_the_tenth_time() -> int:
        if len(pauses) % 10 < 9:
            raise error("the cluster does not answer")
        pauses.append(0)
        return len(pauses)

    for calls in (1, 2):  # each call begins with short pauses
        assert patient.call(answer_the_tenth_time) == 10 * calls
    assert pauses == [0.125, 0.25, 0.5, 1, 2, 4, 8, 8, 8, 0] * 2
    assert said == ["prompts: the cluster does not answer; trying again for 20 s"] * 2 * notices


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
    pace = KILLS * 3 / len(STAGES)  # a kill comes every 2.5 seconds, so they fall into all of the stages
    log = tmp_path / "starts"
    asked = stage(environment={"QUICK_LOG": str(log), "QUICK_SECONDS": str(pace)})
    kills, enough = 0, 60 + 2 * len(STAGES) * pace
    while True:
        flow = program.start(FLOW, str(tmp_path / "tiny.yaml"), asked.store)
        try:
            code = flow.wait(cluster.random.uniform(0.5, 4.5) if kills < KILLS else enough)
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
    asked = stage(environment={"QUICK_LOG": str(log), "QUICK_SECONDS": "1.5"}, grace=20)
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
    from tests.support.trained_run import run_stage  # imports torch

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
    run_stage(load_config(config), store, "prompts")
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


def test_no_pod_would_see_a_folder_of_ours(stage: Callable[..., Stage]):
    from dmdr.errors import ConfigError

    asked = stage(claims={"/models": "models"})
    with pytest.raises(ConfigError, match="s3://BUCKET/PREFIX"):
        build_manifest(asked, 1)
