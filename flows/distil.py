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
from typing import Annotated

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun, State, TaskRun
from prefect.flows import Flow
from prefect.runtime import deployment, flow_run
from prefect.tasks import Task
from pydantic import Field

from dmdr.config.identity import identity
from dmdr.config.load import load_config
from dmdr.config.run import NAME
from dmdr.config.section import Address
from flows.launch import process
from flows.launch.failure import StageFailed
from flows.launch.stage import Stage, build_options, prepare_stage
from flows.prefect_support import artifacts, owners
from stages.store.artifacts import Artifact

UNSEALED = 70  # our own code for a stage that claims success and left no seal
RETRY_DELAYS = [2, 10, 30]  # seconds
Run = Annotated[str, Field(pattern=NAME)]  # refused when a run is asked for, not when it begins


def is_worth_a_retry(task: Task, task_run: TaskRun, state: State) -> bool:
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
    retry_condition_fn=is_worth_a_retry,
    cache_policy=NO_CACHE,
    persist_result=False,
    result_serializer="json",
)
def run_stage(
    name: str, config: str, run: str, store: str, teacher: str | None = None, adopt: str | None = None
) -> None:
    """Run one stage to its seal. teacher, adopt: as `python -m stages` has them.

    Raises:
        StageFailed: it exited with another code than 0, or its seal is missing.
    """
    checked, artifact = load_config(config), Artifact(store, run, name)
    say = get_run_logger().info if deployment.id else None
    if checked.execution.cluster is not None:
        _run_as_job(prepare_stage(name, config, run, store, teacher, adopt), artifact, say or print)
    else:
        arguments = [name, *build_options(config, run, store, teacher, adopt)]
        command = [sys.executable, "-m", "stages", *arguments]
        if code := process.run_process(command, say=say):
            raise StageFailed(name, code, f"exit code {code}", says_more=False)
    if artifact.record() is None:
        raise StageFailed(name, UNSEALED, f"exit code 0, but nothing is sealed at {artifact.address}")


def _run_as_job(asked: Stage, artifact: Artifact, say: Callable[[str], None]) -> None:
    """Run a stage on the cluster unless it is sealed with these settings. What it reads is the pod's business: this
    process may have no teacher and no prompts.

    Raises:
        ConfigError: it is sealed with other settings.
    """
    from flows.launch import kubernetes

    record = artifact.record()
    if record is not None:
        artifact.claim(identity(asked.config, asked.name), record.inputs)
        say(f"{asked.name}: sealed already at {artifact.address}")
        return
    kubernetes.run_job(
        asked,
        say=say,
        sealed=lambda: artifact.record() is not None,
        flow_run=str(flow_run.id),
        deployment=deployment.id,
        is_over=owners.is_over,
    )


def stop_jobs(flow: Flow, flow_run: FlowRun, state: State) -> None:
    """A second chance to stop the Jobs of a cancelled flow run, in another process than its own."""
    cluster = load_config(flow_run.parameters["config"]).execution.cluster
    if cluster is not None:
        from flows.launch import owned

        for job in owned.stop_all(cluster.namespace, str(flow_run.id)):
            print(f"stopped {job}")


@flow(name="dmdr", persist_result=False, result_serializer="json", on_cancellation=[stop_jobs])
def dmdr(
    config: Address,
    run: Run | None = None,
    store: Address = "runs",
    teacher: Address | None = None,
    cold_start_of: Run | None = None,
) -> None:
    """Distil the teacher of a config file into its student, and score it.

    Args:
        config: path of the YAML file
        run: name of the run; the config's own name if not given
        store: where artifacts lie, a folder or any fsspec URL such as s3://bucket/prefix
        teacher: in the place of the config's teacher.path; what dmdr teachers published, by its address, will do too
        cold_start_of: a run of the same store whose prompts and cold start are copied, as they suit this config
    """
    run = run or load_config(config).run
    run_stage("prompts", config, run, store, teacher, adopt=cold_start_of)
    run_stage("cold_start", config, run, store, teacher, adopt=cold_start_of)
    run_stage("joint", config, run, store, teacher)
    run_stage("export", config, run, store, teacher)
    run_stage("evaluate", config, run, store, teacher)
    artifacts.publish_scorecard(run, store)


@flow(name="dmdr", persist_result=False, result_serializer="json", on_cancellation=[stop_jobs])
def from_cold_start(
    cold_start_of: Run, config: Address, run: Run | None = None, store: Address = "runs", teacher: Address | None = None
) -> None:
    """`dmdr` on the cold start of another run, which has to be named. Args: as there."""
    dmdr.fn(config, run, store, teacher, cold_start_of)


def _drop_stack(record: logging.LogRecord) -> bool:
    """A failed stage has said why in its own lines; the stack of the flow that started it adds nothing."""
    if record.exc_info and isinstance(record.exc_info[1], StageFailed):
        record.exc_info = None
    return True


for runs in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(runs).addFilter(_drop_stack)
