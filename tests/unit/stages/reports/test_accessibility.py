"""What a machine can check of WCAG on the pages of one run and of several; test_page.py measures their contrast."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from flows import cli
from stages.reports.broken_images import BrokenImages
from stages.reports.explorer import Prompt
from stages.reports.gallery import Row, Strip
from stages.reports.page import Shown, render_page
from stages.reports.pictures import Captioned, embed_image
from stages.reports.provenance import Origin
from stages.reports.stage_times import StageTime
from tests.support.evaluated import GENEVAL, MODELS, Evaluation, seal_evaluation, speed_of

PROMPTS = [f"prompt {n}" for n in range(12)]
FIELDS = {"input", "select", "textarea"}
INTERACTIVE = {"a", "button", *FIELDS}


class Outline(HTMLParser):
    """Every tag with its attributes; the text of each button and link."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.names: list[str] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert not (tag in INTERACTIVE and {"a", "button"} & set(self._open)), f"{tag} inside of a button or link"
        self.tags.append((tag, attributes))
        if tag in ("button", "a"):
            self._open.append(tag)
            self.names.append(attributes.get("aria-label") or "")
        if tag == "img" and self._open:
            self.names[-1] += attributes.get("alt") or ""

    def handle_endtag(self, tag):
        if tag in ("button", "a"):
            self._open.pop()

    def handle_data(self, data):
        if self._open:
            self.names[-1] += data

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


def render_report() -> str:
    """A page with everything that a page can have."""
    rng = np.random.default_rng(0)
    scores = {f: {m.name: rng.random(12) for m in MODELS} for f in ("strict", "soft", "lab-conv")}
    tags = [GENEVAL[n % 3] for n in range(12)]
    card = Evaluation(scores, PROMPTS, trained_on=("lab-conv",), models=MODELS, tags=tags).card("run")
    images = {m.name: rng.integers(0, 255, (16, 16, 3), dtype=np.uint8) for m in MODELS}
    row = Row("a red circle", "colors", images, {"student": "strict 0.00"}, {"student": "expected circle>=1, found 0"})
    small = tuple(
        Captioned(embed_image(image, f"{m}: a red circle"), m, ("strict 0.00",)) for m, image in images.items()
    )
    prompts = [
        Prompt(p, "colors", {"strict": dict.fromkeys(images, 0.5)}, small, is_broken=p == "prompt 1") for p in PROMPTS
    ]
    shown = Shown(
        [row] * 2,
        {"Largest wins": [row], "Largest losses": []},
        [Strip("a red circle", {model: [image] * 2 for model, image in images.items()})],
        prompts,
        [BrokenImages("student", 12, (1, 0, 0, 0))],
    )
    times = [StageTime(stage, "cuda", 2, 100, 90, 512, None) for stage in ("cold_start", "joint")]
    origin = Origin("lab:flow", None, [("run", "run")], {"seed": 0}, times)
    return render_page(card, speed_of(card), origin, shown=shown, curves={"joint": {"loss_dm": []}})


def render_comparison(folder: Path) -> str:
    for n, run in enumerate(("first", "second")):
        rng = np.random.default_rng(n)
        scores = {f: {m.name: rng.random(12) for m in MODELS[:2]} for f in ("strict", "lab-conv")}
        seal_evaluation(str(folder / "runs"), run, folder / "scratch", Evaluation(scores, PROMPTS))
    page = folder / "page.html"
    assert cli.main(["compare", "first", "second", "--store", str(folder / "runs"), "--out", str(page)]) == 0
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=["report", "comparison"])
def outline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outline:
    if request.param == "report":
        return Outline(render_report())
    return Outline(render_comparison(tmp_path_factory.mktemp("compared")))


def test_the_page_says_its_language_and_its_title(outline: Outline):
    (html,) = outline.all("html")
    names = [tag for tag, _ in outline.tags]
    assert html["lang"] == "en" and names[: names.index("body")].count("title") == 1


def test_every_image_has_a_text_in_its_place(outline: Outline):
    assert all(image.get("alt") for image in outline.all("img"))
    graphics = outline.all("svg")
    assert graphics and all(
        g.get("aria-hidden") == "true" or (g.get("role") == "img" and g["aria-label"]) for g in graphics
    )


def test_every_field_has_a_label_and_every_button_a_name(outline: Outline):
    labelled = {label["for"] for label in outline.all("label")}
    assert all(field.get("id") in labelled for field in outline.all(*FIELDS))
    assert outline.names and all(name.strip() for name in outline.names)
    assert all(button["type"] == "button" for button in outline.all("button"))


def test_headings_are_in_order(outline: Outline):
    levels = [int(tag[1]) for tag, _ in outline.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def test_ids_are_unique_and_all_that_points_to_one_finds_it(outline: Outline):
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in outline.tags:
        for name in ("for", "popovertarget", "aria-labelledby"):
            assert attributes.get(name, ids[0]) in ids, (name, attributes)
        assert (attributes.get("href") or f"#{ids[0]}").removeprefix("#") in ids


def test_landmarks_let_a_reader_jump(outline: Outline):
    assert len(outline.all("main")) == 1
    assert [nav["aria-label"] for nav in outline.all("nav")] == ["Contents"]
    assert all(
        section.get("aria-label") or section.get("aria-labelledby") for section in outline.all("section", "dialog")
    )
    first_link = next(attributes for tag, attributes in outline.tags if tag == "a")
    assert first_link["href"] == "#content"


def test_nothing_comes_from_elsewhere(outline: Outline):
    for _, attributes in outline.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))


def test_tables_have_headings_with_a_scope(outline: Outline):
    assert all(heading.get("scope") for heading in outline.all("th"))


def test_what_scrolls_can_be_reached_by_keyboard(outline: Outline):
    scrolling = [attributes for attributes in outline.all("div") if attributes.get("class") == "scroll"]
    assert scrolling and all(each["tabindex"] == "0" and each["aria-label"] for each in scrolling)
