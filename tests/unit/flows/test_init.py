"""`dmdr init`: it looks at teacher and prompts, and what it writes is a config that runs as it is."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml

from dmdr.config.families import FACTS, FAMILIES
from dmdr.config.load import load_config
from dmdr.planning.gpus import GIB, GPUS
from flows import cli
from flows.commands.first_config import FirstConfig, Rewards, Size, Source
from flows.commands.init import choose_size, find_rewards
from flows.commands.schema import SCHEMA, build_schema
from stages.store.artifacts import Artifact
from stages.store.published_teachers import publish_teacher
from tests.support.tiny_configs import PROMPTS
from tests.support.trained_run import run_stage

FAMILY_OF = {"sd3": "sd3-medium", "sdxl": "sdxl", "z_image": "z-image", "flux": "flux"}
FOUND = Rewards(("dfn-clip", "hpsv2.1"), "pickscore", ("clip-score", "pickscore", "hpsv2.1"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


def written(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> Path:
    """The file to which the output of `dmdr init` was sent."""
    assert cli.main(["init", *arguments]) == 0
    path = tmp_path / "my.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["sd3", "sdxl", "z_image", "flux"])
def test_it_writes_a_config_of_the_teacher_that_it_was_given(
    name: str, request: pytest.FixtureRequest, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = request.getfixturevalue(f"tiny_{name}_folder")
    path = written(
        [FAMILY_OF[name], "--gpu", "rtx-4090", "--teacher", str(folder), "--prompts", str(prompts)], tmp_path, capsys
    )
    config, head = load_config(path), path.read_text()
    assert (config.teacher.path, config.prompts.sources) == (str(folder), (str(prompts),))
    assert config.teacher.resolution == (16 if name in ("z_image", "flux") else None)
    assert (config.student.form, config.run) == ("lora", f"my-{FAMILY_OF[name]}")
    assert f"# yaml-language-server: $schema={SCHEMA}" in head and "NVIDIA RTX 4090" in head
    assert " MiB, by the planner" in head or " GiB, by the planner" in head
    assert not config.list_rewards("joint") and config.evaluate.seeds == 2, "no weights here, so no rewards"


@pytest.mark.slow
def test_what_it_writes_runs_to_a_scorecard(
    tiny_sdxl_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Only shortened, so that the test is. Without any reward's weights the scorecard has diversity."""
    path = written(["sdxl", "--teacher", str(tiny_sdxl_folder), "--prompts", str(prompts)], tmp_path, capsys)
    data = yaml.safe_load(path.read_text())
    for stage in ("cold_start", "joint"):
        data[stage] |= {"updates": 2, "batch_size": 2}
    path.write_text(yaml.safe_dump(data))
    config = load_config(path)
    for stage in ("prompts", "cold_start", "joint", "export"):
        run_stage(config, tmp_path / "store", stage)
    card = json.loads((run_stage(config, tmp_path / "store", "evaluate") / "scorecard.json").read_text())
    assert {row["name"] for row in card["metrics"]} == {"diversity/pixels"}
    assert {row["model"] for row in card["metrics"]} >= {"student", "teacher"}
    assert Artifact(str(tmp_path / "store"), "my-sdxl", "evaluate").record() is not None


@pytest.mark.parametrize(("family", "gpu"), [("sdxl", "rtx-4090"), ("sd35-large", "h100-80"), ("flux", "h200")])
@pytest.mark.parametrize("rewards", [FOUND, Rewards()], ids=["found", "none"])
def test_a_config_of_a_published_teacher_is_valid(family: str, gpu: str, rewards: Rewards, tmp_path: Path):
    size = choose_size(FACTS[family], GPUS[gpu])
    first = FirstConfig("mine", FACTS[family], FACTS[family].teacher, Source("prompts.txt", 0.1), rewards, size)
    path = tmp_path / "my.yaml"
    path.write_text(first.to_yaml(["head"]))
    config = load_config(path)
    assert config.precision == "bfloat16" and config.execution.gradient_checkpointing == "all"
    assert config.list_rewards("joint") == {*rewards.train, *({rewards.watch} if rewards.watch else ())}
    decoder = config.joint.rl.decoder if config.joint.rl else None
    assert decoder == (None if not rewards.train else "tiled" if GPUS[gpu].memory < 60 * GIB else "whole")


def test_each_family_has_its_facts():
    assert set(FACTS) == set(FAMILIES)
    assert Size(1, 1, 1, "float32").micro is None


@pytest.mark.parametrize(
    ("family", "teacher", "code", "told"),
    [
        ("sdxl", "sd3", 64, "of the family sd3, not sdxl: dmdr init sd3-medium or sd35-large"),
        ("z-image", "sdxl", 64, "of the family sdxl, not z-image: dmdr init sdxl"),
        ("sdxl", "owner/model", 66, "dmdr teachers resolve owner/model"),
        ("sdxl", "hub:owner/model", 64, "dmdr teachers resolve owner/model"),
        ("sdxl", "model.safetensors", 64, "is one file"),
        ("sdxl", "s3://bucket", 64, "is not PREFIX/NAME/REVISION"),
    ],
)
def test_a_teacher_of_another_kind_is_refused(
    family: str, teacher: str, code: int, told: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture
):
    path = str(request.getfixturevalue(f"tiny_{teacher}_folder")) if teacher in ("sd3", "sdxl") else teacher
    assert cli.main(["init", family, "--teacher", path]) == code
    error = capsys.readouterr()
    assert told in error.err and error.err.count("\n") == 1 and not error.out


def test_a_size_of_the_same_family_is_told_apart(tiny_sd3_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):

    folder = tmp_path / "large"
    shutil.copytree(tiny_sd3_folder, folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, "num_layers": 38}))
    assert cli.main(["init", "sd3-medium", "--teacher", str(folder)]) == 64
    assert "dmdr init sd35-large" in capsys.readouterr().err


def test_a_published_teacher_is_known_by_its_record(
    tiny_sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """It is planned as the published network of its family, which takes minutes; here in the tiny one's place."""
    made = publish_teacher(str(tiny_sd3_folder), "mine", "1", str(tmp_path / "teachers"), lambda copied, total: None)
    assert cli.main(["init", "sdxl", "--teacher", made.address]) == 64
    assert "of the family sd3, not sdxl" in capsys.readouterr().err
    tiny = dataclasses.replace(FACTS["sd3-medium"], teacher=str(tiny_sd3_folder))
    monkeypatch.setitem(FACTS, "sd3-medium", tiny)
    path = written(["sd3-medium", "--teacher", made.address], tmp_path, capsys)
    assert load_config(path).teacher.path == made.address
    assert load_config(path).prompts.sources == ("prompts.txt",) and "# Before:" in path.read_text()
    assert cli.main(["plan", str(path)]) == 0
    assert "cold_start: fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "code", "said"),
    [
        ("p.jsonl", "".join(json.dumps({"caption": text}) + "\n" for text in PROMPTS), 0, 'column: "caption"'),
        ("p.csv", "n,text\n" + "".join(f"{n},{text}\n" for n, text in enumerate(PROMPTS)), 0, 'column: "text"'),
        ("p.csv", "n,words\n1,a cat\n", 64, "has no column 'prompt', it has 'n', 'words'"),
        ("p.txt", "a cat\n", 65, "too few to hold some out"),
        ("p.docx", "a cat\n", 64, "unknown format"),
    ],
)
def test_the_prompts_are_read(
    name: str, text: str, code: int, said: str, tiny_sd3_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (tmp_path / name).write_text(text)
    arguments = ["init", "sd3-medium", "--teacher", str(tiny_sd3_folder), "--prompts", str(tmp_path / name)]
    assert cli.main(arguments) == code
    shown = capsys.readouterr()
    assert said in (shown.err if code else shown.out)


def test_rewards_are_those_whose_weights_are_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dmdr.teacher.hub.find_problem", lambda *parts: "no network")
    monkeypatch.setattr("dmdr.teacher.hub.is_cached", lambda repo, commit, file: "HPSv2" in repo or "Pick" in repo)
    assert find_rewards(few=False) == Rewards(("hpsv2.1",), "pickscore", ("pickscore", "hpsv2.1"))
    assert find_rewards(few=True) == Rewards(("hpsv2.1",), None, ("pickscore", "hpsv2.1"))
    monkeypatch.setattr("dmdr.teacher.hub.is_cached", lambda *parts: False)
    assert find_rewards(few=False) == Rewards()


def test_the_schema_that_ships_is_the_one_of_the_config():
    assert SCHEMA.read_text(encoding="utf-8") == build_schema(), f"dmdr schema > {SCHEMA}"
    schema = json.loads(build_schema())
    assert "teacher" in schema["required"] and "world" in json.dumps(schema["$defs"]["Teacher"])


def test_the_schema_says_what_the_code_says():
    sections = json.loads(build_schema())["$defs"]
    assert sections["Student"]["properties"]["ema"]["description"].startswith("highest decay of the averaged weights")
    assert sections["Execution"]["properties"]["keep_checkpoints"]["description"].startswith("at least 2, because")
    assert sections["Pods"]["properties"]["grace"]["description"].startswith("seconds between SIGTERM and SIGKILL")


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_that_ships_names_its_schema(path: Path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert (path.parent / first.removeprefix("# yaml-language-server: $schema=")).resolve() == SCHEMA.resolve()


def test_a_wheel_carries_the_configs():
    data = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    carried = {path.resolve() for pattern in data["dmdr"] for path in Path("dmdr").glob(pattern)}
    assert SCHEMA.resolve() in carried
    assert {path.resolve() for path in Path("configs").rglob("*.yaml")} <= carried
