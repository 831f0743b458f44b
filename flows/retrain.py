"""The flow `retrain`: a run of dmdr/full for each revision of a teacher that has no finished run of a config.

1. It may fire as often as it likes, all at once. The name of a run is a function of the config's run name, the teacher
   and its revision, and Prefect makes one flow run of an idempotency key, which is that name and its store.
2. What is finished is read in the store. Prefect is asked only what is under way: if it has lost everything, a run is
   started once more, finds what is sealed, and goes on.
3. A run that crashed (its machine or its worker died) is started again, from where it stopped, by the next fire. One
   that failed or was cancelled has been judged, by a stage or by a person: that is started again only with `again`.
4. A config that was changed under the same run name is refused, as everywhere: give it another `run`.
"""

from __future__ import annotations

from typing import Annotated

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from pydantic import Field

from dmdr.config.identity import identity
from dmdr.config.load import load_config
from dmdr.config.run import Address, Config
from dmdr.config.stages import STAGES
from dmdr.errors import ConfigError
from stages.store.artifacts import Artifact
from stages.store.revisions import list_revisions, run_name

JUDGED = (StateType.FAILED, StateType.CANCELLED)
Deployment = Annotated[str, Field(pattern=r"^[^/]+/[^/]+$")]


@flow(name="retrain", persist_result=False, result_serializer="json")
def retrain(
    config: Address,
    teachers: Address,
    store: Address = "runs",
    deployment: Deployment = "dmdr/full",
    again: bool = False,
) -> None:
    """Start what is missing, and wait for none of it.

    Args:
        config: path of the YAML file; its teacher.path stands for each teacher in turn
        teachers: a prefix where teachers are published, s3://bucket/teachers, or hub:OWNER/NAME
        store: where artifacts lie, a folder or any fsspec URL such as s3://bucket/prefix
        deployment: of the flow dmdr, FLOW/DEPLOYMENT
        again: whether to start runs again that failed or were cancelled

    Raises:
        ConfigError: the config, the deployment, or a run that was made with other settings than the config's.
        InputMissing, StoreError: the teachers cannot be listed.
    """
    say, checked = get_run_logger().info, load_config(config)
    found = list_revisions(teachers)
    if not found:
        say(f"no teachers at {teachers}")
    for each in found:
        run = run_name(checked.run, each)
        before = find_latest(f"{store}/{run}")  # asked before the store: what ends in between is finished there
        state = None if before is None else before.state
        if is_finished(checked, run, store, each.digest):
            say(f"{run}: finished")
        elif state is not None and not state.is_final():
            say(f"{run}: under way, {state.name}")
        elif state is not None and state.type in JUDGED and not again:
            say(f"{run}: {state.name}; with again=true it is started again")
        else:
            parameters = {"config": config, "run": run, "store": store, "teacher": each.address}
            say(f"{run}: of {each.address}, flow run {start_run(deployment, parameters, before).id}")


def find_latest(tag: str) -> FlowRun | None:
    """The last flow run that was started for a run in a store."""
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[tag])),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=1,
        )
    return next(iter(runs), None)


def is_finished(config: Config, run: str, store: str, digest: str | None) -> bool:
    """Whether the last stage of a run is sealed.

    digest: of the teacher, where it is known.

    Raises:
        ConfigError: a stage was sealed with other settings, or of another teacher.
    """
    artifacts = {stage: Artifact(store, run, stage) for stage in STAGES}
    sealed = {stage: record for stage, artifact in artifacts.items() if (record := artifact.record()) is not None}
    for stage, record in sealed.items():
        inputs = record.inputs if digest is None else {**record.inputs, "teacher": digest}
        artifacts[stage].claim(identity(config, stage), inputs)  # it is sealed, so this only compares
    return STAGES[-1] in sealed


def start_run(deployment: str, parameters: dict[str, str], before: FlowRun | None) -> FlowRun:
    """The flow run after `before`, which everyone who has seen the same `before` gets.

    Raises:
        ConfigError: there is no such deployment.
    """
    tag = f"{parameters['store']}/{parameters['run']}"
    key = tag if before is None else f"{tag} after {before.id}"
    with get_client(sync_client=True) as client:
        try:
            found = client.read_deployment_by_name(deployment)
        except ObjectNotFound as error:
            raise ConfigError(f"there is no deployment {deployment}; prefect --no-prompt deploy --all") from error
        return client.create_flow_run_from_deployment(
            found.id, parameters=parameters, name=parameters["run"], tags=[tag], idempotency_key=key
        )
