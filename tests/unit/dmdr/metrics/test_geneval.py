"""GenEval: its rules on random detections beside an oracle, the arithmetic of its summary, tiny models of its kinds."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch

from dmdr.errors import ConfigError, DataError, InputMissing
from dmdr.lab.fashion.prompts import fashion_prompts
from dmdr.lab.prompts import lab_prompts
from dmdr.metrics.aggregate import average_by_tag
from dmdr.metrics.detector import NAMES, Detector, enclose_mask
from dmdr.metrics.geneval import build_line
from dmdr.metrics.geneval_colours import GREY, ColourClassifier, crop
from dmdr.metrics.geneval_rules import COLOURS, POSITIONS, Detection, count_detections, judge_detections, score_softly
from dmdr.metrics.load import check_metrics, judge_images, load_metrics
from dmdr.rewards import weights
from dmdr.rewards.sources import RewardSources

CLASSES = ("bench", "dog", "cup")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def scene(rng: random.Random) -> dict[str, list[Detection]]:
    """Boxes of three classes, up to 20 of one, unsorted, some at the thresholds and some at the same place."""
    found = {}
    for name in CLASSES:
        boxes = []
        for _ in range(rng.choice([0, 0, 1, 1, 2, 3, 4, 20])):
            x, y = rng.choice([0, 40, 100, 200]), rng.choice([0, 40, 100, 200])
            size = rng.choice([10, 30, 80])
            boxes.append(
                Detection((x, y, x + size, y + size), rng.choice([0.2, 0.3, 0.31, 0.5, 0.9, 0.91, rng.random()]))
            )
        if boxes:
            found[name] = boxes
    return found


def metadata(rng: random.Random, tag: str) -> dict:
    first, second = rng.sample(CLASSES, 2)
    count = rng.randint(1, 4) if tag == "counting" else 1
    include = [{"class": first, "count": count}]
    record = {"tag": tag, "include": include, "prompt": "a prompt"}
    if tag == "counting":
        record["exclude"] = [{"class": first, "count": count + 1}]
    if tag in ("two_object", "position", "color_attr"):
        include.append({"class": second, "count": 1})
    if tag in ("colors", "color_attr"):
        for clause in include:
            clause["color"] = rng.choice(COLOURS[:3])
    if tag == "position":
        include[1]["position"] = [rng.choice(POSITIONS), 0]
    return record


def painted(name: str, objects) -> list[str]:
    """A colour that is a function of the box."""
    return [COLOURS[int(each.box[0] + each.box[1] + len(name)) % 3] for each in objects]


def oracle(record: dict, scene: dict[str, list[Detection]]) -> bool:
    """The rules once more, clause by clause, in plain arithmetic."""
    least = 0.9 if record["tag"] == "counting" else 0.3
    seen = {}
    for name, objects in scene.items():
        strong = [each for each in objects if each.score > least]
        strong.sort(key=lambda each: each.score, reverse=True)
        seen[name] = strong[:16]
    fine = []
    for clause in record["include"]:
        mine = seen.get(clause["class"], [])[: clause["count"]]
        ok = len(mine) == clause["count"]
        if ok and "color" in clause:
            ok = all(colour == clause["color"] for colour in painted(clause["class"], mine))
        if ok and "position" in clause:
            where, other = clause["position"]
            ok = fine[other] is not None and all(_stands(a, where, b) for a in mine for b in fine[other])
        fine.append(mine if ok else None)
    many = any(len(seen.get(clause["class"], [])) >= clause["count"] for clause in record.get("exclude", []))
    return None not in fine and not many


def _stands(a: Detection, where: str, b: Detection) -> bool:
    ax, ay = (a.box[0] + a.box[2]) / 2, (a.box[1] + a.box[3]) / 2
    bx, by = (b.box[0] + b.box[2]) / 2, (b.box[1] + b.box[3]) / 2
    distance = math.hypot(ax - bx, ay - by)
    if distance == 0:
        return False
    wide = 0.1 * (a.box[2] - a.box[0] + b.box[2] - b.box[0])
    high = 0.1 * (a.box[3] - a.box[1] + b.box[3] - b.box[1])
    gap = {"left of": bx - ax - wide, "right of": ax - bx - wide, "above": by - ay - high, "below": ay - by - high}
    return gap[where] > distance / 2


def test_the_rules_are_genevals(rng):
    outcomes = {tag: [] for tag in TAGS}
    for number in range(1200):
        tag = TAGS[number % len(TAGS)]
        record, detected = metadata(rng, tag), scene(rng)
        reason = judge_detections(record, count_detections(detected, tag), painted)
        assert (reason == "") == oracle(record, detected), (record, detected, reason)
        outcomes[tag].append(reason == "")
    assert all(0 < sum(found) < len(found) for found in outcomes.values()), outcomes


def test_partial_credit_is_whole_where_the_rules_pass_and_only_there(rng):
    wholes = 0
    for _ in range(600):
        tag = rng.choice(TAGS)
        record, objects = metadata(rng, tag), count_detections(scene(rng), tag)
        soft, passes = score_softly(record, objects, painted), not judge_detections(record, objects, painted)
        assert 0 <= soft <= 1 and (soft == 1) == passes, (record, objects)
        wholes += passes
    assert 0 < wholes < 600


def test_partial_credit_by_hand():
    dog, cup = Detection((0, 0, 10, 10), 0.95), Detection((50, 0, 60, 10), 0.95)
    two = {"include": [{"class": "dog", "count": 1}, {"class": "cup", "count": 1, "position": ("left of", 0)}]}
    assert score_softly(two, {}, painted) == 0
    assert score_softly(two, {"dog": [dog]}, painted) == 0.5
    assert score_softly(two, {"dog": [dog], "cup": [cup]}, painted) == 0.75, "there, but on the other side"
    three = {"include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}
    assert score_softly(three, {"dog": [dog] * 4}, painted) == 0.5, "two of two, and two too many"


def test_results_sum_up_as_the_official_script_does(rng):
    """Its arithmetic by hand: per task the share of right images, overall the mean of the tasks."""
    lines = []
    for number in range(600):
        tag = TAGS[number % len(TAGS)]
        record, seen = metadata(rng, tag), count_detections(scene(rng), tag)
        reason = judge_detections(record, seen, painted)
        lines.append(json.loads(json.dumps(build_line(record, reason, seen).to_json())))
    assert [list(each) for each in lines] == [["tag", "prompt", "correct", "reason", "metadata", "details"]] * 600
    tasks: dict[str, list[bool]] = {}
    for each in lines:
        tasks.setdefault(each["tag"], []).append(each["correct"])
    shares = {tag: sum(right) / len(right) for tag, right in tasks.items()}
    found = average_by_tag(np.array([float(each["correct"]) for each in lines]), [each["tag"] for each in lines])
    assert found.overall == pytest.approx(sum(shares.values()) / 6, abs=1e-9)
    for tag, share in shares.items():
        assert found.tags[tag].mean == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"include": {"class": "dog"}}, "include that is not a list"),
        ({"include": [{"class": "dog"}]}, "without class and count"),
        ({"include": [{"class": "dog", "count": 0}]}, "without class and count"),
        ({"include": [{"class": "dog", "count": 1, "color": "mauve"}]}, "asks for mauve"),
        ({"include": [{"class": "mouse", "count": 1}]}, "asks for mouse, which its detector does not know"),
        ({"include": [{"class": "dog", "count": 1}], "exclude": [{"class": "circle", "count": 1}]}, "asks for circle"),
        ({"include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]}, "none of left of, right of"),
        ({"include": [{"class": "dog", "count": 1, "position": None}]}, "position None, which is none of left of"),
        ({"include": [{"class": "dog", "count": 1}], "exclude": "cats"}, "exclude that is not a list"),
    ],
)
def test_a_row_that_does_not_parse_is_named(change, says):
    with pytest.raises(ConfigError, match=f"of 'two dogs'.*{says}"):
        check_metrics(("geneval",), [{"tag": "counting", "prompt": "two dogs", **change}])
    with pytest.raises(ConfigError, match="none of the 1 evaluation prompts"):
        check_metrics(("geneval",), [{"prompt": "a dog"}])


@pytest.mark.parametrize("prompts", [lab_prompts, fashion_prompts])
def test_the_labs_prompts_are_not_genevals(prompts):
    """They carry the same kind of metadata, of objects that the detector never finds."""
    with pytest.raises(ConfigError, match="asks for .*, which its detector does not know; .* drop geneval"):
        check_metrics(("geneval",), list(prompts("held-out")))


def test_detections_are_each_images_own(tiny_mask2former):
    detect = Detector(tiny_mask2former, "cpu")
    images = torch.rand(3, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    together = detect(images)
    assert any(together)
    for image, found in zip(images, together, strict=True):
        (alone,) = detect(image[None])
        assert {name: len(seen) for name, seen in alone.items()} == {name: len(seen) for name, seen in found.items()}
        for name, seen in found.items():
            assert name in NAMES
            for a, b in zip(seen, alone[name], strict=True):
                assert a.score == pytest.approx(b.score, abs=1e-4) and a.score >= 0.3
                assert a.mask.shape == (48, 64) and a.box == enclose_mask(a.mask)


def test_a_detector_of_other_classes_is_refused(tiny_mask2former, tmp_path):
    config = json.loads((tiny_mask2former / "config.json").read_text())
    config["id2label"] = {str(n): f"thing {n}" for n in range(80)}
    config["label2id"] = {f"thing {n}": n for n in range(80)}
    (tiny_mask2former / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="from person to toothbrush"):
        Detector(tiny_mask2former, "cpu")
    with pytest.raises(InputMissing, match=r"has no config\.json"):
        Detector(tmp_path / "nowhere", "cpu")


def test_an_object_is_cut_out_on_grey(rng):
    image = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    mask = np.zeros((20, 30), dtype=bool)
    mask[4:9, 10:17] = True
    mask[5, 12] = False
    cut = crop(image, Detection(enclose_mask(mask), 0.9, mask))
    assert cut.shape == (3, 5, 7)
    assert torch.equal(cut[:, 1, 2], torch.full((3,), GREY))
    own = torch.from_numpy(mask[4:9, 10:17])
    assert torch.equal(cut[:, own], image[:, 4:9, 10:17][:, own])


def test_colours_are_clips_nearest_words(tiny_open_clip):
    """Each object's crop against 10 colours of 3 templates each, by open_clip itself."""
    import open_clip

    folder, model = tiny_open_clip()
    image = torch.rand(3, 32, 64, generator=torch.Generator().manual_seed(2))
    halves = [Detection((0, 0, 32, 32), 0.9), Detection((32, 0, 64, 32), 0.8)]
    found = ColourClassifier(folder, "cpu")(image, "dog", halves)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    expected = []
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    with torch.no_grad():
        words = []
        for colour in COLOURS:
            texts = [
                f"a photo of a {colour} dog",
                f"a photo of a {colour}-colored dog",
                f"a photo of a {colour} object",
            ]
            word = model.encode_text(tokenizer(texts), normalize=True).mean(0)
            words.append(word / word.norm())
        for half in (image[:, :, :32], image[:, :, 32:]):
            pixels = (half - mean[:, None, None]) / std[:, None, None]
            expected.append(
                COLOURS[int((model.encode_image(pixels[None], normalize=True) @ torch.stack(words).T).argmax())]
            )
    assert found == expected


def test_the_metric_judges_images(tiny_mask2former, tiny_open_clip, rng):
    addresses = {"mask2former": str(tiny_mask2former), "clip-vit-l-14": str(tiny_open_clip()[0])}
    records = [{**metadata(rng, tag), "prompt": f"a {tag}"} for tag in TAGS]
    loaded = load_metrics(("geneval",), records, sources=RewardSources(addresses))
    (metric,) = loaded.metrics
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    images[4, 0, 0, 0] = torch.nan
    scores, lines = judge_images(metric, images, records)
    assert (
        loaded.missing == {}
        and set(scores["geneval"][[0, 1, 2, 3, 5]]) <= {0.0, 1.0}
        and np.isnan(scores["geneval"][4])
    )
    assert [each.correct for each in lines] == [score == 1 for score in scores["geneval"]]
    assert lines[4].reason == "the image is not a number"
    assert [json.loads(each.metadata) for each in lines] == records


def test_a_repository_of_open_clips_is_fetched_with_its_weights():
    from huggingface_hub.utils import filter_repo_objects

    there = ["README.md", "open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    assert list(filter_repo_objects(there, allow_patterns=list(weights.FILES))) == there[1:3]
