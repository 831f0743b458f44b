"""The flow `dmdr` on Prefect: prompts, cold start, joint training, export, evaluation (`flows.chain`).

1. Truth is in the store. Prefect's results and cache are off, so Prefect may lose everything and nothing is lost.
2. Exit codes decide about retries. Bad config, bad data and missing inputs stay bad: they are never tried again.
3. A run that a deployment started writes the stages' lines to its Prefect log. Started by hand, the stages write to the
   terminal themselves, and a progress bar stays a bar.
4. With `execution.cluster` a stage is a Job of Kubernetes. A stage that is sealed with these settings needs no Job.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
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
from dmdr.config.names import NAME
from dmdr.config.secrets import refuse_secret_arguments
from dmdr.config.section import Argument
from dmdr.config.stages import STAGES, StageName, list_until
from dmdr.errors import USER_ERRORS, ConfigError, Stopped
from flows import chain, promotion
from flows.launch import given_config, process
from flows.launch.failure import (
    RETRY_DELAYS,
    StageFailed,
    announce_retry,
    check_sealed,
    explain_faults,
    is_worth_a_retry,
)
from flows.launch.stage import Stage, prepare_stage
from flows.prefect_support import artifacts, live, news, owners, progress
from flows.prefect_support.decisions import show_decision
from stages.store.artifacts import Artifact

# So that Prefect refuses a bad name before the flow run starts. Nothing is "" and not None: the form of Prefect's page
# then has one field for it.
Run = Annotated[str, Field(pattern=NAME)]
PerhapsRun = Annotated[str, Field(pattern=rf"^$|{NAME}")]


def retry_stage(task: Task, task_run: TaskRun, state: State) -> bool:
    """Prefect's retry condition. Tells the user that another try will follow."""
    failure = state.result(raise_on_failure=False)
    if not is_worth_a_retry(failure):
        return False
    announce_retry(failure, task_run.run_count)
    return True


@task(
    task_run_name="{name}",
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=list(RETRY_DELAYS),
    retry_condition_fn=retry_stage,
    cache_policy=NO_CACHE,
    persist_result=False,
    result_serializer="json",
)
def run_stage(
    name: StageName, config: str, run: str, store: str, teacher: str | None = None, adopt: str | None = None
) -> None:
    """Run one stage to its seal. teacher, adopt: as the options of `python -m stages`.

    Raises:
        StageFailed: it exited with another code than 0, or its seal is missing.
    """
    on_cluster = load_config(config).execution.cluster is not None
    log = get_run_logger().info if deployment.id else print
    with (
        explain_faults(name),
        progress.show_progress(name, run, log) if deployment.id or on_cluster else nullcontext(None) as say,
        live.follow_live(name, run, store),
    ):
        if on_cluster:
            assert say is not None
            _run_as_job(prepare_stage(name, config, run, store, teacher, adopt), say)
        else:
            process.run_stage(name, config, run, store, teacher, adopt, say=say)
    news.emit_sealed(Artifact(store, run, name), is_last=name == STAGES[-1])


def _run_as_job(stage: Stage, say: Callable[[str], None]) -> None:
    """Run a stage on the cluster unless it is sealed with these settings. Only the pod looks at the inputs: this
    process may have no teacher and no prompts.

    Raises:
        ConfigError: it is sealed with other settings.
    """
    from flows.launch import kubernetes

    artifact = Artifact(stage.store, stage.run, stage.name)
    record = artifact.record()
    if record is not None:
        artifact.claim(identity(stage.config, stage.name), record.inputs)
        say(f"{stage.name}: sealed already at {artifact.address}")
        return
    kubernetes.run_job(
        stage,
        say=say,
        sealed=lambda: artifact.record() is not None,
        flow_run=str(flow_run.id),
        deployment=deployment.id,
        is_over=owners.is_over,
        tell=news.emit,
    )
    check_sealed(artifact)


def stop_jobs(flow: Flow, flow_run: FlowRun, state: State) -> None:
    """Stop the Jobs of a cancelled flow run, from another process, in case its own could not."""
    try:
        cluster = given_config.read_config(flow_run.parameters["config"]).execution.cluster
    except USER_ERRORS as error:
        print(f"cannot see whether the flow run has Jobs to stop: {error}")
        return
    if cluster is not None:
        from flows.launch import owned

        for job in owned.stop_all(cluster.namespace, str(flow_run.id)):
            print(f"stopped {job}")


def name_flow_run() -> str:
    """The name of the run, as that of the flow run. A config that cannot be read fails in the flow, with its reason."""
    parameters = flow_run.parameters
    try:
        return parameters.get("run") or given_config.read_config(parameters["config"]).run
    except USER_ERRORS:
        return flow_run.name


@flow(
    name="dmdr",
    flow_run_name=name_flow_run,
    persist_result=False,
    result_serializer="json",
    on_cancellation=[stop_jobs],
)
def dmdr(
    config: Argument,
    run: PerhapsRun = "",
    store: Argument = "runs",
    teacher: str = "",
    cold_start_of: PerhapsRun = "",
    until: StageName = "evaluate",
    promote: promotion.Rule | None = None,
) -> None:
    """Distil the teacher of a config file into its student, and score it.

    Args:
        config: path of the YAML file where the flow runs, its address such as s3://bucket/my-run.yaml, or its text
        run: name of the run: lower-case letters, digits, dots, dashes and underscores; empty: the config's own
        store: where artifacts lie, a folder or any fsspec URL such as s3://bucket/prefix
        teacher: replaces the config's teacher.path; may be the address of a published teacher; empty: the config's own
        cold_start_of: a run of the same store whose prompts and cold start are copied, if they suit this config; empty:
            none
        until: the last stage to run
        promote: a name that the run gets if it is better than the run that has it, and the metrics that decide
    """
    wait = given_config.WAIT if deployment.id else 0.0  # by hand, a file that is missing is a mistake
    with explain_faults("flow dmdr"):
        refuse_secret_arguments([config, store, teacher])
        if promote is not None and "evaluate" not in list_until(until):
            raise ConfigError(f"only an evaluated run can become {promote.name}, but until is {until}; set evaluate")
        with given_config.open_config(config, get_run_logger().info, wait=wait) as path:
            checked = load_config(path)
            checked.require_stage(until, "until")
            if cold_start_of:
                checked.require_stage("cold_start", "cold_start_of")
            run = run or checked.run
            try:
                chain.distil(run_stage, path, run, store, teacher or None, cold_start_of or None, until)
            except StageFailed as failure:
                if failure.exit_code != Stopped.exit_code:
                    news.emit_failure(Artifact(store, run, failure.stage), failure.exit_code, str(failure))
                raise
            if "evaluate" in list_until(until):
                artifacts.publish_scorecard(run, store)
            if promote is not None:
                decision = promotion.promote_once(run_stage, promote, run, store, path, teacher or None)
                show_decision(store, decision, get_run_logger().info)


@flow(
    name="dmdr",
    flow_run_name=name_flow_run,
    persist_result=False,
    result_serializer="json",
    on_cancellation=[stop_jobs],
)
def from_cold_start(
    cold_start_of: Run, config: Argument, run: PerhapsRun = "", store: Argument = "runs", teacher: str = ""
) -> None:
    """The flow `dmdr` on the cold start of another run, which has to be named. It takes the same arguments."""
    dmdr.fn(config, run, store, teacher, cold_start_of)


@flow(name="evaluate", persist_result=False, result_serializer="json")
def evaluate_with_pipelines(config: str, run: str, source_run: str, store: str) -> None:
    """Evaluate what `source_run` has sealed together with the pipelines of the config, as the run `run`.

    Raises:
        StageFailed: a stage ended without its seal.
    """
    with explain_faults("flow evaluate"):
        chain.evaluate_with_pipelines(run_stage, config, run, source_run, store)
        artifacts.publish_scorecard(run, store)


def _drop_stack(record: logging.LogRecord) -> bool:
    """Drop the stack of an error that says in one line what is wrong: the stack of the flow adds nothing."""
    if record.exc_info and isinstance(record.exc_info[1], (StageFailed, *USER_ERRORS)):
        record.exc_info = None
    return True


for logger in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(logger).addFilter(_drop_stack)
