"""What is stuck or refused on a cluster is told in one line, and given up in time."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from flows.launch import backoff, kubernetes, logs, waiting
from flows.launch.backoff import Backoff
from flows.launch.cluster_errors import ClusterUnavailable, NameTaken
from flows.launch.failure import StageFailed
from flows.launch.stage import Stage
from stages.store.artifacts import Artifact
from tests.support.fake_cluster.server import IMAGE, Cluster
from tests.support.job_stage import TWO_NODES, failed, jobs, launched, until

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("watches_are_short")]


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
