"""The flow `dmdr`: prompts, cold start, joint training, export, evaluation.

1. Truth is in the store: a stage is done when it exited with 0 and its seal is there. Prefect's results and cache are
   off, so Prefect may lose everything and nothing is lost.
2. Running the flow again is how it goes on: a sealed stage says so and stops, an open one resumes.
3. Exit codes decide about retries. Bad config, bad data and missing inputs stay bad: they are never tried again.
4. A run that a deployment started writes the stages' lines to its Prefect log. Started by hand, the stages write to the
   terminal themselves, and a progress bar stays a bar.
5. With `execution.cluster` a stage is a Job of Kubernetes. One that is sealed with this config's settings needs none.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun, State, TaskRun
from prefect.flows import Flow
from prefect.runtime import deployment, flow_run
from prefect.tasks import Task

from dmdr.config import Config
from dmdr.config_file import load
from dmdr.identity import identity
from flows import owners, publish
from flows.launch import process
from flows.launch.failure import StageFailed
from flows.render import prepared
from stages.artifacts import Artifact

UNSEALED = 70  # our own code for a stage that claims success and left no seal
RETRY_DELAYS = [2, 10, 30]  # seconds


def worth_a_retry(task: Task, task_run: TaskRun, state: State) -> bool:
    """Prefect's retry condition: everything but the verdict that a retry would change nothing. Says so."""
    failure = state.result(raise_on_failure=False)
    again = isinstance(failure, StageFailed) and not failure.final
    if again:
        print(f"{failure}; trying again in {RETRY_DELAYS[task_run.run_count - 1]} s", file=sys.stderr)
    return again


@task(
    task_run_name="{name}",
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=worth_a_retry,
    cache_policy=NO_CACHE,
    persist_result=False,
    result_serializer="json",
)
def stage(name: str, config: str, run: str, store: str) -> None:
    """Run one stage to its seal.

    Raises:
        StageFailed: it exited with another code than 0, or its seal is missing.
    """
    checked, artifact = load(config), Artifact(store, run, name)
    say = get_run_logger().info if deployment.id else None
    if checked.execution.cluster is not None:
        _as_job(name, config, checked, artifact, say or print)
    else:
        command = [sys.executable, "-m", "stages", name, "--config", config, "--run", run, "--store", store]
        if code := process.run(command, say=say):
            raise StageFailed(name, code, f"exit code {code}", says_more=False)
    if artifact.record() is None:
        raise StageFailed(name, UNSEALED, f"exit code 0, but nothing is sealed at {artifact.address}")


def _as_job(name: str, config: str, checked: Config, artifact: Artifact, say: Callable[[str], None]) -> None:
    """Run a stage on the cluster unless it is sealed with these settings. What it reads is the pod's business: this
    process may have no teacher and no prompts.

    Raises:
        ConfigError: it is sealed with other settings.
    """
    from flows.launch import kubernetes

    record = artifact.record()
    if record is not None:
        artifact.claim(identity(checked, name), record["inputs"])
        say(f"{name}: sealed already at {artifact.address}")
        return
    asked = prepared(name, config, artifact.run, artifact.store)
    kubernetes.run(
        asked, say=say, sealed=lambda: artifact.record() is not None, flow_run=str(flow_run.id), is_over=owners.is_over
    )


def stop_jobs(flow: Flow, flow_run: FlowRun, state: State) -> None:
    """A second chance to stop the Jobs of a cancelled flow run, in another process than its own."""
    cluster = load(flow_run.parameters["config"]).execution.cluster
    if cluster is not None:
        from flows.launch import kubernetes

        for job in kubernetes.stop_all(cluster.namespace, str(flow_run.id)):
            print(f"stopped {job}")


@flow(name="dmdr", persist_result=False, result_serializer="json", on_cancellation=[stop_jobs])
def dmdr(config: str, run: str | None = None, store: str = "runs") -> None:
    """Distil the teacher of a config file into its student, and score it.

    Args:
        config: path of the YAML file
        run: name of the run; the config's own name if not given
        store: where artifacts lie, a folder or any fsspec URL such as s3://bucket/prefix
    """
    run = run or load(config).run
    stage("prompts", config, run, store)
    stage("cold_start", config, run, store)
    stage("joint", config, run, store)
    stage("export", config, run, store)
    stage("evaluate", config, run, store)
    publish.scorecard(run, store)


def _without_stack(record: logging.LogRecord) -> bool:
    """A failed stage has said why in its own lines; the stack of the flow that started it adds nothing."""
    if record.exc_info and isinstance(record.exc_info[1], StageFailed):
        record.exc_info = None
    return True


for runs in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(runs).addFilter(_without_stack)
