"""Deployments against a real Prefect server, without a worker: what is started, how often, and what is refused."""

from __future__ import annotations

import time
import urllib.error
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dmdr.config.identity import identity
from dmdr.config.load import load_config
from dmdr.config.stages import STAGES
from stages.store.artifacts import Artifact
from stages.store.pointers import list_decisions
from stages.store.published_teachers import Revision, publish_teacher
from stages.store.revisions import run_name
from stages.store.runs import list_history, promote_run, undo_promotion
from tests.support import program
from tests.support.evaluated import Evaluation, seal_scores
from tests.support.prefect_server import ROOT, asked
from tests.support.sealing import PROVENANCE
from tests.support.trained_run import trained_run

pytestmark = pytest.mark.process

LAB = ROOT / "dmdr" / "lab" / "teachers"


def deployment(environment: dict[str, str], name: str) -> dict:
    return asked(environment, f"/deployments/name/{name}")


FIRE = """
import sys, threading
from flows.retrain import retrain

threads, (config, teachers, store, deployment, again, promote_as, if_better) = int(sys.argv[1]), sys.argv[2:]
failed, together = [], threading.Barrier(threads, timeout=60)

def fire():
    together.wait()
    try:
        retrain(config, teachers, store, deployment, again == "again", promote_as, if_better)
    except Exception as error:
        failed.append(f"{type(error).__name__}: {error}")

print("ready", flush=True)
sys.stdin.readline()
fires = [threading.Thread(target=fire) for _ in range(threads)]
for each in fires:
    each.start()
for each in fires:
    each.join()
sys.exit("\\n".join(failed) or None)
"""


DMDR = "import sys; from flows.cli import main; sys.exit(main())"


class Bench:
    """A store, a prefix of teachers and a config, and the fires of retrain on them."""

    def __init__(self, environment: dict[str, str], config: Path, folder: Path) -> None:
        self.environment, self.config = environment, config
        self.store, self.teachers = str(folder / "runs"), str(folder / "teachers")
        self.rule = ("", "")  # promote_as, if_better

    def publish(self, folder: Path, name: str, revision: str) -> Revision:
        return publish_teacher(str(folder), name, revision, self.teachers, lambda here, total: None)

    def fire(
        self, processes: int = 1, threads: int = 1, again: bool = False, deployment: str = "dmdr/full", fails: str = ""
    ) -> None:
        """Run the flow so many times at once: all processes wait until each of them is ready."""
        arguments = [
            str(threads),
            str(self.config),
            self.teachers,
            self.store,
            deployment,
            "again" if again else "",
            *self.rule,
        ]
        children = [program.start(FIRE, *arguments, environment=self.environment, reads=True) for _ in range(processes)]
        for child in children:
            assert child.stdout.readline() == "ready\n"
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        for child in children:
            said = "".join(child.communicate(timeout=600))
            assert (child.returncode == 0) == (not fails), said
            assert fails in said, said

    def started(self) -> list[dict]:
        """The flow runs of dmdr/full in this store, the last one first."""
        runs = [each for each in asked(self.environment, "/flow_runs/filter", {}) if "teacher" in each["parameters"]]
        ours = [each for each in runs if each["parameters"]["store"] == self.store]
        return sorted(ours, key=lambda each: each["created"], reverse=True)

    def became(self, run: str, state: str) -> None:
        """Set the last flow run of a run to a state, as a worker or a person would."""
        last = next(each for each in self.started() if each["name"] == run)
        body = {"state": {"type": state, "name": state.title()}, "force": True}
        asked(self.environment, f"/flow_runs/{last['id']}/set_state", body)

    def seal(self, run: str, made_of: Revision) -> None:
        """Every stage of a run, as if it had run."""
        for stage in STAGES:
            artifact = Artifact(self.store, run, stage)
            artifact.claim(identity(load_config(self.config), stage), {"teacher": made_of.digest})
            out = artifact.workspace()
            (out / "result").write_text("a result")
            artifact.seal(out, facts={}, provenance=PROVENANCE)


@pytest.fixture
def bench(prefect_server: dict[str, str], tiny_config: Callable[..., Path], tmp_path: Path) -> Bench:
    return Bench(prefect_server, tiny_config(), tmp_path)


def test_twenty_fires_at_once_start_three_runs_for_three_teachers(bench: Bench):
    new = [bench.publish(LAB / "flow", "lab", "1"), bench.publish(LAB / "fashion", "lab", "2")]
    new += [bench.publish(LAB / "denoising", "other", "1")]
    runs = [run_name("tiny", each) for each in new]
    bench.fire(processes=2, threads=10)
    assert Counter(each["name"] for each in bench.started()) == Counter(runs)
    given = {each["name"]: each["parameters"]["teacher"] for each in bench.started()}
    assert given == {run: each.address for run, each in zip(runs, new, strict=True)}

    # One GPU's queue: a worker that asked now would get one of these.
    soon = {"scheduled_before": "2999-01-01T00:00:00Z"}
    due = asked(bench.environment, "/work_pools/local/get_scheduled_flow_runs", soon)
    assert sum(each["flow_run"]["work_queue_name"] == "gpu" for each in due) == 1

    bench.became(runs[0], "CRASHED")
    bench.became(runs[1], "FAILED")
    bench.became(runs[2], "CRASHED")
    bench.seal(runs[2], new[2])
    bench.fire(threads=10)
    assert Counter(each["name"] for each in bench.started()) == {runs[0]: 2, runs[1]: 1, runs[2]: 1}
    bench.became(runs[0], "RUNNING")
    bench.fire(threads=5, again=True)
    assert Counter(each["name"] for each in bench.started()) == {runs[0]: 2, runs[1]: 2, runs[2]: 1}


def test_three_teachers_in_turn_move_a_name_once(bench: Bench, tmp_path: Path):
    """One better, one equal, one worse, by scores made by hand; ten fires at once decide as one does."""
    base = np.linspace(0.2, 0.7, 40)
    even = np.where(np.arange(40) % 2, 0.1, -0.1)
    prompts = [f"prompt {n}" for n in range(40)]
    promoted, config = {}, load_config(bench.config)
    for run, scores in (("base", base), ("better", base + 0.1), ("equal", base + 0.1 + even), ("worse", base - 0.1)):
        made = bench.publish(LAB / "fashion", "lab", run) if run != "base" else None
        name = run_name("tiny", made) if made else run
        promoted[run] = name
        for stage in STAGES[:-1]:
            artifact = Artifact(bench.store, name, stage)
            artifact.claim(identity(config, stage), {"teacher": made.digest if made else "0"})
            out = artifact.workspace()
            (out / "result").write_text(name)
            artifact.seal(out, facts={}, provenance=PROVENANCE)
        evaluation = Evaluation({"strict": {"student": scores, "teacher": base}}, prompts)
        claim = (identity(config, "evaluate"), {"teacher": made.digest if made else "0"})
        seal_scores(bench.store, name, tmp_path / "scratch", evaluation, claim)
    promote_run(bench.store, "base", "production")
    bench.rule = ("production", "strict")
    bench.fire(threads=10)
    assert [each.run for each in list_history(bench.store, "production")] == ["base", promoted["better"]]
    decided = {each.run: each for each in list_decisions(bench.store)}
    assert {run: decided[promoted[run]].is_promoted for run in ("better", "equal", "worse")} == {
        "better": True,
        "equal": False,
        "worse": False,
    }
    pages = [each["data"] for each in asked(bench.environment, "/artifacts/filter", {}) if each["key"] == "promotion"]
    assert any("| strict | +0.100 | +0.100 | +0.100 | 40 |" in page for page in pages)
    assert bench.started() == []

    undo_promotion(bench.store, "production")
    bench.publish(LAB / "flow", "other", "1")
    bench.fire()
    assert list_history(bench.store, "production")[-1].run == "base", "what a person took back stays back"
    (started,) = bench.started()
    assert started["parameters"]["promote"] == {"name": "production", "if_better": "strict"}


def test_what_cannot_be_started_is_said(bench: Bench, tiny_config: Callable[..., Path]):
    made = bench.publish(LAB / "fashion", "lab", "1")
    bench.fire(deployment="dmdr/none", fails="ConfigError: there is no deployment dmdr/none; prefect")
    bench.seal(run_name("tiny", made), made)
    bench.config = tiny_config(seed=4)
    bench.fire(fails="seed is 3 there, 4 here")
    assert bench.started() == []


def test_publishing_fires_the_deployment(bench: Bench):
    command = ["teachers", "publish", "lab:fashion", "--as", "new", "--to", bench.teachers]
    done = program.run(DMDR, *command, environment=bench.environment)
    assert done.returncode == 0 and "emitted teacher.published for dmdr.teacher.new" in done.stdout, done.stderr
    at, deadline = deployment(bench.environment, "retrain/on-new-teacher")["id"], time.monotonic() + 300
    while True:
        runs = asked(bench.environment, "/flow_runs/filter", {})
        fired = [each for each in runs if each["deployment_id"] == at and each["created_by"]["type"] == "AUTOMATION"]
        if fired:
            break
        assert time.monotonic() < deadline, "the event started nothing"
        time.sleep(0.3)
    assert len(fired) == 1 and fired[0]["parameters"].keys() == {"config", "teachers", "store"}


def test_what_the_schema_refuses(prefect_server: dict[str, str]):
    """At submission, with the parameter's name; so nothing is ever scheduled."""

    def refused(name: str, why: str, **parameters: object) -> None:
        path = f"/deployments/{deployment(prefect_server, name)['id']}/create_flow_run"
        with pytest.raises(urllib.error.HTTPError) as error:
            asked(prefect_server, path, {"parameters": parameters})
        assert error.value.code == 409
        assert why in error.value.read().decode()

    refused("dmdr/full", "config", config="")
    refused("dmdr/full", "store", store=3)
    refused("dmdr/full", "run", run="No Name")
    refused("dmdr/full", "cold_start_of", cold_start_of="../other")
    refused("dmdr/full", "teacher", teacher=3)
    refused("dmdr/from-cold-start", "'cold_start_of' is a required property")
    refused("retrain/on-new-teacher", "deployment", deployment="full")
    refused("retrain/on-new-teacher", "again", again="perhaps")
    refused("retrain/on-new-teacher", "promote_as", promote_as="No Name")
    refused("dmdr/full", "promote", promote={"name": "production"})


def test_what_uses_gpus_waits_for_them(prefect_server: dict[str, str]):
    for name in ("dmdr/full", "dmdr/from-cold-start", "lab-tables/tables"):
        found = deployment(prefect_server, name)
        assert found["work_queue_name"] == "gpu"
        assert found["global_concurrency_limit"]["limit"] == 1
        assert found["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    assert deployment(prefect_server, "retrain/on-new-teacher")["work_queue_name"] == "default"


FROM_COLD_START = """
import sys
from flows.distil import StageFailed, from_cold_start
try:
    from_cold_start(sys.argv[1], sys.argv[2], store=sys.argv[3], teacher=sys.argv[4])
except StageFailed as failed:
    print(failed)
"""


def test_from_cold_start_trains_on_that_of_another_run(bench: Bench, tiny_config: Callable[..., Path], tiny_sd3_folder):
    """The flow itself, up to a joint stage whose reward has no weights."""
    config = load_config(bench.config)
    trained_run(config, Path(bench.store))
    made = bench.publish(tiny_sd3_folder, "tiny", "1")
    joint = config.model_dump(mode="json")["joint"]
    joint["rl"]["rewards"] = {"hpsv2.1": 1.0}
    other = tiny_config(
        run="other",
        joint=joint,
        weights={"hpsv2.1": "/models/nowhere"},
        teacher={"path": "/models/nowhere", "guidance_scale": 3.0, "steps": 3},
    )
    done = program.run(FROM_COLD_START, "tiny", str(other), bench.store, made.address, environment=bench.environment)
    assert done.stdout.splitlines()[-1] == "joint: exit code 66", done.stdout + done.stderr
    assert "weights.hpsv2.1" in done.stderr
    for stage in ("prompts", "cold_start"):
        ours, theirs = (Artifact(bench.store, run, stage).sealed() for run in ("other", "tiny"))
        assert ours.provenance.adopted_from == "tiny" and ours.fingerprint == theirs.fingerprint
