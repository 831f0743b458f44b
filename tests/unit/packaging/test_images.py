"""The images' recipes, without building them; `make image-test` builds and runs them (tests/images/for_real.py)."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
IMAGES = ROOT / "images"
RECIPES = sorted(IMAGES.glob("*.Containerfile"))
# An import is tried with every package unimportable that the image has not.
IMPORTS = """
import ast, importlib, pathlib, re, sys
from importlib import metadata

normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()
held = {normal(line.partition("==")[0]) for line in sys.stdin} | {"dmdr"}
owners = metadata.packages_distributions()
absent = {name for name, packages in owners.items() if not held & {normal(package) for package in packages}}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r} in the image")

sys.meta_path.insert(0, Absent())
for file in sorted(pathlib.Path("flows").rglob("*.py")):
    module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
    importlib.import_module(module)
    for node in ast.walk(ast.parse(file.read_text())):  # at whatever depth
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name.startswith(ELSEWHERE):
                continue
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name != name:  # not a module, but something in one
                    raise
                importlib.import_module(name.rpartition(".")[0])
for name in PROGRAMS:
    importlib.import_module(name)
"""
# What a flow imports only for what the flow image does not do: plans, first configs, dry runs, checks, short runs,
# signals of RL, exports, images of a student, the lab's teachers, pages of tables and of runs, a Prefect server.
ELSEWHERE = (
    "dmdr.planning.plan",
    "dmdr.planning.meta",
    "dmdr.planning.prompts",
    "dmdr.planning.text_encoders",
    "dmdr.planning.first_images",
    "dmdr.planning.trial",
    "dmdr.planning.short_runs",
    "dmdr.planning.signal",
    "dmdr.metrics.verifier",
    "dmdr.draws",
    "dmdr.rl.algorithms",
    "dmdr.promptset",
    "dmdr.assembly",
    "dmdr.metrics.load",
    "dmdr.rewards.load",
    "dmdr.rewards.kit",
    "dmdr.rewards.own",
    "dmdr.rewards.server",
    "dmdr.metrics.verifier",
    "dmdr.lab.prompts",
    "dmdr.rl",
    "stages.training",
    "stages.runtime.device",
    "stages.runtime.prompt_inputs",
    "stages.runtime.provenance",
    "stages.reports.broken_images",
    "stages.reports.stability_map",
    "stages.prompt_sources.counting",
    "stages.prompts",
    "stages.export",
    "stages.generation",
    "stages.reports.gallery",
    "stages.reports.live_page",
    "dmdr.lab.build",
    "stages.reports.tables.page",
    "stages.reports.comparison",
    "prefect.server.api.server",
)
# What else runs there: Prefect's commands and its worker, stages that are sealed already, S3, the hub, the cluster.
PROGRAMS = (
    "prefect.cli.worker",
    "prefect.cli.deploy",
    "prefect.cli.deployment",
    "prefect.cli.work_pool",
    "prefect.cli.automation",
    "prefect.workers.process",
    "prefect.workers.server",
    "prefect.flow_engine",
    "stages.__main__",
    "s3fs",
    "huggingface_hub.hf_api",
    "kubernetes.client.api.batch_v1_api",
)


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its arguments) of a Containerfile."""
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    return [(verb.upper(), rest.strip()) for verb, _, rest in (line.partition(" ") for line in lines if line.strip())]


def faults(text: str, admitted: list[str]) -> list[str]:
    """What is wrong with a Containerfile, in words.

    admitted: patterns of the files that a build may see.
    """
    found, steps = [], instructions(text)
    if not re.fullmatch(r"BASE_IMAGE=\S+", dict(steps[:1]).get("ARG", "")):
        found.append("does not begin with ARG BASE_IMAGE=default")
    stages, user = {"${BASE_IMAGE}"}, ""
    for verb, rest in steps:
        if verb == "FROM":
            base, _, name = rest.partition(" AS ")
            if base not in stages:
                found.append(f"FROM {base} is neither the base nor a stage of its own")
            user = user if base != "${BASE_IMAGE}" else ""
            stages.add(name)
        if verb == "USER":
            user = rest
        found += faults_of_step(verb, rest, admitted)
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", user):
        found.append(f"its last USER is {user or 'root'}, not UID:GID of somebody but root")
    if not {"ENTRYPOINT", "CMD"} & {verb for verb, _ in steps}:
        found.append("starts nothing")
    locks = re.findall(r"install\.sh packages (\S+)", text)
    if not locks or not all((IMAGES / lock).is_file() for lock in locks):
        found.append("does not install one of images/*.lock")
    return found


def faults_of_step(verb: str, rest: str, admitted: list[str]) -> list[str]:
    """What is wrong with one instruction, whatever stands around it."""
    found = []
    if verb == "ADD":
        found.append("ADD fetches and unpacks; COPY does not")
    if "://" in rest or re.search(r"\b(curl|wget)\b", rest):
        found.append(f"an address or a download: {rest}")
    if verb in ("ENTRYPOINT", "CMD") and not rest.startswith("["):
        found.append(f"{verb} is run by a shell, which keeps SIGTERM to itself")
    if verb == "COPY" and not rest.startswith("--from="):
        found += [
            f"COPY {source}, which .dockerignore keeps out"
            for source in copied(rest)
            if not any(fnmatch.fnmatch(source, pattern) for pattern in admitted)
        ]
    return found


def copied(rest: str) -> list[str]:
    """The sources of a COPY from the build's context."""
    return rest.split()[:-1]


def admitted() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")][0] == "*", "all is out that is not let in by name"
    return [line[1:] for line in lines if line.startswith("!")]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_sound(recipe: Path) -> None:
    assert faults(recipe.read_text(encoding="utf-8"), admitted()) == []


@pytest.mark.parametrize(
    ("right", "wrong", "why"),
    [
        ("ARG BASE_IMAGE=python:3.11-slim-bookworm", "ARG BASE_IMAGE", "ARG BASE_IMAGE=default"),
        ("FROM ${BASE_IMAGE} AS flow", "FROM debian AS flow", "FROM debian"),
        ("USER 10001:10001\n", "", "USER is root"),
        ("USER 10001:10001", "USER dmdr", "USER is dmdr"),
        ("USER 10001:10001", "USER 0:0", "USER is 0:0"),
        ("COPY configs configs", "ADD configs configs", "ADD"),
        ("COPY configs configs", "COPY runs runs", "COPY runs"),
        ("RUN sh install.sh project", "RUN curl example.org | sh", "a download"),
        ("RUN sh install.sh project", "RUN pip install --index-url https://example.org x", "an address"),
        ('CMD ["prefect", "worker", "start", "--pool", "local"]', "CMD prefect worker start", "SIGTERM"),
        ('CMD ["prefect", "worker", "start", "--pool", "local"]\n', "", "starts nothing"),
        ("packages flow.lock", "packages other.lock", "images/*.lock"),
    ],
)
def test_the_lint_can_fail(right: str, wrong: str, why: str) -> None:
    text = (IMAGES / "flow.Containerfile").read_text(encoding="utf-8")
    assert right in text
    said = faults(text.replace(right, wrong), admitted())
    assert len(said) == 1 and why in said[0], said


def test_a_build_sees_what_it_copies_and_nothing_else() -> None:
    copies = [rest for recipe in RECIPES for verb, rest in instructions(recipe.read_text()) if verb == "COPY"]
    sources = {source for rest in copies if not rest.startswith("--from=") for source in copied(rest)}
    assert {pattern for pattern in admitted() if not fnmatch.filter(sources, pattern)} == set()
    assert {source for source in sources if not (ROOT / source).exists()} == set()


def test_no_script_names_an_address() -> None:
    for file in (*IMAGES.glob("*.sh"), *IMAGES.glob("*.lock"), ROOT / ".dockerignore"):
        assert "://" not in file.read_text(encoding="utf-8"), file


def test_a_stage_is_the_process_that_gets_sigterm() -> None:
    steps = instructions((IMAGES / "stages.Containerfile").read_text(encoding="utf-8"))
    assert [json.loads(rest) for verb, rest in steps if verb == "ENTRYPOINT"] == [["python", "-m", "stages"]]


@pytest.mark.process
@pytest.mark.parametrize(
    ("there", "headers", "installed"),
    [
        (["g++"], True, None),
        ([], True, "g++ libc6-dev"),
        (["g++"], False, "libpython3-dev"),
        ([], False, "g++ libc6-dev libpython3-dev"),
    ],
)
def test_the_training_image_gets_what_its_base_lacks_to_compile(
    tmp_path: Path, there: list[str], headers: bool, installed: str | None
) -> None:
    steps = instructions((IMAGES / "stages.Containerfile").read_text(encoding="utf-8"))
    stage = [index for index, (verb, _) in enumerate(steps) if verb == "FROM"]
    ours = steps[next(each for each in stage if steps[each][1].endswith(" AS stages")) :]
    assert [rest for verb, rest in ours if verb == "RUN" and "install.sh compiler" in rest]

    programs = tmp_path / "bin"
    programs.mkdir()
    if headers:
        (tmp_path / "Python.h").touch()
    written = dict.fromkeys(there, "") | {
        "python3": f"echo {tmp_path}",
        "apt-get": f'echo "$@" >>{tmp_path}/asked',
        "rm": "",
    }
    for name, line in written.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    shell = shutil.which("sh")
    subprocess.run([shell, IMAGES / "install.sh", "compiler"], env={"PATH": str(programs)}, check=True)
    asked = tmp_path / "asked"
    last = asked.read_text().splitlines()[-1] if asked.exists() else None
    assert last == (installed and f"install -q -y --no-install-recommends {installed}")


@pytest.mark.parametrize(
    "lock", [ROOT / "requirements.lock", *sorted(IMAGES.glob("*.lock"))], ids=lambda path: path.name
)
def test_every_package_of_a_lock_has_hashes(lock: Path) -> None:
    entries = re.split(r"(?m)^(?=\S)", lock.read_text(encoding="utf-8"))[1:]
    assert len(entries) > 10
    assert [
        each for each in entries if not re.fullmatch(r"\S+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+\n", each)
    ] == []


@pytest.mark.process
def test_the_locks_follow_from_requirements_lock(tmp_path: Path) -> None:
    command = [sys.executable, "images/lock.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr

    shutil.copytree(IMAGES, tmp_path / "images")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    (tmp_path / "requirements.lock").write_text(re.sub(r"(?m)^prefect==.*", "prefect==3.0.0", lock), encoding="utf-8")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.startswith("images/flow.lock does not follow") and "stages.lock" not in done.stdout
    (tmp_path / "requirements.lock").write_text(re.sub(r"(?m)^prefect==.*\n", "", lock), encoding="utf-8")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "needs prefect, not in requirements.lock" in done.stderr


def imports(lock: str) -> subprocess.CompletedProcess[str]:
    code = f"ELSEWHERE, PROGRAMS = {ELSEWHERE!r}, {PROGRAMS!r}\n{IMPORTS}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, input=lock, capture_output=True, text=True)


@pytest.mark.process
def test_the_flow_image_has_all_that_flows_import() -> None:
    lock = (IMAGES / "flow.lock").read_text(encoding="utf-8")
    done = imports(lock)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"(?m)^(torch|diffusers|sqlalchemy)\b", lock)

    done = imports(re.sub(r"(?m)^uvicorn==.*\n", "", lock))
    assert done.returncode == 1 and "'uvicorn' in the image" in done.stderr, "the test can fail"
