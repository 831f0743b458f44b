"""The flow `dmdr`: prompts, cold start, joint training, export, evaluation.

1. Truth is in the store: a stage is done when it exited with 0 and its seal is there. Prefect's results and cache are
   off, so Prefect may lose everything and nothing is lost.
2. Running the flow again is how it goes on: a sealed stage says so and stops, an open one resumes.
3. Exit codes decide about retries. Bad config, bad data and missing inputs stay bad: they are never tried again.
4. A run that a deployment started writes the stages' lines to its Prefect log. Started by hand, the stages write to the
   terminal themselves, and a progress bar stays a bar.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import deployment
from prefect.tasks import Task
from pydantic import Field

from dmdr.config import NAME, Address
from dmdr.config_file import load
from flows import publish
from flows.launch import process
from stages.artifacts import Artifact

FINAL = (64, 65, 66)  # config, data, missing input (sysexits.h)
UNSEALED = 70  # our own code for a stage that claims success and left no seal
RETRY_DELAYS = [2, 10, 30]  # seconds
Run = Annotated[str, Field(pattern=NAME)]  # refused when a run is asked for, not when it begins


class StageFailed(RuntimeError):
    """A stage ended without its seal. code: its exit code."""

    def __init__(self, stage: str, code: int, why: str) -> None:
        super().__init__(f"{stage}: {why}")
        self.code = code


def worth_a_retry(task: Task, task_run: TaskRun, state: State) -> bool:
    """Prefect's retry condition: everything but the stage's own verdict that its input is bad. Says so."""
    failure = state.result(raise_on_failure=False)
    again = isinstance(failure, StageFailed) and failure.code not in FINAL
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
def stage(name: str, config: str, run: str, store: str, options: tuple[str, ...] = ()) -> None:
    """Run one stage to its seal. options: more of `python -m stages`.

    Raises:
        StageFailed: it exited with another code than 0, or its seal is missing.
    """
    command = [sys.executable, "-m", "stages", name, "--config", config, "--run", run, "--store", store, *options]
    code = process.run(command, say=get_run_logger().info if deployment.id else None)
    if code:
        raise StageFailed(name, code, f"exit code {code}")
    if Artifact(store, run, name).record() is None:
        raise StageFailed(name, UNSEALED, f"exit code 0, but nothing is sealed at {Artifact(store, run, name).address}")


@flow(name="dmdr", persist_result=False, result_serializer="json")
def dmdr(
    config: Address, run: Run | None = None, store: Address = "runs", teacher: Address | None = None,
    cold_start_of: Run | None = None,
) -> None:  # fmt: skip
    """Distil the teacher of a config file into its student, and score it.

    Args:
        config: path of the YAML file
        run: name of the run; the config's own name if not given
        store: where artifacts lie, a folder or any fsspec URL such as s3://bucket/prefix
        teacher: in the place of the config's teacher.path; what dmdr teachers published, by its address, will do too
        cold_start_of: a run of the same store whose prompts and cold start are copied, as they suit this config
    """
    run = run or load(config).run
    own = ("--teacher", teacher) if teacher else ()
    copied = ("--adopt", cold_start_of) if cold_start_of else ()
    stage("prompts", config, run, store, own + copied)
    stage("cold_start", config, run, store, own + copied)
    stage("joint", config, run, store, own)
    stage("export", config, run, store, own)
    stage("evaluate", config, run, store, own)
    publish.scorecard(run, store)


@flow(name="dmdr", persist_result=False, result_serializer="json")
def from_cold_start(
    cold_start_of: Run, config: Address, run: Run | None = None, store: Address = "runs", teacher: Address | None = None
) -> None:
    """`dmdr` on the cold start of another run, which has to be named. Args: as there."""
    dmdr.fn(config, run, store, teacher, cold_start_of)


def _without_stack(record: logging.LogRecord) -> bool:
    """A failed stage has said why in its own lines; the stack of the flow that started it adds nothing."""
    if record.exc_info and isinstance(record.exc_info[1], StageFailed):
        record.exc_info = None
    return True


for runs in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(runs).addFilter(_without_stack)
