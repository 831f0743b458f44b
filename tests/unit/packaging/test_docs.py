"""The documents name what there is: every file of the code in the tree, and only files, links, targets that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.scripts.reference import FOLDER, PAGES

ROOT = Path(__file__).parents[3]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    *(str(each.relative_to(ROOT)) for each in sorted(ROOT.glob("docs/**/*.md"))),
)
LAYERS = ("dmdr", "stages", "flows")
LINE = re.compile(r"(?P<indent> *)(?P<name>\w+(?:/|\.py)) {2,}\S")  # of the tree: a room or a file, then its words
FOLDERS = "dmdr|stages|flows|tests|configs|docs|images|k8s"
MENTION = re.compile(rf"`((?:{FOLDERS})/(?:[\w./-]*(?:\.\w+|/))?)`")  # not dmdr/full, a deployment
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")
FRONT_PAGE = 8 * 1024  # bytes
PICTURE = 150 * 1024


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


def anchors_of(path: Path) -> set[str]:
    """The anchors that GitHub and the site make of a page's headings."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_tree_has_every_file():
    files = [path for layer in LAYERS for path in (ROOT / layer).rglob("*.py") if path.name != "__init__.py"]
    tree = files_of_tree((ROOT / "docs/architecture.md").read_text(encoding="utf-8"))
    assert sorted(tree) == sorted(path.relative_to(ROOT).as_posix() for path in files), "amend docs/architecture.md"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_is_named_exists(document: str):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert [name for name in sorted(set(MENTION.findall(text))) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str):
    """Relative links lead to files, and what stands behind # to a heading there."""
    path = ROOT / document
    for link, anchor in LINK.findall(path.read_text(encoding="utf-8")):
        target = (path.parent / link).resolve() if link else path
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), f"{link}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_target_exists(document: str):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?m)^([a-z0-9-]+):", makefile))
    text = (ROOT / document).read_text(encoding="utf-8")
    assert set(re.findall(r"(?:`|^|\s)make ([a-z][a-z0-9-]+)(?=`|\s+#|$)", text, re.MULTILINE)) <= targets


@pytest.mark.parametrize("page", PAGES)
def test_the_references_are_those_of_the_code(page: str):
    assert (FOLDER / page).read_text(encoding="utf-8") == PAGES[page](), "run make reference"


def test_every_page_is_in_the_menu_of_the_site():
    menu = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert menu == {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}


def test_the_front_page_is_short_and_its_pictures_are_light():
    assert len((ROOT / "README.md").read_bytes()) <= FRONT_PAGE
    assert [each.name for each in ROOT.glob("docs/pictures/*.png") if each.stat().st_size > PICTURE] == []
