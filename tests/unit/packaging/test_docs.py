"""The documents name what there is: every file of the code in the tree, and only files and targets that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/architecture.md")
LAYERS = ("dmdr", "stages", "flows")
LINE = re.compile(r"(?P<indent> *)(?P<name>\w+(?:/|\.py)) {2,}\S")  # of the tree: a room or a file, then its words
FOLDERS = "dmdr|stages|flows|tests|configs|docs|images|k8s"
MENTION = re.compile(
    rf"`((?:{FOLDERS})/(?:[\w./-]*(?:\.\w+|/))?)`|\]\((?!https?:)([^)#]+)\)"
)  # not dmdr/full, a deployment


def files_of_tree(text: str) -> list[str]:
    """The Python files that the tree of docs/architecture.md names, as paths."""
    block = next(each for each in re.findall(r"```\n(.*?)```", text, re.DOTALL) if each.startswith("dmdr/"))
    found, rooms = [], []
    for line in filter(None, block.splitlines()):
        match = LINE.match(line)
        assert match, f"neither a room nor a file with its words: {line}"
        depth = len(match["indent"]) // 2
        rooms = [*rooms[:depth], match["name"]]
        if match["name"].endswith(".py"):
            found.append("".join(rooms))
    return found


def test_the_tree_has_every_file():
    files = [path for layer in LAYERS for path in (ROOT / layer).rglob("*.py") if path.name != "__init__.py"]
    tree = files_of_tree((ROOT / "docs/architecture.md").read_text(encoding="utf-8"))
    assert sorted(tree) == sorted(path.relative_to(ROOT).as_posix() for path in files), "amend docs/architecture.md"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_is_named_exists(document: str):
    text = (ROOT / document).read_text(encoding="utf-8")
    names = {path or str(Path(document).parent / link) for path, link in MENTION.findall(text)}
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_target_exists(document: str):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?m)^([a-z0-9-]+):", makefile))
    text = (ROOT / document).read_text(encoding="utf-8")
    assert set(re.findall(r"(?:`|^|\s)make ([a-z][a-z0-9-]+)(?=`|\s+#|$)", text, re.MULTILINE)) <= targets
