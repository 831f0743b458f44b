"""The lab: renders satisfy their captions by the checker, wrong captions do not, and no prompt is in both lists."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

import dmdr
from dmdr.config.reward_weights import LAB
from dmdr.errors import ConfigError
from dmdr.lab import denoising, flow
from dmdr.lab.captions import encode_scene, list_things
from dmdr.lab.checker import check, detect_objects
from dmdr.lab.denoising import build_denoising
from dmdr.lab.flow import build_flow
from dmdr.lab.prompts import HELD_OUT_PAIRS, lab_prompts
from dmdr.lab.reward import attack, contrastive_loss, write_wrong_caption
from dmdr.lab.vocabulary import PLURALS
from dmdr.lab.world import Thing, relative_position, render, render_images
from dmdr.rewards.load import load_reward
from dmdr.teacher.load import find_teacher, load_teacher

TAGS = {"single_object", "two_object", "counting", "colors", "position", "color_attr"}


def test_lists_share_no_prompt_and_hold_pairs_out():
    train, held_out = lab_prompts("train"), lab_prompts("held-out")
    texts = {record["prompt"] for record in train}
    assert len(texts) == len(train) and not texts & {record["prompt"] for record in held_out}
    assert len({record["prompt"] for record in held_out}) == len(held_out) >= 1000
    assert {record["tag"] for record in train} == {record["tag"] for record in held_out} == TAGS
    pairs = {(need.get("color"), need["class"]) for record in train for need in record["include"]}
    assert not pairs & HELD_OUT_PAIRS
    assert {(n.get("color"), n["class"]) for record in held_out for n in record["include"]} >= HELD_OUT_PAIRS


def test_checker_passes_renders_and_fails_the_neighbours_image():
    rng = np.random.default_rng(0)
    records = list(lab_prompts("held-out"))[:400]
    images = render_images(records, rng)
    right = [check(record, image) for record, image in zip(records, images, strict=True)]
    assert np.mean([v.strict for v in right]) > 0.98 and np.mean([v.soft for v in right]) > 0.98
    moved = [check(record, image) for record, image in zip(records, np.roll(images, 1, axis=0), strict=True)]
    assert np.mean([v.strict for v in moved]) < 0.05
    noisy = np.clip(images + rng.normal(0, 15, images.shape), 0, 255).astype(np.uint8)
    assert np.mean([check(r, i).strict for r, i in zip(records, noisy, strict=True)]) > 0.95


def test_checker_knows_what_was_drawn():
    """Against the scene itself: every thing found once, in its place, with its shape and colour."""
    scene = [Thing("circle", "red", 8, 8, 5), Thing("cross", "blue", 23, 9, 5.5), Thing("triangle", "white", 15, 24, 5)]
    seen = detect_objects(render(scene))
    assert {(s.shape, s.color) for s in seen} == {(t.shape, t.color) for t in scene}
    for thing in scene:
        box = next(s.box for s in seen if s.color == thing.color)
        assert box[0] <= thing.x <= box[2] and box[1] <= thing.y <= box[3]


@pytest.mark.parametrize(
    ("metadata", "strict", "soft"),
    [
        ({"include": [{"class": "circle", "count": 1}]}, True, 0.5),  # one asked, two there
        ({"include": [{"class": "circle", "count": 1, "color": "blue"}]}, False, 0.25),
        ({"include": [{"class": "cross", "count": 1}]}, False, 0.0),
        ({"include": [{"class": "circle", "count": 1}, {"class": "square", "count": 1}]}, True, 1.0),
        (
            {"include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}]},
            True,
            1.0,
        ),
        (
            {"include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["above", 0]}]},
            False,
            0.75,
        ),
        ({"include": [{"class": "circle", "count": 1}], "exclude": [{"class": "circle", "count": 2}]}, True, 0.5),
        ({"include": [{"class": "circle", "count": 2}], "exclude": [{"class": "circle", "count": 3}]}, False, 0.5),
    ],
)
def test_verdicts_on_a_red_circle_left_of_a_blue_square(metadata, strict, soft):
    image = render([Thing("circle", "red", 8, 16, 5), Thing("square", "blue", 24, 16, 5)])
    verdict = check({"tag": "any", **metadata}, image)
    assert verdict.strict is strict and verdict.soft == pytest.approx(soft)
    assert bool(verdict.reason) is not strict


def test_geneval_position_rule():
    at = {(x, y): (x - 4, y - 4, x + 4, y + 4) for x in (8, 16, 24) for y in (8, 16, 24)}
    assert relative_position(at[8, 16], at[24, 16]) == {"left of"}
    assert relative_position(at[16, 24], at[16, 8]) == {"below"}
    assert relative_position(at[24, 8], at[8, 24]) == {"right of", "above"}
    assert relative_position(at[8, 8], at[8, 8]) == set()


@pytest.mark.parametrize(
    ("name", "pipeline"), [("flow", StableDiffusion3Pipeline), ("denoising", StableDiffusionXLPipeline)]
)
def test_shipped_teacher_is_small_plain_and_scored(name, pipeline):
    folder = find_teacher(f"lab:{name}")
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 6e6
    weights = [tensor for file in folder.rglob("*.safetensors") for tensor in load_file(file).values()]
    assert weights and all(tensor.dtype == torch.float16 for tensor in weights)
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert isinstance(pipe, pipeline)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red circle", num_inference_steps=2, guidance_scale=3.0, output_type="np").images
    assert image.shape == (1, 32, 32, 3)
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["teacher"]["prompts"] >= 1000
    assert scores["teacher"]["strict"] > scores["naive, 4 steps"]["strict"] + 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "build", "few"),
    [
        (flow, build_flow, {"text": {"steps": 20}, "vae": {"steps": 4}, "transformer": {"steps": 6, "stop": 4}}),
        (denoising, build_denoising, {"unet": {"steps": 6, "stop": 4}}),
    ],
    ids=["flow", "denoising"],
)
def test_a_teacher_is_built_from_its_recipe(tmp_path, module, build, few):
    """Every step of the real recipe, few times: the folder loads as it is, and training reached the network's end."""
    parts = {part: {**module.RECIPE[part], "warmup": 1, **change} for part, change in few.items()}
    recipe = {**module.RECIPE, "renders": 128, **parts}
    lines: list[str] = []
    with torch.random.fork_rng():
        build(tmp_path, lines.append, recipe)
    assert json.loads((tmp_path / "recipe.json").read_text()) == recipe
    said = {line.split()[0] for line in lines}
    assert said == {"drawing", "network", *few} - {"transformer", "unet"}
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    backbone = load_teacher(tmp_path)
    last = backbone.network.proj_out if module is flow else backbone.network.conv_out
    assert last.weight.abs().max() > 0, "the transformer starts at zero"
    image = pipe("a red circle", num_inference_steps=2, guidance_scale=3.0, output_type="np").images
    assert image.shape == (1, 32, 32, 3) and np.isfinite(image).all()


def test_the_denoising_teacher_decodes_as_the_flow_teacher_does():
    """Its autoencoder is the same, with the shift of the latents moved into its own convolutions."""
    ours, other = (load_teacher(find_teacher(f"lab:{name}"), text=False) for name in ("denoising", "flow"))
    latents = torch.randn(2, *other.latent_shape, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(ours.decode(latents), other.decode(latents), atol=2e-3)  # float16 files


def test_things_stand_in_the_order_of_the_caption():
    for record in lab_prompts("train"):
        words = record["prompt"].split()
        places = [words.index(need["class"]) for need in list_things(record) if need["count"] == 1]
        assert places == sorted(places), record


@pytest.mark.slow
def test_text_encoders_name_what_captions_ask_for():
    """A linear map, fitted in closed form to training prompts, reads the scene of held-out ones, unseen pairs too."""
    backbone = load_teacher(find_teacher("lab:flow"))

    def states_and_classes(records) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = torch.cat([item["pooled"] for item in backbone.encode([r["prompt"] for r in records])[0]])
        return torch.cat([pooled, torch.ones(len(pooled), 1)], dim=1), torch.tensor([encode_scene(r) for r in records])

    states, classes = states_and_classes(lab_prompts("train")[:1500])
    held_out = [record for record in lab_prompts("held-out") if record["tag"] in ("position", "color_attr")]
    asked, right = states_and_classes(held_out)
    for place, name in enumerate(("shape", "color", "count", "second shape", "second color", "count", "relation")):
        one_hot = torch.nn.functional.one_hot(classes[:, place]).float()
        found = (asked @ torch.linalg.lstsq(states, one_hot).solution).argmax(1)
        assert (found == right[:, place]).float().mean() > 0.98, name


def test_wrong_captions_bring_in_no_held_out_pair():
    """A reward that met those as wrong captions alone would learn that they are always wrong."""
    rng = np.random.default_rng(5)
    for record in lab_prompts("train")[:1500]:
        words = write_wrong_caption(record, rng).split()
        pairs = {(color, noun) for color, noun in itertools.pairwise(words)}
        assert not pairs & {(c, form) for c, s in HELD_OUT_PAIRS for form in (s, PLURALS[s])}, " ".join(words)
        assert " ".join(words) != record["prompt"]


def test_attacks_stay_within_their_radius_and_raise_the_loss():
    reward = load_reward("lab-conv")
    rng, records = np.random.default_rng(6), list(lab_prompts("train"))[:24]
    images = torch.from_numpy(render_images(records, rng)).permute(0, 3, 1, 2).float() / 255
    asked = [[r["prompt"], *(write_wrong_caption(r, rng) for _ in range(5))] for r in records]
    captions = torch.stack([reward.embed_captions(each) for each in asked])
    moved = attack(reward, images, captions, radius=0.3)
    assert (moved - images).flatten(1).norm(dim=1).max() <= 0.3 + 1e-5
    assert contrastive_loss(reward, moved, captions) > contrastive_loss(reward, images, captions) + 0.01
    assert torch.equal(attack(reward, images, captions, radius=0.0), images)


@pytest.mark.parametrize("name", LAB)
def test_rewards_tell_right_from_wrong_captions(name):
    reward, rng = load_reward(name), np.random.default_rng(7)
    records = list(lab_prompts("held-out"))[:300]
    images = torch.from_numpy(render_images(records, rng)).permute(0, 3, 1, 2).float() / 255
    right = reward(images, [record["prompt"] for record in records])
    wrong = reward(images, [write_wrong_caption(record, rng) for record in records])
    assert right.shape == (300,) and (right > wrong).float().mean() > 0.8
    images.requires_grad_(True)
    reward(images, [record["prompt"] for record in records]).sum().backward()
    assert images.grad.abs().sum() > 0


def test_the_two_rewards_differ_in_architecture_and_the_unknown_is_refused():
    conv, vit = (load_reward(name) for name in LAB)
    assert not {n for n, _ in conv.image.named_parameters()} & {n for n, _ in vit.image.named_parameters()}
    with pytest.raises(ConfigError, match="lab-conv, lab-mixer"):
        load_reward("lab-cnov")


def test_no_training_code_imports_the_checker():
    """It judges only: its metric knows it, and nothing else does."""
    root = Path(dmdr.__file__).parent
    knows = {
        file.relative_to(root).as_posix()
        for file in root.rglob("*.py")
        if any(line.startswith(("from dmdr.lab.checker import", "import dmdr.lab.checker\n")) for line in file.open())
    }
    assert knows == {"lab/checker_metric.py"}
