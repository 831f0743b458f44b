"""Reward models as their libraries run them: preprocessing, scores and gradients on tiny models of the real classes."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import open_clip
import pytest
import torch
import torch.nn.functional as F
import yaml
from open_clip.transform import image_transform
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision
from transformers import CLIPImageProcessorPil

from dmdr.config import reward_weights
from dmdr.config.evaluation import JUDGES
from dmdr.config.load import load_config
from dmdr.errors import ConfigError, DataError, InputMissing
from dmdr.metrics import load as loadable
from dmdr.metrics.description import describe_metrics
from dmdr.rewards import open_clip as open_clip_rewards
from dmdr.rewards import weights
from dmdr.rewards.checkpoint import read_linear
from dmdr.rewards.load import load_reward
from dmdr.rewards.preprocess import CLIP_MEAN, CLIP_STD, normalize, resize_and_crop, resize_and_pad, resize_to_square
from dmdr.rewards.sources import RewardSources
from stages.store.artifacts import Artifact
from stages.store.inputs import fingerprint_inputs
from tests.support.tiny_rewards import photo, predictor, tensor
from tests.support.trained_run import context_for, run_stage

SIZES = [(224, 224), (300, 200), (97, 256), (512, 512), (1024, 768)]
PROMPTS = ["a red cat", "two dogs under a table", "a red cat", "水彩画 of a fox 🦊"]


@pytest.mark.parametrize("size", SIZES)
def test_hpsv2_preprocess_is_the_packages(size):
    """hpsv2 1.2.0 on current libraries: to tensor, longest side by torchvision's antialiased bicubic, zero padding."""
    picture = photo(*size)
    image = vision.to_tensor(picture)
    scale = 224 / max(size)
    height, width = (round(side * scale) for side in size)
    small = vision.resize(image, [height, width], InterpolationMode.BICUBIC, antialias=True)
    down, right = 224 - height, 224 - width
    framed = vision.pad(small, [right // 2, down // 2, right - right // 2, down - down // 2], fill=0)
    expected = vision.normalize(framed, CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(normalize(resize_and_pad(tensor(picture), 224))[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("ours", "mode"), [(resize_and_crop, "shortest"), (resize_to_square, "squash")])
def test_preprocess_is_open_clips_but_for_its_rounding_to_bytes(size, ours, mode):
    picture = photo(*size)
    theirs = image_transform(
        224, is_train=False, mean=CLIP_MEAN, std=CLIP_STD, resize_mode=mode, interpolation="bicubic"
    )
    found = normalize(ours(tensor(picture), 224))[0]
    assert (found - theirs(picture)).abs().max() < 2.1 / 255 / min(CLIP_STD)  # each of two passes rounds


def test_architectures_are_in_open_clips_list():
    for kind in open_clip_rewards.KINDS.values():
        config = open_clip.get_model_config(kind.architecture)
        assert config["vision_cfg"]["image_size"] == 224
    assert open_clip.get_model_config(open_clip_rewards.KINDS["dfn-clip"].architecture)["quick_gelu"] is True
    assert "quick_gelu" not in open_clip.get_model_config(open_clip_rewards.KINDS["hpsv2.1"].architecture)


@pytest.mark.parametrize("name", open_clip_rewards.KINDS)
def test_score_is_100_times_open_clips_cosine(tiny_open_clip, name):
    folder, model = tiny_open_clip()
    reward = load_reward(name, sources=RewardSources({name: str(folder)}))
    images = torch.cat([tensor(photo(40, 40, seed)) for seed in range(4)])
    shape = {"hpsv2.1": resize_and_pad, "dfn-clip": resize_to_square, "clip-score": resize_and_crop}[name]
    with torch.no_grad():
        image = F.normalize(model.encode_image(normalize(shape(images, 32))), dim=-1)
        text = F.normalize(model.encode_text(open_clip.tokenize(PROMPTS)), dim=-1)
    torch.testing.assert_close(reward(images, PROMPTS), 100 * (image * text).sum(-1), atol=1e-4, rtol=1e-5)
    assert reward.name == name and reward.differentiable


def test_a_single_file_has_the_architecture_of_its_reward(tiny_open_clip, monkeypatch):
    folder, model = tiny_open_clip()
    small = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    open_clip.factory._MODEL_CONFIGS["tiny-for-test"] = small
    kind = replace(open_clip_rewards.KINDS["hpsv2.1"], architecture="tiny-for-test")
    monkeypatch.setitem(open_clip_rewards.KINDS, "hpsv2.1", kind)
    try:
        file = folder / "open_clip_pytorch_model.bin"
        ours, whole = (load_reward("hpsv2.1", sources=RewardSources({"hpsv2.1": str(path)})) for path in (file, folder))
        images = torch.cat([tensor(photo(48, 32, seed)) for seed in range(4)])
        assert torch.equal(ours(images, PROMPTS), whole(images, PROMPTS))
    finally:
        del open_clip.factory._MODEL_CONFIGS["tiny-for-test"]


def test_prompts_are_encoded_once_and_the_oldest_are_dropped(tiny_open_clip, monkeypatch):
    monkeypatch.setattr("dmdr.rewards.dual_encoder.KEPT_PROMPTS", 4)
    folder, _ = tiny_open_clip()
    reward = load_reward("dfn-clip", sources=RewardSources({"dfn-clip": str(folder)}))
    encoded, encode = [], reward.encode_prompts
    reward.encode_prompts = lambda prompts: encoded.extend(prompts) or encode(prompts)
    images = tensor(photo(32, 32)).expand(4, -1, -1, -1)
    first = reward(images, PROMPTS)
    assert sorted(encoded) == sorted(set(PROMPTS))  # 3: one stands twice
    assert torch.equal(reward(images, PROMPTS), first) and len(encoded) == 3
    reward(images[:2], ["a", "b"])
    assert len(reward.features) == 4 and len(encoded) == 5
    torch.testing.assert_close(reward(images, PROMPTS), first)  # in another batch, so not to the bit
    assert len(encoded) == 6  # the one that had been forgotten


def test_gradient_reaches_the_pixels_and_is_that_of_the_score(tiny_open_clip):
    """Against finite differences in the image's own direction, in float64 on a smooth image."""
    folder, _ = tiny_open_clip()
    reward = load_reward("hpsv2.1", sources=RewardSources({"hpsv2.1": str(folder)}))
    images = tensor(photo(48, 48)).requires_grad_()
    reward(images, ["a red cat"]).sum().backward()
    direction = F.normalize(images.grad.flatten(), dim=0).view_as(images)
    with torch.no_grad():
        step = 0.5
        up, down = (reward(images + sign * step * direction, ["a red cat"]).item() for sign in (1, -1))
    slope = (up - down) / (2 * step)
    assert slope == pytest.approx(images.grad.norm().item(), rel=0.02)


def test_pickscore_is_what_transformers_computes(tiny_transformers_clip):
    folder, model = tiny_transformers_clip()
    reward = load_reward("pickscore", sources=RewardSources({"pickscore": str(folder)}))
    pictures = [photo(32, 32, seed) for seed in range(4)]  # no resizing: the processors agree but for it
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)(pictures, return_tensors="pt").pixel_values
    tokens = open_clip.tokenize(PROMPTS)  # padded by 0 behind the end, where a causal encoder does not look
    with torch.no_grad():
        found = model(input_ids=tokens, pixel_values=pixels)
    ours = reward(torch.cat([tensor(each) for each in pictures]), PROMPTS)
    torch.testing.assert_close(ours, found.logits_per_image.diag(), atol=2e-4, rtol=1e-4)


def test_a_long_prompt_is_cut_where_the_encoder_ends(tiny_transformers_clip, tiny_open_clip):
    hf, clip = tiny_transformers_clip()[0], tiny_open_clip()[0]
    image = tensor(photo(32, 32))
    for name, folder in (("pickscore", hf), ("hpsv2.1", clip)):
        reward = load_reward(name, sources=RewardSources({name: str(folder)}))
        assert reward(image, ["cat " * 500]).isfinite().all()
        assert torch.equal(reward(image, ["cat " * 500]), reward(image, ["cat " * 500 + "dog"]))


def test_aesthetic_is_the_mlp_multiplied_out(tiny_transformers_clip, tmp_path):
    folder, model = tiny_transformers_clip()
    mlp, head = predictor(16), tmp_path / "aesthetic-model.pth"
    torch.save({f"layers.{key}": value for key, value in mlp.state_dict().items()}, head)
    addresses = {"aesthetic": str(head), "clip-vit-large-patch14": str(folder)}
    reward = load_reward("aesthetic", sources=RewardSources(addresses))
    images = torch.cat([tensor(photo(32, 32, seed)) for seed in range(4)]).requires_grad_()
    with torch.no_grad():
        features = F.normalize(model.get_image_features(pixel_values=normalize(images)).pooler_output, dim=-1)
        expected = mlp(features).squeeze(-1)
    found = reward(images, PROMPTS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found.sum().backward()
    assert images.grad.isfinite().all() and images.grad.abs().max() > 0
    vector = F.normalize(torch.randn(7, 16, dtype=torch.float64), dim=-1)
    weight, bias = read_linear({f"layers.{key}": value for key, value in mlp.state_dict().items()}, "layers.", head)
    torch.testing.assert_close(vector @ weight + bias, mlp.double()(vector).squeeze(-1), atol=1e-7, rtol=1e-6)


def test_broken_weights_are_refused_in_one_line(tiny_open_clip, tiny_transformers_clip, tmp_path):
    folder, _ = tiny_open_clip()
    file = folder / "open_clip_pytorch_model.bin"

    def from_(name: str, path) -> None:
        load_reward(name, sources=RewardSources({name: str(path)}))

    with pytest.raises(InputMissing, match="weights.dfn-clip nowhere does not exist; .*hub:apple/DFN5B"):
        from_("dfn-clip", "nowhere")
    with pytest.raises(ConfigError, match="weights.dfn-clip hub:a/b is not hub:OWNER/NAME@COMMIT"):
        from_("dfn-clip", "hub:a/b")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputMissing, match="open_clip_config.json"):
        from_("dfn-clip", empty)
    with pytest.raises(DataError, match="cannot be loaded as a CLIPModel"):
        from_("pickscore", empty)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        from_("dfn-clip", folder)
    other, model = tiny_open_clip(name="other", width=48)
    tensors = model.state_dict()
    torch.save(tensors, file)
    with pytest.raises(DataError, match=r"visual\.\S+ is \(.*48.*belong to another model"):
        from_("dfn-clip", folder)
    right = dict(tiny_open_clip(name="right")[1].state_dict())
    del right["ln_final.weight"]
    torch.save(right, file)
    with pytest.raises(DataError, match="lack ln_final.weight"):
        from_("dfn-clip", folder)
    hf, _ = tiny_transformers_clip()
    head = tmp_path / "head.pth"
    torch.save({f"layers.{k}": v for k, v in predictor(768).state_dict().items()}, head)
    with pytest.raises(DataError, match="takes? 768 features, but the CLIP gives 16"):
        load_reward("aesthetic", sources=RewardSources({"aesthetic": str(head), "clip-vit-large-patch14": str(hf)}))


def test_an_archive_that_would_run_code_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    file = tmp_path / "weights.pt"
    torch.save({"state_dict": Harmful()}, file)
    with pytest.raises(DataError, match="cannot be read"):
        load_reward("hpsv2.1", sources=RewardSources({"hpsv2.1": str(file)}))
    assert not (tmp_path / "written").exists()


def test_every_address_is_pinned_and_every_name_has_a_loader():
    assert all(weights.hub.ADDRESS.fullmatch(address) for address in reward_weights.PINNED.values())
    assert {name for needed in reward_weights.OF_REWARD.values() for name in needed} == set(reward_weights.PINNED)
    assert set(JUDGES) == set(loadable.JUDGES)
    reported = reward_weights.OF_REWARD | reward_weights.OF_JUDGE
    descriptions = describe_metrics(tuple(reported), RewardSources({"vqa": "/somewhere/blip"}))
    assert len(descriptions) == sum(bool(needed) or name == "ocr" for name, needed in reported.items())
    assert "blip" in descriptions["dpg-bench"].weights and "somewhere" not in descriptions["dpg-bench"].weights
    clip_score = descriptions["clip-score"]
    assert (clip_score.model, clip_score.scale) == ("open_clip ViT-g-14, images cropped", 100.0)
    assert list(descriptions["dpg-bench"].to_facts()) == ["model", "weights", "scale"]
    for name, needed in reward_weights.OF_REWARD.items():
        with pytest.raises(InputMissing) if needed else nullcontext():
            load_reward(name, sources=RewardSources(dict.fromkeys(reward_weights.PINNED, "nowhere")))


@pytest.fixture
def weights_of(tiny_open_clip, tiny_transformers_clip, tiny_imagereward, tmp_path) -> dict[str, str]:
    """A tiny model of the real class for every reward that has weights."""
    head = tmp_path / "aesthetic-model.pth"
    torch.save({f"layers.{key}": value for key, value in predictor(16).state_dict().items()}, head)
    folders = {name: tiny_open_clip(seed, name)[0] for seed, name in enumerate(open_clip_rewards.KINDS)}
    folders |= {name: tiny_transformers_clip(name, 5)[0] for name in ("pickscore", "clip-vit-large-patch14")}
    return {name: str(path) for name, path in {**folders, "aesthetic": head, **tiny_imagereward[0]}.items()}


@pytest.mark.parametrize("algorithm", ["refl", "grpo"])
def test_a_run_trains_on_some_and_reports_all(tiny_config, tmp_path, weights_of, algorithm):
    every = [name for name, needed in reward_weights.OF_REWARD.items() if needed]
    training = yaml.safe_load(tiny_config().read_text())["joint"]
    shares = {"dfn-clip": 1.0, "hpsv2.1": 1.0}
    group = {} if algorithm == "refl" else {"branches": 2, "states": 1}
    rl = {"algorithm": algorithm, "weight": 1.0, "weight_is": "matched", "rewards": shares, **group}
    watch = {"reward": "pickscore", "every": 1, "prompts": 2}
    config = load_config(
        tiny_config(
            joint={**training, "rl": rl, "watch": watch},
            weights=weights_of,
            evaluate={"metrics": every, "batch_size": 4},
        )
    )
    for stage in ("prompts", "cold_start", "joint", "export"):
        run_stage(config, tmp_path / "runs", stage)
    card = json.loads((run_stage(config, tmp_path / "runs", "evaluate") / "scorecard.json").read_text())
    assert {metric["name"] for metric in card["metrics"]} == set(every)
    assert {metric["name"] for metric in card["metrics"] if metric["trained_on"]} == set(shares)
    used = Artifact(str(tmp_path / "runs"), "tiny", "joint").record().inputs
    assert {name for name in used if name.startswith("weights:")} == {f"weights:{n}" for n in (*shares, "pickscore")}

    moved = shutil.copytree(weights_of["dfn-clip"], tmp_path / "elsewhere")
    same = config.model_copy(update={"weights": {**weights_of, "dfn-clip": str(moved)}})
    assert fingerprint_inputs(same, "joint", str(tmp_path / "runs"), "tiny") == used
    other = config.model_copy(update={"weights": {**weights_of, "dfn-clip": weights_of["clip-score"]}})
    with pytest.raises(ConfigError, match="weights:dfn-clip"):
        context_for(other, tmp_path / "runs", "joint")


def test_a_config_names_rewards_and_weights_that_exist(tiny_config):
    training = yaml.safe_load(tiny_config().read_text())["joint"]
    with pytest.raises(ConfigError, match="unknown reward dnf-clip; did you mean dfn-clip?"):
        load_config(tiny_config(joint={**training, "rl": {**training["rl"], "rewards": {"dnf-clip": 1.0}}}))
    with pytest.raises(ConfigError, match="unknown reward lab-cheker; did you mean lab-checker?"):
        load_config(tiny_config(evaluate={"metrics": ["lab-cheker"]}))
    with pytest.raises(ConfigError, match=r"weights.dfn-clip is set but .* of this config read no weights; drop it"):
        load_config(tiny_config(weights={"dfn-clip": "somewhere"}))
