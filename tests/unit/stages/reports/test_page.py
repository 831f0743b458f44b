"""The report as a reader's browser gets it: whole, self-contained, escaped, readable, honest about broken figures."""

from __future__ import annotations

import base64
import json
import random
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from dmdr.config.stages import MODELS as KNOWN
from dmdr.errors import DataError
from dmdr.metrics.aggregate import Conditions, Scores, build_scorecard
from dmdr.metrics.scorecard import Model, Scorecard, Speed, TagMean, TagMeans
from stages.reports import paper
from stages.reports.card import read_figures, read_scorecard, read_speed
from stages.reports.charts import POINTS, Chart, Curve, Point, build_chart, read_columns, thin
from stages.reports.explorer import Prompt
from stages.reports.gallery import LARGEST, ROWS, Row, Strip, build_grid, choose_prompts, find_extremes
from stages.reports.nfe import build_plot, measure_nfe
from stages.reports.page import Shown, render_page
from stages.reports.pictures import Captioned, embed_image
from stages.reports.provenance import Origin
from stages.reports.rendering import load_environment, render_template
from stages.reports.style import COLOURS, DARK, DARK_COLOURS, LIGHT
from stages.reports.verdict import list_verdicts
from tests.support.evaluated import GENEVAL, MODELS, decoded, speed_of
from tests.support.html import EVIL, Reader
from tests.support.tiny_teachers import copy_teacher

STYLE = render_template("style.css.jinja")
THIRD = Model(f"{EVIL} XL", 4, 1.0)


def example(broken: bool = False) -> tuple[Scorecard, dict[str, list[Row]], list[Strip]]:
    """A card of four models, one of a third party, with GenEval's tasks; images of the lab's size and large ones."""
    rng = np.random.default_rng(0)
    models, tags = [*MODELS, THIRD], ["colors", "counting"] * 20
    leads = {"lab-conv": (2, 1, 0, 1), "strict": (0.5, 0.0, 0.9, 0.2), "soft": (0, 0, 0, 0), "geneval": (0, 0, 0, 0)}
    scores = {
        figure: Scores({model.name: rng.random(40) + lead for model, lead in zip(models, leads, strict=True)}, tags)
        for figure, leads in leads.items()
    }
    if broken:
        scores["strict"].by_model["teacher"][7] = np.nan
    conditions = Conditions(
        "tiny",
        prompts=40,
        seed=0,
        trained_on={"lab-conv"},
        missing={"hpsv2.1": "its <weights> are not here"},
        about={"soft": {"weights": "lab <1>", "scale": 100.0, "prefix": None, "detector": "exact & quick"}},
        truncated=3,
    )
    card = build_scorecard(conditions, models, scores)
    notes = {model.name: "strict 1.00, soft 0.50" for model in models}
    rows = []
    for n in range(3):
        images = {model.name: rng.integers(0, 255, (16, 16, 3), dtype=np.uint8) for model in models}
        if n == 2:  # a large one, smooth as photographs are
            images = {m: np.asarray(Image.fromarray(i).resize((300, 300))) for m, i in images.items()}
        rows.append(Row(EVIL if n == 0 else f"prompt {n}", "colors", images, notes))
    strip = Strip(EVIL, {m.name: list(rng.integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)) for m in models})
    return card, {"Largest wins over the teacher": rows[:2], "Largest losses": rows[2:], "By task": []}, [strip]


def speed_of_example(card: Scorecard) -> Speed:
    """The speed of all models but the third party's."""
    speed = speed_of(card, "a <GPU>")
    return speed.model_copy(update={"seconds_per_image": {**speed.seconds_per_image, THIRD.name: None}})


def show(rows: dict[str, list[Row]], strips: list[Strip] = ()) -> Shown:
    """These sections, and their prompts as the list of all."""
    prompts = [
        Prompt(
            row.prompt,
            row.tag,
            {"strict": {model: float(n) for n, model in enumerate(row.images)}},
            tuple(Captioned(embed_image(image, f"{m}: {row.prompt}"), m, ()) for m, image in row.images.items()),
            is_broken=False,
        )
        for of in rows.values()
        for row in of
    ]
    return Shown(featured=[], sections=rows, strips=strips, prompts=prompts, broken=[])


def render(broken: bool = False, base: str | None = None) -> tuple[str, Scorecard, dict[str, list[Row]], list[Strip]]:
    card, rows, strips = example(broken)
    curves = {
        "cold_start": {"loss_dm": [Point(1.0, 0.5), Point(2.0, 0.4)]},
        "joint": {"loss_rl": [Point(1.0, None), Point(2.0, 1.0)]},
    }
    html = render_page(
        card,
        speed_of_example(card),
        Origin(
            teacher="lab:<flow>",
            base=base,
            lines=[("teacher", "lab:flow & more"), ("code", "dmdr <1>")],
            settings={"student.steps": 2},
        ),
        shown=show(rows, strips),
        curves=curves,
    )
    return html, card, rows, strips


def test_report_is_one_whole_page():
    html, card, *_ = render()
    reader = Reader(html)
    assert ET.fromstring(html).tag == "html"  # as strict as a parser can be
    assert reader.links == []  # nothing is fetched from anywhere
    assert not re.search(r"https?:|url\(|@import", html)
    assert "default-src 'none'" in html  # and the browser is told so
    assert "prefers-color-scheme: dark" in html
    for each in card.metrics:
        assert each.name in reader.text
        assert f"{each.mean:.3f}" in reader.text
        assert f"{each.low:.3f} to {each.high:.3f}" in reader.text
    for pair in card.paired:
        assert f"{pair.difference:+.3f}" in reader.text
    for figure in ("strict", "geneval"):
        for each in card.tags[figure].values():
            assert f"{each.overall:.3f}" in reader.text
            for tag, row in each.tags.items():
                assert f"{tag} {row.n} prompts" in reader.text
                assert f"{row.mean:.3f}" in reader.text
    for text in ("loss_dm", "loss_rl", "dmdr <1>", "student.steps", "not a number at 1 of its points", "No prompt."):
        assert text in reader.text


def cells(html: str) -> list[list[str]]:
    """The scorecard's rows as text."""
    table = next(each for each in ET.fromstring(html).iter("table") if each.get("class") == "sticky")
    return [["|".join(cell.itertext()) for cell in row] for row in table.iter("tr")]


def test_the_scorecard_has_the_shape_of_table_1():
    html, card, *_ = render()
    speed = speed_of_example(card).seconds_per_image
    head, *rows = cells(html)
    assert head[:4] == ["model", "steps", "NFE", "s / image|images / s"]
    figures = list(dict.fromkeys(each.name for each in card.metrics))
    assert [each.split("|")[0].strip() for each in head[4:]] == figures
    assert "trained on" in head[4] and "trained on" not in "".join(head[5:])
    for model, row in zip(card.models, rows, strict=True):
        assert row[0].split("|")[0] == model.label
        assert row[1:3] == [str(model.steps), str(model.nfe)]
        seconds = speed[model.name]
        assert row[3] == (f"{seconds:.3g}|{1 / seconds:.3g}" if seconds else "–")
        for cell, figure in zip(row[4:], figures, strict=True):
            found = next(m for m in card.metrics if (m.name, m.model) == (figure, model.name))
            told = f"{found.mean:.3f}|{found.low:.3f} to {found.high:.3f}"
            if figure == "geneval":
                told += f"|by task {card.tags[figure][model.name].overall:.3f}"
            assert cell == told


def test_what_surrounds_the_figures_is_said():
    text = Reader(render()[0]).text
    for said in (
        "Not measured: hpsv2.1. its <weights> are not here",
        "weights lab <1>, scale 100.0, detector exact & quick",
        "in batches of 4, on a <GPU>",
        "3 of all evaluation prompts are longer than the text encoder reads",
    ):
        assert said in text
    assert "None" not in text


def test_the_papers_rows_stand_only_under_its_own_metrics():
    assert "printed in the paper" not in Reader(render()[0]).text
    html, card, *_ = render(base="SD3-Medium")
    rows = cells(html)[len(card.models) + 1 :]
    assert "SD3-Medium (Table 3)" in rows[0][0]
    assert [row[0] for row in rows[1:]] == ["paper: teacher, CFG 7", "paper: DMDR"]
    assert [row[-1] for row in rows[1:]] == ["0.62", "0.64"]
    assert {cell for row in rows[1:] for cell in row[3:-1]} == {"–"}
    bars = {
        row[0]: row
        for each in ET.fromstring(html).iter("table")
        if each.get("class") == "bars" and next(iter(each.itertext())).strip() == "counting"
        for row in [["".join(c.itertext()) for c in r] for r in each.iter("tr")]
    }
    assert bars["paper: DMDR"][2] == "0.540"


def test_dpg_bench_as_the_official_script_counts_stands_beside_ours_and_the_papers():
    """Its figure has categories, finer ones too, and no score of a prompt."""
    card, rows, strips = example()
    tags = {"attribute": 80.5, "attribute-color": 70.5, "entity": 81.5, "global": 82.5, "other": 83.5, "relation": 84.5}
    means = TagMeans(tags={name: TagMean(mean=mean, n=9) for name, mean in tags.items()}, overall=61.25)
    more = [row.model_copy(update={"name": "dpg-bench", "mean": 62.5}) for row in card.metrics if row.name == "soft"]
    figures = ("dpg-bench", "dpg-bench (official)")
    by_figure = {figure: {model.name: means for model in card.models} for figure in figures}
    card = card.model_copy(update={"metrics": (*card.metrics, *more), "tags": {**card.tags, **by_figure}})
    origin = Origin("", "SD3-Medium", [], {})
    html = render_page(card, speed_of(card), origin, shown=show(rows, strips), curves={})
    table = cells(html)
    assert table[1][-1].startswith("62.500|") and table[1][-1].endswith("|official 61.250")
    assert table[-1][0] == "paper: DMDR" and table[-1][-1] == "84.96"
    blocks = [
        ["".join(c.itertext()) for c in each.iter()]
        for each in ET.fromstring(html).iter("table")
        if each.get("class") == "bars"
    ]
    captions = [block[1] for block in blocks][-7:]
    assert [each.split(" ")[0] for each in captions] == [
        "overall",
        "global",
        "entity",
        "attribute",
        "relation",
        "other",
        "attribute-color",
    ]
    assert captions[0] == "overall mean over the prompts"
    assert "paper: DMDR84.960" in blocks[-7][0] and "paper: DMDR90.460" in blocks[-6][0]
    assert "paper" not in blocks[-1][0] and "paper" not in blocks[-8][0]


def test_printed_numbers_are_brought_to_the_scale_of_the_card():
    figures = ["clip-score", "dpg-bench", "dpg-bench (official)", "geneval"]
    rows = {row.label: cells for row, cells in paper.find_rows("SDXL-Base", figures, {})}
    assert rows["DMDR"] == {"clip-score": "35.2940", "dpg-bench (official)": "76.44", "geneval": "0.56"}
    about = {"dpg-bench (official)": {"scale": 1.0}, "clip-score": {"scale": 100}}
    rows = {row.label: cells for row, cells in paper.find_rows("SDXL-Base", figures, about)}
    assert rows["DMDR"] == {"clip-score": "35.2940", "dpg-bench (official)": "0.7644", "geneval": "0.56"}
    assert paper.find_rows("SDXL-Base", ["strict"], {}) == paper.find_rows(None, figures, {}) == []


def test_the_papers_overall_on_geneval_is_the_mean_of_its_tasks():
    for rows in paper.ROWS.values():
        for row in rows:
            if "geneval" in row.tasks:
                assert list(row.tasks["geneval"]) == list(GENEVAL)
                assert abs(np.mean(list(row.tasks["geneval"].values())) - row.figures["geneval"]) < 0.0075


def test_the_papers_teachers_are_known_by_their_networks():
    sd3 = {"caption_projection_dim": 1536, "qk_norm": None}
    assert paper.base_model("SD3Transformer2DModel", sd3) == "SD3-Medium"
    assert paper.base_model("SD3Transformer2DModel", {**sd3, "qk_norm": "rms_norm"}) is None  # 3.5-Medium
    large = {"caption_projection_dim": 2432, "qk_norm": "rms_norm"}
    assert paper.base_model("SD3Transformer2DModel", large) == "SD3.5-Large"
    assert paper.base_model("UNet2DConditionModel", {"cross_attention_dim": 2048}) == "SDXL-Base"
    assert paper.base_model("FluxTransformer2DModel", {}) is None


def test_a_teacher_of_another_size_has_no_rows(tiny_folder):
    network = copy_teacher(tiny_folder).network
    assert paper.base_model(type(network).__name__, network.config) is None


def test_pages_read_the_scorecard_that_evaluate_writes(tmp_path):
    card, *_ = example()
    (tmp_path / "scorecard.json").write_text(json.dumps(card.to_json()))
    (tmp_path / "speed.json").write_text(json.dumps(speed_of_example(card).model_dump()))
    assert read_scorecard(tmp_path, "store/tiny/evaluate") == card
    assert read_speed(tmp_path, "store/tiny/evaluate") == speed_of_example(card)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 1}, "has schema 1, this DMDR reads 2; delete .* and evaluate again"),
        ({"models": None}, r"does not read \(models: .*\); delete .* and evaluate again"),
    ],
)
def test_a_card_of_another_schema_or_a_damaged_one_is_refused_in_one_line(tmp_path, change, says):
    (tmp_path / "scorecard.json").write_text(json.dumps({**example()[0].to_json(), **change}))
    with pytest.raises(DataError, match=says) as error:
        read_scorecard(tmp_path, "store/tiny/evaluate")
    assert len(str(error.value).splitlines()) == 1


def test_the_figures_of_an_earlier_schema_still_read(tmp_path):
    """Schema 1 had no labels."""
    content = example()[0].to_json()
    content["models"] = [{key: value for key, value in each.items() if key != "label"} for each in content["models"]]
    (tmp_path / "scorecard.json").write_text(json.dumps({**content, "schema": 1}))
    assert read_figures(tmp_path, "store/tiny/evaluate").models == example()[0].models


def test_report_holds_every_image():
    html, card, rows, strips = render()
    images = Reader(html).images
    names = [model.name for model in card.models]
    expected = [(row.images[name], row.prompt) for of in rows.values() for row in of for name in names]
    expected *= 2  # in the sections, and in the list of all prompts
    expected += [(image, strip.prompt) for strip in strips for name in names for image in strip.images[name]]
    images = [image for image in images if image["src"] != "data:,"]  # which enlarges the others
    assert len(images) == len(expected)
    for image, (pixels, prompt) in zip(images, expected, strict=True):
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", image["src"]).groups()
        shown = decoded(base64.b64decode(data))
        assert image["alt"].endswith(prompt)
        if kind == "png":
            assert (shown == pixels).all()
            assert image["class"] == "tiny"
        else:
            assert max(shown.shape) == LARGEST
            like = np.asarray(Image.fromarray(pixels).resize((LARGEST, LARGEST), Image.Resampling.LANCZOS), dtype=float)
            assert np.abs(shown - like).mean() < 12
    assert {image["src"][:14] for image in images} == {"data:image/png", "data:image/jpe"}


def test_a_report_of_noise_stays_below_15_megabytes():
    """Forty rows of four models; nothing compresses worse."""
    card, *_ = example()
    noise = np.random.default_rng(0).integers(0, 255, (LARGEST, LARGEST, 3), dtype=np.uint8)
    row = Row("noise", None, {model.name: noise for model in card.models})
    rows = {str(part): [row] * ROWS for part in range(4)}
    html = render_page(card, speed_of(card), Origin("", None, [], {}), shown=Shown([], rows, [], [], []), curves={})
    assert len(html) < 15e6


def test_report_escapes_what_people_wrote():
    html = render()[0]
    reader = Reader(html)
    assert reader.tags.count("script") == 1 and EVIL not in html  # the page's own
    assert EVIL in reader.text
    assert THIRD.name in reader.text


def test_report_shows_what_is_not_a_number():
    html, *_ = render(broken=True)
    text = Reader(html).text
    assert "1 of 40 prompts" in text
    assert "not a number: teacher" in text
    assert "Undecided: strict, a score is not a number." in text
    assert not re.search(r"\bnan\b", re.sub(r'base64,[^"]*', "", html), re.IGNORECASE)


def test_points_lie_where_their_numbers_say():
    """Height against score and width against log NFE, read back from the SVG."""
    html, card, *_ = render()
    root = ET.fromstring(html)
    svg = next(each for each in root.iter("svg") if each.get("aria-label", "").startswith("strict against NFE"))
    points = {}
    for path in svg.iter("path"):
        title = path.find("title")
        if title is not None:
            x, y = map(float, re.fullmatch(r"translate\((.*),(.*)\)", path.get("transform")).groups())
            points[title.text.split(", ")[0]] = (x, y)
            assert title.text in svg.get("aria-label")
    means = {m.model: m.mean for m in card.metrics if m.name == "strict"}
    assert len(points) == len(means)
    heights = np.polyfit([means[name] for name in points], [y for _, y in points.values()], 1)
    for name, (_, y) in points.items():
        assert y == pytest.approx(np.polyval(heights, means[name]), abs=0.2)
    nfe = {model.name: model.nfe for model in card.models}
    assert points["teacher"][0] > points[THIRD.name][0] > points["student"][0]
    share = np.log(nfe[THIRD.name] / 2) / np.log(nfe["teacher"] / 2)
    left = (points["student"][0] + points["naive teacher"][0]) / 2  # both have 2 NFE and stand beside each other
    assert points[THIRD.name][0] == pytest.approx(left + share * (points["teacher"][0] - left), abs=0.2)


@pytest.mark.parametrize("scale", [1e-7, 1e-4, 0.02, 1.0, 34.0, 1e3, 1e7])
def test_the_numbers_of_an_axis_fit_beside_it(scale: float):
    card, *_ = example()
    scaled = [
        row.model_copy(update={key: -getattr(row, key) * scale for key in ("mean", "low", "high")})
        for row in card.metrics
    ]
    card = card.model_copy(update={"metrics": tuple(scaled)})
    ticks = [label.text for label in build_plot(card, "strict", measure_nfe(card)).labels if label.anchor == "end"]
    assert len(ticks) == 3 and max(map(len, ticks)) <= 8
    assert len(set(ticks)) == 3


def luminance(colour: str) -> float:
    """WCAG 2.1, relative luminance."""
    channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("theme", "series"), [(LIGHT, COLOURS), (DARK, DARK_COLOURS)], ids=["light", "dark"])
def test_contrast_meets_wcag_aa(theme: dict[str, str], series: tuple[str, ...]):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for background in ("paper", "card"):
        for text in ("ink", "faint", "good", "bad"):
            assert contrast(theme[text], theme[background]) >= 4.5, (text, background)
        for colour in series:
            assert contrast(colour, theme[background]) >= 3, (colour, background)
        assert contrast(series[0], theme[background]) >= 4.5  # of links
    assert contrast(theme["paper"], theme["mark"]) >= 4.5
    assert len(series) == len(set(series)) == len(COLOURS)
    for name, colour in theme.items():
        assert f"--{name}:{colour};" in STYLE


def test_every_colour_of_the_style_is_one_of_the_themes():
    """So that the test above has seen them all."""
    rules = re.sub(r"--\w+:#[0-9a-f]{6};", "", STYLE)
    assert not re.search(r"#[0-9a-fA-F]{3,8}\b|rgb|hsl", rules)
    assert set(re.findall(r"var\(--(\w+)\)", rules)) <= {
        *LIGHT,
        *(f"c{n}" for n in range(len(COLOURS))),
        *("columns", "few"),  # numbers that an element sets
    }


def test_wins_and_losses_are_those_of_a_full_sort():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    for _ in range(50):
        ours, theirs = (rng.integers(0, 4, 30).astype(float) for _ in range(2))
        ours[rng.integers(0, 30, 3)] = np.nan
        wins, losses = find_extremes(ours, theirs, 5)
        by_lead = sorted(
            (theirs[place] - ours[place], place) for place in range(30) if np.isfinite(ours[place] - theirs[place])
        )
        assert wins == [place for loss, place in by_lead if loss < 0][:5]
        by_loss = sorted((-loss, place) for loss, place in by_lead)
        assert losses == [place for lead, place in by_loss if lead < 0][:5]
        assert not set(wins) & set(losses)
    assert find_extremes(np.ones(4), np.ones(4)) == ([], [])


def test_trained_on_is_marked_and_does_not_decide():
    html, card, *_ = render()
    assert "trained on" in Reader(html).text
    over_teacher, over_naive, over_third = list_verdicts(card)
    assert over_teacher.text.startswith("The 2-step student is better than its teacher in 1 of 3 held-out measures")
    assert over_teacher.outcome == over_third.outcome == "better" and over_naive.outcome == "worse"
    assert THIRD.name in over_third.text
    assert "lab-conv" not in over_teacher.text
    assert "lab-conv +" in over_teacher.also
    assert set(KNOWN).isdisjoint({THIRD.name})


def draw(chart: Chart) -> str:
    """A training chart alone, without a page around it."""
    return str(load_environment().get_template("charts.html.jinja").module.training_chart(chart))


def test_every_chart_is_well_formed_svg():
    cold_start = Curve([Point(1, 1.0), Point(2, None), Point(3, 2.0)], colour=0)
    joint = Curve([Point(2, 4.0)], colour=1, start=3.0)
    figure = draw(build_chart("reward/<x>", [cold_start, joint], end=5, shows_last=True))
    svg = ET.fromstring(figure[figure.index("<svg") : figure.index("</svg>") + 6])
    assert len(svg.findall("path[@class='broken']")) == 1
    assert svg.attrib["aria-label"] == "reward/<x>"
    assert "nan" not in figure
    broken = build_chart("all broken", [Curve([Point(1, None)], colour=0)], end=1, shows_last=True)
    assert ET.fromstring(draw(broken)) is not None


def test_thinning_keeps_the_mean_and_every_break():
    points = [Point(float(x), float(x % 7)) for x in range(1, 1000)]
    thinned = thin(points)
    assert len(thinned) <= POINTS
    assert thinned[-1][0] == 999
    assert np.mean([y for _, y in thinned]) == pytest.approx(3, abs=0.1)
    points[500] = Point(501.0, None)
    assert sum(y is None for _, y in thin(points)) == 1


def test_columns_are_read_as_training_wrote_them(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"update": 0, "loss_dm": 1.5, "note": "text"}, {"update": 1, "loss_dm": float("nan"), "loss_rl": 2}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_columns(path) == {"loss_dm": [(1, 1.5), (2, None)], "loss_rl": [(2, 2)]}


def test_shown_prompts_take_turns_among_the_tasks():
    tags = ["a"] * 500 + ["b", "c"] + [None] * 5
    places = choose_prompts(tags)
    assert len(places) == ROWS
    assert {tags[place] for place in places} == {"a", "b", "c", None}
    assert choose_prompts(["a"] * 3) == [0, 1, 2]


def test_grid_shows_all_images_enlarged():
    _, by_heading, _ = example()
    rows = by_heading["Largest wins over the teacher"]
    picture = np.asarray(build_grid(rows, {model.name: f"{model.name}, {model.nfe} NFE" for model in MODELS}))
    side = 16 * 9  # the first multiple of 16 that is at least a tile
    for row in rows:
        enlarged = row.images["teacher"].repeat(9, axis=0).repeat(9, axis=1)
        places = (picture[:, :, 0] == enlarged[0, 0, 0]).nonzero()
        assert any(
            (picture[y : y + side, x : x + side] == enlarged).all()
            for y, x in zip(*places, strict=True)
            if picture[y : y + side, x : x + side].shape == enlarged.shape
        )
