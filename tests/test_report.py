"""The report as a reader's browser gets it: whole, self-contained, escaped, and honest about broken figures."""

from __future__ import annotations

import base64
import io
import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dmdr.metrics.scorecard import Model, Scores, scorecard
from stages.charts import POINTS, chart, read_columns, thin
from stages.gallery import ROWS, Row, chosen, grid
from stages.report import page
from stages.verdict import verdicts

MODELS = [Model("student", 2, 1.0), Model("teacher", 25, 3.0), Model("naive teacher", 2, 1.0)]
EVIL = "a <script>alert(\"1\")</script> & a 'cat'"
VOID = {"meta", "img", "br", "circle", "rect", "path"}


class Reader(HTMLParser):
    """Collects tags, text and images; fails on a tag that is closed out of turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.images, self.links, self.text, self._open = [], [], [], "", []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href") and not value.startswith("data:")]
        self.images += [dict(attrs)] if tag == "img" else []

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def example(broken: bool = False) -> tuple[dict, list[Row]]:
    rng = np.random.default_rng(0)
    tags = ["colors", "counting"] * 20
    scores = {
        figure: Scores({model.name: rng.random(40) + lead for model, lead in zip(MODELS, leads, strict=True)}, tags)
        for figure, leads in {"lab-conv": (2, 1, 0), "strict": (0.5, 0.0, 0.9), "soft": (0, 0, 0)}.items()
    }
    if broken:
        scores["strict"].by_model["teacher"][7] = np.nan
    card = scorecard("tiny", MODELS, scores=scores, trained_on={"lab-conv"}, prompts=40, seed=0)
    rows = [Row(EVIL if n == 0 else f"prompt {n}", "colors") for n in range(3)]
    for row in rows:
        row.images = {model.name: rng.integers(0, 255, (16, 16, 3), dtype=np.uint8) for model in MODELS}
        row.notes = {model.name: "strict 1.00" for model in MODELS}
    return card, rows


def render(broken: bool = False) -> tuple[str, dict, list[Row]]:
    card, rows = example(broken)
    curves = {"cold_start": {"loss_dm": [(1.0, 0.5), (2.0, 0.4)]}, "joint": {"loss_rl": [(1.0, None), (2.0, 1.0)]}}
    provenance = [("teacher", "lab:flow & more"), ("code", "dmdr <1>")]
    return (
        page(
            card, teacher="lab:<flow>", rows=rows, curves=curves, provenance=provenance, settings={"student.steps": 2}
        ),
        card,
        rows,
    )


def test_report_is_one_whole_page():
    html, card, _ = render()
    reader = Reader(html)
    assert reader.links == []  # nothing is fetched from anywhere
    assert "prefers-color-scheme: dark" in html
    for each in card["metrics"]:
        assert each["name"] in reader.text
        assert f"{each['mean']:.3f}" in reader.text
        assert f"{each['low']:.3f} to {each['high']:.3f}" in reader.text
    for pair in card["paired"]:
        assert f"{pair['difference']:+.3f}" in reader.text
    for tag, each in card["tags"]["strict"]["teacher"]["tags"].items():
        assert tag in reader.text
        assert f"{each['mean']:.3f}" in reader.text
    for text in ("loss_dm", "loss_rl", "dmdr <1>", "student.steps", "not a number at 1 of its points"):
        assert text in reader.text


def test_report_holds_every_image():
    html, _, rows = render()
    images = Reader(html).images
    assert len(images) == len(rows) * len(MODELS)
    for image, (row, model) in zip(images, ((r, m) for r in rows for m in MODELS), strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))))
        shown = np.asarray(picture.convert("RGB").resize((16, 16), Image.Resampling.NEAREST))
        assert (shown == row.images[model.name]).all()
        assert row.prompt in image["alt"]


def test_report_escapes_what_people_wrote():
    reader = Reader(render()[0])
    assert "script" not in reader.tags
    assert EVIL in reader.text


def test_report_shows_what_is_not_a_number():
    html, _, _ = render(broken=True)
    text = Reader(html).text
    assert "1 of 40 prompts" in text
    assert "undecided, an image or a score is not a number" in text


def test_trained_on_is_marked_and_does_not_decide():
    html, card, _ = render()
    assert "trained on" in Reader(html).text
    over_teacher, over_naive = verdicts(card)
    assert over_teacher["text"].startswith("The 2-step student scores ")
    assert " strict, the teacher " in over_teacher["text"]
    assert "at 50 NFE: better, 95 % interval of the difference 0." in over_teacher["text"]
    assert over_naive["word"] == "worse"
    assert "lab-conv (trained on) +" in over_teacher["also"]
    assert "soft" in over_teacher["also"]
    assert "no difference shown" in over_teacher["also"]


def test_every_chart_is_well_formed_svg():
    figure = chart("reward/<x>", [("cold_start", 0.0, [(1, 1.0), (2, None), (3, 2.0)]), ("joint", 3.0, [(5, 4.0)])], 5)
    svg = ET.fromstring(figure[figure.index("<svg") : figure.index("</svg>") + 6])
    assert len(svg.findall("path[@class='broken']")) == 1
    assert svg.attrib["aria-label"] == "reward/<x>"
    assert "nan" not in figure
    assert ET.fromstring(chart("all broken", [("joint", 0.0, [(1, None)])], 1)) is not None


def test_thinning_keeps_the_mean_and_every_break():
    points = [(float(x), float(x % 7)) for x in range(1, 1000)]
    thinned = thin(points)
    assert len(thinned) <= POINTS
    assert thinned[-1][0] == 999
    assert np.mean([y for _, y in thinned]) == pytest.approx(3, abs=0.1)
    points[500] = (501.0, None)
    assert sum(y is None for _, y in thin(points)) == 1


def test_columns_are_read_as_training_wrote_them(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"update": 0, "loss_dm": 1.5, "note": "text"}, {"update": 1, "loss_dm": float("nan"), "loss_rl": 2}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_columns(path) == {"loss_dm": [(1, 1.5), (2, None)], "loss_rl": [(2, 2)]}


def test_shown_prompts_take_turns_among_the_tasks():
    tags = ["a"] * 500 + ["b", "c"] + [None] * 5
    places = chosen(tags)
    assert len(places) == ROWS
    assert {tags[place] for place in places} == {"a", "b", "c", None}
    assert chosen(["a"] * 3) == [0, 1, 2]


def test_grid_shows_all_images_enlarged():
    _, rows = example()
    picture = np.asarray(grid(rows, {model.name: f"{model.name}, {model.nfe} NFE" for model in MODELS}))
    side = 16 * 9  # the first multiple of 16 that is at least a tile
    for row in rows:
        enlarged = row.images["teacher"].repeat(9, axis=0).repeat(9, axis=1)
        places = (picture[:, :, 0] == enlarged[0, 0, 0]).nonzero()
        assert any((picture[y : y + side, x : x + side] == enlarged).all() for y, x in zip(*places, strict=True)
                   if picture[y : y + side, x : x + side].shape == enlarged.shape)  # fmt: skip
