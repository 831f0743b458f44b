"""The direction of imports is law: flows -> stages -> dmdr, inside a layer from room to room in one order, and some
libraries live in one place only."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {"dmdr": {"dmdr"}, "stages": {"dmdr", "stages"}, "flows": {"dmdr", "stages", "flows"}}
# The rooms of each layer: its folders, and each file at its root. A room imports from those before it only.
ROOMS = {
    "dmdr": [
        "errors",
        "path",
        "transfer",
        "config",
        "distributed",
        "noise",
        "losses",
        "dyna",
        "optimizers",
        "kernels",
        "backbones",
        "teacher",
        "promptset",
        "rollout",
        "rewards",
        "shared_base",
        "export",
        "lab",
        "metrics",
        "state",
        "update",
        "rl",
        "watch",
        "draws",
        "train",
        "assembly",
        "planning",
    ],
    "stages": [
        "prompt_sources",
        "store",
        "runtime",
        "live",
        "reports",
        "evaluation",
        "generation",
        "training",
        "prompts",
        "cold_start",
        "joint",
        "export",
        "evaluate",
    ],
    "flows": [
        "prefect_support",
        "launch",
        "chain",
        "promotion",
        "retrain",
        "reap",
        "distil",
        "paper_tables",
        "commands",
        "cli",
    ],
}
ENTRY = "__main__"  # imports any room of its layer; nothing imports it
ORCHESTRATION = {"prefect", "kubernetes", "kubernetes_asyncio"}
STORAGE = {"fsspec", "s3fs", "boto3", "botocore", "aiobotocore"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
VISION = {"torchvision", "open_clip", "lpips", "timm"}
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.putenv"}
MAY_USE_VISION = ("dmdr/rewards/", "dmdr/metrics/")
KNOWS_STORAGE = "stages/store/remote.py"


def breaches(root: Path) -> list[str]:
    """Every breach of the law in the tree below `root`, as "file:line what"."""
    files = sorted(path for layer in MAY_IMPORT for path in (root / layer).rglob("*.py"))
    return [f"{path.relative_to(root)}:{line} {what}" for path in files for line, what in _breaches(root, path)]


def _breaches(root: Path, path: Path) -> Iterator[tuple[int, str]]:
    name = path.relative_to(root).as_posix()
    layer = name.split("/")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for line, module in _imports(tree):
        top = module.split(".")[0]
        if top in MAY_IMPORT and top not in MAY_IMPORT[layer]:
            yield line, f"{layer} imports {module}"
        if top == layer and (upward := arrow_up(name, module)):
            yield line, upward
    for line, module in (*_imports(tree), *_attributes(tree)):
        top = module.split(".")[0]
        if top in ORCHESTRATION and layer != "flows":
            yield line, f"{module} outside flows"
        if top in STORAGE and name != KNOWS_STORAGE:
            yield line, f"{module} outside {KNOWS_STORAGE}"
        if top in VISION and not name.startswith(MAY_USE_VISION):
            yield line, f"{module} where the lab, cold start, joint and export must run without it"
        if top == "torch" and layer == "flows":
            yield line, "torch in flows"
        if module in ENVIRONMENT and layer == "dmdr":
            yield line, f"{module} in dmdr"
        if top in PICKLES or module == "torch.load":
            yield line, f"{module} anywhere"


def arrow_up(file: str, module: str) -> str | None:
    """What is wrong with `file`, of a layer, importing `module`, of the same one; None if nothing is."""
    layer, own = file.removesuffix(".py").split("/")[:2]
    other = module.split(".")[1]
    if own == other or own in (ENTRY, "__init__"):
        return None
    order = ROOMS[layer]
    for room in (own, other):
        if room not in order:
            return f"{layer}/{room} is a room that ROOMS does not have"
    return f"{layer}.{own} imports {module}" if order.index(own) < order.index(other) else None


def _imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that is imported or taken from a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "a relative import hides the arrow: pickle"


def _attributes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of attributes such as os.environ."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.lineno, f"{node.value.id}.{node.attr}"


def test_the_tree_keeps_the_law():
    assert breaches(ROOT) == []


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("dmdr/bad.py", "import stages.store.artifacts"),
        ("dmdr/deep/bad.py", "def late():\n    from flows import cli"),
        ("dmdr/losses.py", "from dmdr import update"),
        ("dmdr/config/bad.py", "from dmdr.teacher import hub"),
        ("dmdr/rewards/bad.py", "def late():\n    import dmdr.metrics.lpips"),
        ("dmdr/utils/bad.py", "from dmdr import path"),
        ("stages/store/bad.py", "from stages.reports.rendering import render_template"),
        ("stages/joint.py", "from stages import evaluate"),
        ("flows/launch/bad.py", "from flows.distil import stage"),
        ("stages/bad.py", "from flows.launch import process"),
        ("stages/bad.py", "import prefect"),
        ("dmdr/bad.py", "from kubernetes import client"),
        ("stages/prompts.py", "import fsspec"),
        ("flows/bad.py", "import s3fs"),
        ("flows/bad.py", "from torch import Tensor"),
        ("dmdr/bad.py", "import os\nhome = os.environ['HOME']"),
        ("dmdr/bad.py", "from os import getenv"),
        ("dmdr/lab/bad.py", "import torchvision.transforms"),
        ("stages/export.py", "import open_clip"),
        ("dmdr/bad.py", "import pickle"),
        ("stages/bad.py", "import torch\nstate = torch.load('x')"),
    ],
)
def test_the_law_can_fail(tmp_path: Path, file: str, code: str):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert len(breaches(tmp_path)) == 1


def circle(root: Path) -> list[str]:
    """Modules below `root` that import each other in a circle, lazily or not; empty if there is none."""
    files = {path for layer in MAY_IMPORT for path in (root / layer).rglob("*.py")}
    modules = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in files}

    def imported(path: Path) -> set[str]:
        names = {name for _, name in _imports(ast.parse(path.read_text(encoding="utf-8")))}
        return {name if name in modules else name.rpartition(".")[0] for name in names} & modules.keys()

    try:
        graphlib.TopologicalSorter({module: imported(path) for module, path in modules.items()}).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_imports_run_in_a_circle(tmp_path: Path):
    assert circle(ROOT) == []
    (tmp_path / "dmdr").mkdir()
    (tmp_path / "dmdr" / "a.py").write_text("from dmdr import b")
    (tmp_path / "dmdr" / "b.py").write_text("def late():\n    from dmdr.a import name")
    assert set(circle(tmp_path)) == {"dmdr.a", "dmdr.b"}


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `code`."""
    command = [sys.executable, "-c", f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"]
    return set(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.process
def test_flows_import_without_torch():
    names = (ROOT / "flows").rglob("*.py")
    modules = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in names]
    code = f"import {', '.join(modules)}"
    assert not loaded_after(code) & {"torch", "diffusers", "transformers"}


@pytest.mark.process
def test_training_and_lab_import_neither_torchvision_nor_prefect():
    code = "import stages.prompts, stages.cold_start, stages.joint, stages.export, dmdr.lab.build"
    # where torchvision is installed, transformers imports it without being asked
    assert not loaded_after(code) & (ORCHESTRATION | VISION - {"torchvision"})


@pytest.mark.process
def test_the_command_line_needs_no_prefect():
    code = "import flows.cli, flows.commands.run, flows.commands.store; flows.cli.name_command(['run'])"
    assert not loaded_after(code) & {"prefect", "torch"}
