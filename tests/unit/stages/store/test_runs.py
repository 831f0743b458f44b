"""`dmdr runs` and `dmdr promote`, in a folder and on S3: a promoted name means one result, or nothing."""

from __future__ import annotations

import json
import random
import shutil
import threading
from pathlib import Path

import boto3
import pytest

from dmdr.config.stages import STAGES
from dmdr.errors import ConfigError, DataError, InputMissing
from flows import cli
from stages.store.artifacts import Artifact
from stages.store.runs import follow_name, list_promoted, list_runs, promote_run
from tests.support.s3_server import BUCKET
from tests.support.sealing import PROVENANCE

METRICS = [
    {"name": name, "model": model, "mean": mean, "trained_on": name == "lab-conv"}
    for name, model, mean in (
        ("strict", "student", 0.66),
        ("strict", "teacher", 0.62),
        ("lab-conv", "student", 0.9),
        ("soft", "student", None),
    )
]


def seal(
    store: str, run: str, scratch: Path, *stages: str, content: str = "weights", teacher: str | None = None
) -> None:
    """Seal these stages of a run, each with one file."""
    for stage in stages:
        folder = scratch / f"{run}-{stage}-{content}"
        (folder / "pipeline").mkdir(parents=True)
        (folder / "pipeline" / "model_index.json").write_text(content)
        artifact = Artifact(store, run, stage)
        artifact.claim({"seed": 1}, {"teacher": "0123456789abcdef" * 4})
        provenance = PROVENANCE.model_copy(update={"teacher": teacher})
        artifact.seal(folder, facts={"metrics": METRICS} if stage == "evaluate" else {}, provenance=provenance)


def delete(store: str, run: str) -> None:
    if not store.startswith("s3://"):
        shutil.rmtree(Path(store, run))
        return
    bucket = boto3.resource("s3").Bucket(BUCKET)
    bucket.objects.filter(Prefix=f"{store.removeprefix(f's3://{BUCKET}/')}/{run}/").delete()


def test_a_promoted_name_is_pulled_and_can_move(store, tmp_path, capsys):
    for run in ("one", "two"):
        seal(store, run, tmp_path / "scratch", "export", content=f"weights of {run}")
    for run, before in (("one", None), ("two", "one")):
        assert cli.main(["promote", run, "--as", "production", "--store", store]) == 0
        assert (f"before {before}" in capsys.readouterr().out) == bool(before)
        folder = tmp_path / f"weights of {run}"
        assert cli.main(["pull", "production", "export", "--form", "pipeline", str(folder), "--store", store]) == 0
        assert f"production is run {run}" in capsys.readouterr().out
        assert (folder / "pipeline" / "model_index.json").read_text() == f"weights of {run}"
    pointer = list_promoted(store)["production"]
    assert pointer.run == "two" and pointer.before.run == "one"
    assert pointer.fingerprint == Artifact(store, "two", "export").sealed().fingerprint
    assert cli.main(["status", "production", "--store", store]) == 0
    assert f"{store}/two/export" in capsys.readouterr().out


def test_a_name_that_would_mislead_is_refused(store, tmp_path, capsys):
    seal(store, "one", tmp_path, "prompts", "export")
    seal(store, "early", tmp_path, "prompts")
    for run, name, error, said in (
        ("one", "one", ConfigError, "one is the name of a run"),
        ("one", "early", ConfigError, "early is the name of a run"),
        ("one", "../up", ConfigError, "at most 63 of them.*for example up"),
        ("early", "production", InputMissing, "export of run early is not sealed"),
        ("nobody", "production", InputMissing, "export of run nobody is not sealed"),
    ):
        with pytest.raises(error, match=said):
            promote_run(store, run, name)
    assert cli.main(["promote", "one", "--as", "early", "--store", store]) == 64
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list_promoted(store) == {}


def test_a_name_never_comes_to_mean_another_result(store, tmp_path, capsys):
    seal(store, "one", tmp_path, "export", content="first")
    promote_run(store, "one", "production")
    delete(store, "one")
    pull = ["pull", "production", "export", str(tmp_path / "here"), "--store", store]
    assert cli.main(pull) == 66
    assert "which is gone" in capsys.readouterr().err
    seal(store, "one", tmp_path, "export", content="second")
    assert cli.main(pull) == 65
    assert "now; dmdr promote RUN --as production" in capsys.readouterr().err
    promote_run(store, "one", "production")
    seal(store, "production", tmp_path, "export")
    assert cli.main(pull) == 64
    assert "production is the name of a run" in capsys.readouterr().err
    assert not (tmp_path / "here").exists()


def test_a_pointer_is_whole_whoever_writes_it(store, tmp_path):
    """Four writers and a reader: every look finds one of the two promoted results, never half a file."""
    for run in ("one", "two"):
        seal(store, run, tmp_path, "export", content=run)
    promote_run(store, "one", "production")
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    choices = [random.Random(seed + n).choices(["one", "two"], k=3) for n in range(3)]
    failed: list[BaseException] = []

    def write(runs: list[str]) -> None:
        try:
            for run in runs:
                promote_run(store, run, "production")
        except BaseException as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(runs,)) for runs in choices]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(follow_name(store, "production"))
    for writer in writers:
        writer.join()
    assert not failed and seen <= {"one", "two"}
    assert list(list_promoted(store)) == ["production"]


def test_a_pointer_of_somebody_else_is_said(tmp_path):
    store = tmp_path / "runs"
    seal(str(store), "one", tmp_path, "export")
    (store / "_promoted").mkdir()
    for content in ("{", "[]", "{}", json.dumps({"schema": 99, "run": "one", "fingerprint": "", "promoted_at": ""})):
        (store / "_promoted" / "production.json").write_text(content)
        with pytest.raises(DataError, match="was not written by this DMDR"):
            follow_name(str(store), "production")


def test_runs_shows_teacher_progress_scores_and_names(store, tmp_path, capsys):
    assert cli.main(["runs", "--store", store]) == 0
    assert capsys.readouterr().out == f"no runs at {store}\n"
    seal(store, "done", tmp_path, *STAGES, teacher="lab:flow")
    seal(store, "begun", tmp_path, "prompts", "cold_start")
    Artifact(store, "claimed", "prompts").claim({"seed": 1}, {})
    promote_run(store, "done", "production")
    promote_run(store, "done", "best")
    assert list_runs(store) == ["begun", "claimed", "done"]
    assert cli.main(["runs", "--store", store]) == 0
    *lines, total = capsys.readouterr().out.splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows == [
        ["begun", "sha256 0123456789ab…", "to cold_start", "", "2 CPU-seconds", ""],
        ["claimed", "", "nothing yet", "", "", ""],
        ["done", "lab:flow", "all", "strict 0.660 (+0.040)", "5 CPU-seconds", "best, production"],
    ]
    assert total == "all runs: 7 CPU-seconds"
