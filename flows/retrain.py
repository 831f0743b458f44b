"""The flow `retrain`: a run of dmdr/full for each revision of a teacher that has no finished run of a config.

1. It may start as often as it likes, several times at once. The name of a run is a function of the config's run name,
   the teacher and its revision. Prefect makes only one flow run for an idempotency key: that name and its store.
2. The store says what is finished. Prefect says only what is running: if it has lost everything, a run is started once
   more, finds what is sealed, and continues.
3. A run that crashed (its machine or its worker died) is started again the next time, and continues where it stopped. A
   run that failed or was cancelled has been judged, by a stage or by a person: only `again` starts it again.
4. With `promote_as`, each run is judged once when it is finished, and gets the name if it is better than the run that
   has it (`flows.promotion`). A run that ended between its seal and its judgement is judged the next time.
5. A config that was changed under the same run name is refused, as everywhere: give it another `run`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.runtime import deployment as of_deployment
from pydantic import Field

from dmdr.config.identity import identity
from dmdr.config.load import load_config
from dmdr.config.names import NAME
from dmdr.config.run import Config
from dmdr.config.section import Argument
from dmdr.config.stages import STAGES
from dmdr.errors import USER_ERRORS, ConfigError
from flows.launch import given_config, process
from flows.launch.failure import StageFailed, explain_faults
from flows.prefect_support.decisions import show_decision
from flows.promotion import Rule, build_rule, promote
from stages.store.artifacts import Artifact
from stages.store.pointers import find_decision
from stages.store.revisions import list_revisions, run_name

JUDGED = (StateType.FAILED, StateType.CANCELLED)
PerhapsName = Annotated[str, Field(pattern=rf"^$|{NAME}")]
Deployment = Annotated[str, Field(pattern=r"^[^/]+/[^/]+$")]


@flow(name="retrain", persist_result=False, result_serializer="json")
def retrain(
    config: Argument,
    teachers: Argument,
    store: Argument = "runs",
    deployment: Deployment = "dmdr/full",
    again: bool = False,
    promote_as: PerhapsName = "",
    if_better: str = "",
) -> None:
    """Start the runs that are missing, and wait for none of them.

    Args:
        config: as that of the flow dmdr; its teacher.path stands for each teacher in turn
        teachers: a prefix where teachers are published, s3://bucket/teachers, or hub:OWNER/NAME
        store: where artifacts lie, a folder or any fsspec URL such as s3://bucket/prefix
        deployment: of the flow dmdr, FLOW/DEPLOYMENT
        again: also start the runs that failed or were cancelled
        promote_as: a name that each run gets if it is better than the run that has it, such as production; empty: none
        if_better: the metrics that decide about that, with commas

    Raises:
        ConfigError: the config, the rule or the deployment is wrong, or a run was made with other settings than the
            config's.
        InputMissing, StoreError: the teachers cannot be listed.
    """
    with explain_faults("flow retrain"):
        say, rule = get_run_logger().info, build_rule(promote_as, if_better)
        with given_config.open_config(config, say, wait=given_config.WAIT if of_deployment.id else 0.0) as path:
            checked = load_config(path)
            revisions = list_revisions(teachers)
            if not revisions:
                say(f"no teachers at {teachers}")
            for revision in revisions:
                run = run_name(checked.run, revision)
                # before the store is read: a run that ends in between is finished there
                before = find_latest(f"{store}/{run}")
                state = None if before is None else before.state
                is_running = state is not None and not state.is_final()
                if is_finished(checked, run, store, revision.known_as):
                    say(f"{run}: finished")
                    if rule is not None and not is_running:
                        judge_finished(rule, run, store, path, revision.address, say)
                elif state is not None and is_running:
                    say(f"{run}: under way, {state.name}")
                elif state is not None and state.type in JUDGED and not again:
                    say(f"{run}: {state.name}; with again=true it is started again")
                else:
                    parameters: dict[str, object] = {
                        "config": config,
                        "run": run,
                        "store": store,
                        "teacher": revision.address,
                    }
                    if rule is not None:
                        parameters["promote"] = rule.model_dump()
                    say(f"{run}: of {revision.address}, flow run {start_run(deployment, parameters, before).id}")


def judge_finished(rule: Rule, run: str, store: str, config: str, teacher: str, say: Callable[[str], None]) -> None:
    """Judge a finished run for a name, unless it was. What keeps one run from it is said, and keeps no other."""
    try:
        fingerprint = Artifact(store, run, "export").sealed().fingerprint
        if find_decision(store, rule.name, run, fingerprint) is not None:
            return
        show_decision(store, promote(process.run_stage, rule, run, store, config, teacher), say)
    except (StageFailed, *USER_ERRORS) as error:
        say(f"{run}: not judged for {rule.name}: {error}")


def find_latest(tag: str) -> FlowRun | None:
    """The last flow run that was started for a run in a store."""
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[tag])),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=1,
        )
    return next(iter(runs), None)


def is_finished(config: Config, run: str, store: str, known_as: tuple[str, ...]) -> bool:
    """Whether the last stage of a run is sealed. known_as: digests of the teacher, where they are known.

    Raises:
        ConfigError: a stage was sealed with other settings, or of another teacher.
    """
    artifacts = {stage: Artifact(store, run, stage) for stage in STAGES}
    sealed = {stage: record for stage, artifact in artifacts.items() if (record := artifact.record()) is not None}
    for stage, record in sealed.items():
        is_of_it = not known_as or record.teacher_digest in known_as
        inputs = record.inputs if is_of_it else {**record.inputs, "teacher": known_as[0]}
        artifacts[stage].claim(identity(config, stage), inputs)  # it is sealed, so this only compares
    return STAGES[-1] in sealed


def start_run(deployment: str, parameters: dict[str, object], before: FlowRun | None) -> FlowRun:
    """The flow run that follows `before`. All who have seen the same `before` get the same flow run.

    Raises:
        ConfigError: there is no such deployment.
    """
    tag = f"{parameters['store']}/{parameters['run']}"
    key = tag if before is None else f"{tag} after {before.id}"
    with get_client(sync_client=True) as client:
        try:
            target = client.read_deployment_by_name(deployment)
        except ObjectNotFound as error:
            raise ConfigError(f"there is no deployment {deployment}; prefect --no-prompt deploy --all") from error
        return client.create_flow_run_from_deployment(
            target.id, parameters=parameters, name=str(parameters["run"]), tags=[tag], idempotency_key=key
        )
