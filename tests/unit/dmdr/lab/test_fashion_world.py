"""The world of tinted garments: colours in closed form, prompts apart, a judge that nothing was trained on.

What needs the images themselves is skipped where the Debian package dataset-fashion-mnist is not installed.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from dmdr.config.reward_weights import FASHION
from dmdr.errors import ConfigError, DataError, InputMissing
from dmdr.lab import build
from dmdr.lab.fashion import classifier, garments
from dmdr.lab.fashion.judge_metric import FashionJudge
from dmdr.lab.fashion.prompts import HELD_OUT_PAIRS, fashion_prompts
from dmdr.lab.fashion.reward import write_wrong_caption
from dmdr.lab.fashion.teacher import RECIPE, build_fashion, encode_garment
from dmdr.lab.fashion.vocabulary import CLASSES, PLURAL, caption
from dmdr.lab.fashion.wardrobe import sample_garments
from dmdr.lab.fashion.world import tint, untint
from dmdr.lab.prompts import lab_prompts
from dmdr.lab.vocabulary import COLORS
from dmdr.lab.world import BACKGROUND, SIZE
from dmdr.metrics.load import judge_images, load_metrics
from dmdr.rewards.load import load_reward
from dmdr.teacher.load import find_teacher, load_teacher
from stages.prompt_sources.lines import Lines
from stages.prompt_sources.sources import digest_source, read_source

needs_images = pytest.mark.skipif(
    not garments.FOLDER.is_dir(), reason="needs the Debian package dataset-fashion-mnist, which is not installed"
)


def blobs(count: int) -> np.ndarray:
    """Grey ellipses with some texture, (count, 32, 32) uint8: no garments, but such that have a colour."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE] - 15.5
    wide, high = rng.uniform(5, 13, size=(2, count, 1, 1))
    inside = (x / wide) ** 2 + (y / high) ** 2 <= 1
    return (inside * rng.integers(40, 256, size=(count, SIZE, SIZE))).astype(np.uint8)


def pixels(images: np.ndarray) -> torch.Tensor:
    """(B, 32, 32, 3) uint8 -> (B, 3, 32, 32) in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def asked(name: str, color: str) -> dict:
    return {"prompt": f"{color} {name}", "tag": "colors", "include": [{"class": name, "count": 1, "color": color}]}


def test_lists_share_no_prompt_and_hold_pairs_out():
    train, held_out = fashion_prompts("train"), fashion_prompts("held-out")
    texts = {record["prompt"] for record in (*train, *held_out)}
    assert len(texts) == len(train) + len(held_out) and len(held_out) >= 300
    pairs = [{(r["include"][0]["color"], r["include"][0]["class"]) for r in records} for records in (train, held_out)]
    assert not pairs[0] & HELD_OUT_PAIRS and pairs[1] >= HELD_OUT_PAIRS
    assert pairs[0] | HELD_OUT_PAIRS == {(color, name) for color in COLORS for name in CLASSES}
    for record in held_out:
        need = record["include"][0]
        assert record["unseen"] == ((need["color"], need["class"]) in HELD_OUT_PAIRS)


def test_captions_have_the_right_article():
    captions = {name: caption(asked(name, "red")) for name in CLASSES}
    assert captions.pop(PLURAL) == "red trousers"
    assert all(text == f"a red {name}" for name, text in captions.items())


def test_untinting_gives_the_garment_and_its_colour_back():
    for color in COLORS:
        grey = blobs(20)
        found = [untint(image) for image in tint(grey, [color] * len(grey))]
        assert {each.color for each in found} == {color} and min(each.share for each in found) > 0.999
        assert np.abs(np.stack([each.garment for each in found]) * 255 - grey).max() < 2


def test_a_motley_or_blank_image_has_no_colour():
    red, blue = (tint(blobs(1), [color])[0] for color in ("red", "blue"))
    motley = np.concatenate([red[:, : SIZE // 2], blue[:, SIZE // 2 :]], axis=1)
    assert untint(motley).color is None and 0.3 < untint(motley).share < 0.7
    blank = np.broadcast_to(np.uint8(BACKGROUND), (SIZE, SIZE, 3))
    assert (untint(blank).color, untint(blank).share) == (None, 0.0)
    _, (line,) = FashionJudge()(pixels(blank[None].copy()), [asked("dress", "red")])
    assert line.correct is False and "found nothing" in line.reason and json.loads(line.details) == {}
    with pytest.raises(ValueError, match="uint8"):
        untint(motley / 255.0)


@needs_images
def test_every_real_garment_shows_its_tint():
    images, labels = garments.read_garments("test")
    assert images.shape == (10_000, SIZE, SIZE) and np.bincount(labels).tolist() == [1000] * len(CLASSES)
    colors = [list(COLORS)[index] for index in np.random.default_rng(1).integers(len(COLORS), size=len(images))]
    seen = [untint(image).color for image in tint(images, colors)]
    assert seen == colors


def test_the_shipped_classifier_is_small_and_scored():
    files = [classifier.FOLDER / f"{classifier.NAME}.{kind}" for kind in ("json", "safetensors")]
    assert sum(file.stat().st_size for file in files) < 300_000
    weights = load_file(classifier.FOLDER / f"{classifier.NAME}.safetensors").values()
    assert {tensor.dtype for tensor in weights if tensor.is_floating_point()} == {torch.float16}
    assert json.loads((classifier.FOLDER / f"{classifier.NAME}.json").read_text())["test_accuracy"] > 0.88


@needs_images
def test_the_judge_passes_real_garments_and_fails_the_neighbours():
    records, images = sample_garments("held-out", 500, np.random.default_rng(2))
    figures, lines = FashionJudge()(images.float() / 255, records)
    assert figures["color"].all() and figures["class"].mean() > 0.85
    assert [line.correct for line in lines] == figures["strict"].astype(bool).tolist()
    moved = FashionJudge()(images.roll(1, 0).float() / 255, records)[0]
    assert moved["strict"].mean() < 0.1 and moved["color"].mean() < 0.25 and moved["class"].mean() < 0.2


def test_the_judge_says_what_is_wrong():
    image = pixels(tint(blobs(1), ["green"]))
    metric = FashionJudge()
    _, (line,) = metric(image, [asked("bag", "green")])
    (name,) = json.loads(line.details)  # whatever the blob looks like
    other = next(each for each in CLASSES if each != name)
    records = [asked(name, "green"), asked(name, "red"), asked(other, "green")]
    figures, lines = judge_images(metric, image.expand(3, -1, -1, -1), records)
    assert {figure: scores.tolist() for figure, scores in figures.items()} == {
        "strict": [1, 0, 0],
        "color": [1, 0, 1],
        "class": [1, 1, 0],
    }
    assert [line.reason for line in lines] == [
        "",
        f"expected red {name}>=1, found green",
        f"expected {other}>=1, found {name}",
    ]
    keys = {"tag", "prompt", "correct", "reason", "metadata", "details"}  # and the file name, which evaluate knows
    assert all(
        set(line.to_json()) == keys and json.loads(line.metadata) == r for line, r in zip(lines, records, strict=True)
    )
    ((x0, y0, x1, y1, certainty),) = json.loads(lines[0].details)[name]
    assert 0 <= x0 < 16 < x1 <= SIZE and 0 <= y0 < 16 < y1 <= SIZE and 0 < certainty <= 1


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([{"prompt": "a dog"}], "none of the 1 evaluation prompts"),
        (list(lab_prompts("held-out")[:20]), "evaluate on fashion:held-out"),
        ([asked("dog", "red")], "ask for something else, for example 'red dog'"),
        ([asked("bag", "pink")], "in red, green"),
    ],
)
def test_prompts_of_another_world_are_refused(records, said):
    with pytest.raises(ConfigError, match=said):
        load_metrics(("fashion-judge",), records)


def test_the_judge_refuses_images_of_another_size():
    with pytest.raises(ConfigError, match="16x16"):
        FashionJudge()(torch.zeros(1, 3, 16, 16), [asked("bag", "red")])


def test_idx_files_are_read_whole_or_not_at_all(tmp_path: Path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    raw = bytes((0, 0, 8, 3)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path = tmp_path / "some-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(raw))
    assert (garments.read_idx(path, 3) == array).all()
    for broken in (gzip.compress(raw)[:-9], gzip.compress(raw[:-1]), gzip.compress(raw[:6]), gzip.compress(b""), b"no"):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="install"):
            garments.read_idx(path, 3)
    with pytest.raises(InputMissing, match="apt-get install dataset-fashion-mnist"):
        garments.read_idx(tmp_path / "gone.gz", 3)


def test_building_without_the_images_is_one_clear_line(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(garments, "FOLDER", tmp_path)
    for what in ("fashion", "fashion-rewards", "fashion-judge"):
        assert build.main([what, "--out", str(tmp_path / "out")]) == 66
        assert "apt-get install dataset-fashion-mnist" in capsys.readouterr().err.splitlines()[-1]


def test_the_lists_are_prompt_sources():
    for name in ("train", "held-out"):
        lines = Lines(f"fashion:{name}", say=lambda line: None)
        records = list(read_source(f"fashion:{name}", "prompt", lines))
        assert [r["prompt"] for r in records] == [r["prompt"] for r in fashion_prompts(name)] and lines.bad == 0
        assert all(len(r["include"]) == 1 and r["tag"] == "colors" for r in records)
    assert digest_source("fashion:train") != digest_source("fashion:held-out")
    with pytest.raises(ConfigError, match="fashion:held-out"):
        digest_source("fashion:nope")


def test_wrong_captions_are_wrong_in_one_thing():
    rng = np.random.default_rng(4)
    for record in fashion_prompts("held-out"):
        words = set(write_wrong_caption(record, rng).split())
        need = record["include"][0]
        assert ((need["color"] in words) + (need["class"] in words)) == 1
        assert len(words & set(COLORS)) == 1 == len(words & set(CLASSES))
        assert not any({color, name} <= words for color, name in HELD_OUT_PAIRS)


@pytest.mark.parametrize("name", FASHION)
def test_rewards_know_colours_and_have_a_gradient(name):
    reward = load_reward(name)
    colors = list(COLORS) * 3
    images = pixels(tint(blobs(len(colors)), colors)).requires_grad_(True)
    scores = torch.stack([reward(images, [f"a {color} bag"] * len(colors)) for color in COLORS], dim=1)
    named = scores.argmax(1).tolist()
    assert np.mean([list(COLORS)[index] == color for index, color in zip(named, colors, strict=True)]) > 0.8
    scores.sum().backward()
    assert images.grad.abs().sum() > 0


@needs_images
@pytest.mark.parametrize("name", FASHION)
def test_rewards_tell_right_from_wrong_captions(name):
    reward, rng = load_reward(name), np.random.default_rng(7)
    records, images = sample_garments("held-out", 300, rng)
    right = reward(images.float() / 255, [record["prompt"] for record in records])
    wrong = reward(images.float() / 255, [write_wrong_caption(record, rng) for record in records])
    assert right.shape == (300,) and (right > wrong).float().mean() > 0.9


def test_the_two_rewards_differ_in_architecture_and_the_unknown_is_told_all():
    conv, mixer = (load_reward(name) for name in FASHION)
    assert not {n for n, _ in conv.image.named_parameters()} & {n for n, _ in mixer.image.named_parameters()}
    with pytest.raises(ConfigError, match="lab-conv, lab-mixer, fashion-conv, fashion-mixer"):
        load_reward("lab-cnov")


def test_shipped_teacher_is_small_plain_and_imperfect():
    folder = find_teacher("lab:fashion")
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 6e6
    weights = [tensor for file in folder.rglob("*.safetensors") for tensor in load_file(file).values()]
    assert weights and all(tensor.dtype == torch.float16 for tensor in weights)
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red sneaker", num_inference_steps=2, guidance_scale=3.0, output_type="np").images
    assert image.shape == (1, SIZE, SIZE, 3)
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["teacher"]["images"] >= 1000
    assert 0.45 < scores["teacher"]["strict"] < 0.8
    assert scores["teacher"]["strict"] > scores["naive, 4 steps"]["strict"] + 0.1


def test_text_encoders_name_colour_and_class():
    """A linear map, fitted in closed form to training prompts, reads held-out ones, unseen pairs too."""
    backbone = load_teacher(find_teacher("lab:fashion"))

    def states_and_classes(records) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = torch.cat([item["pooled"] for item in backbone.encode([r["prompt"] for r in records])[0]])
        return torch.cat([pooled, torch.ones(len(pooled), 1)], 1), torch.tensor([encode_garment(r) for r in records])

    states, classes = states_and_classes(fashion_prompts("train"))
    asked_for, right = states_and_classes(fashion_prompts("held-out"))
    for place in range(2):
        one_hot = torch.nn.functional.one_hot(classes[:, place]).float()
        found = (asked_for @ torch.linalg.lstsq(states, one_hot).solution).argmax(1)
        assert (found == right[:, place]).float().mean() > 0.98


@needs_images
def test_a_teacher_is_built_from_its_recipe(tmp_path: Path):
    """Every step of the real recipe, few times: the folder loads as it is, and training reached the network's end."""
    few = {"text": {"steps": 20}, "vae": {"steps": 4, "warmup": 1}, "transformer": {"steps": 4, "warmup": 1}}
    recipe = {**RECIPE, "images": 128, **{part: {**RECIPE[part], **change} for part, change in few.items()}}
    with torch.random.fork_rng():
        build_fashion(tmp_path, lambda line: None, recipe)
    assert json.loads((tmp_path / "recipe.json").read_text()) == recipe
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.proj_out.weight.abs().max() > 0, "it starts at zero"
    image = pipe("a red sneaker", num_inference_steps=2, guidance_scale=3.0, output_type="np").images
    assert image.shape == (1, SIZE, SIZE, 3) and np.isfinite(image).all()


def test_what_is_trained_never_imports_the_judge():
    folder = Path(garments.__file__).parent
    for name in ("garments", "world", "prompts", "wardrobe", "teacher", "reward"):
        text = (folder / f"{name}.py").read_text()
        assert "fashion.judge" not in text and "fashion.classifier" not in text and "fashion_judge" not in text, name
