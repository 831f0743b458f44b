"""The CLIP score with and without DMD2's prefix, against plain open_clip; and what each reward is described as."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import image_transform
from PIL import Image

from dmdr.config import reward_weights
from dmdr.metrics.description import describe_metrics
from dmdr.rewards.load import load_reward
from dmdr.rewards.open_clip import tokenize_prefixed
from dmdr.rewards.preprocess import CLIP_MEAN, CLIP_STD
from dmdr.rewards.sources import RewardSources

BEGIN, END, LENGTH = 49406, 49407, 77
PREFIX = "A photo depicts "
PROMPTS = [
    "a red cat",
    "Two dogs, under a table!",
    "",
    "水彩画 of a fox 🦊",
    *("cat " * n for n in (71, 72, 73, 74, 75, 300)),
]


@pytest.fixture
def clip(tmp_path):
    """A tiny open_clip folder and the model in it."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": LENGTH, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    torch.manual_seed(0)
    model = open_clip.CLIP(**config).eval()
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    return str(tmp_path), model


def dmd2s(prompt: str) -> list[int]:
    """Token by token: what DMD2's compute_clip_score makes of a prompt."""
    vocabulary = open_clip.SimpleTokenizer()
    own = vocabulary.encode(prompt)
    whole = [BEGIN, *own[: LENGTH - 2], END]  # the tokenizer cuts first
    whole = [BEGIN, *vocabulary.encode(PREFIX), *whole[1:]][:LENGTH]
    if len(whole) == LENGTH:
        whole[-1] = END
    return whole + [0] * (LENGTH - len(whole))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_prefix_stands_behind_the_begin(prompt):
    tokenizer = open_clip.SimpleTokenizer()
    (tokens,) = tokenize_prefixed([prompt], PREFIX, tokenizer).tolist()
    assert tokens == dmd2s(prompt) and len(tokens) == LENGTH
    assert tokens[0] == BEGIN and tokenizer.decode(tokens[1:4]).strip() == "a photo depicts"
    end = tokens.index(END)
    assert end <= 76 and not any(tokens[end + 1 :])
    own = tokenizer.encode(prompt)
    assert tokens[4:end] == own[: LENGTH - 5] and (end == 76) == (len(own) >= 72)


def test_prompts_of_several_lengths_are_prefixed_together():
    tokenizer = open_clip.SimpleTokenizer()
    assert tokenize_prefixed(PROMPTS, PREFIX, tokenizer).tolist() == [dmd2s(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(("name", "tokens"), [("clip-score", None), ("clip-score-dmd2", dmd2s)])
def test_score_is_100_times_plain_open_clips_cosine(clip, name, tokens):
    """open_clip's own transform of 8-bit images that need no resizing, its tokenizer and its encoders."""
    folder, model = clip
    rng = np.random.default_rng(3)
    pictures = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in PROMPTS]
    transform = image_transform(32, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)
    asked = open_clip.tokenize(PROMPTS) if tokens is None else torch.tensor([tokens(each) for each in PROMPTS])
    with torch.no_grad():
        seen = F.normalize(model.encode_image(torch.stack([transform(each) for each in pictures])), dim=-1)
        read = F.normalize(model.encode_text(asked), dim=-1)
    images = torch.stack([torch.from_numpy(np.array(each)).permute(2, 0, 1) for each in pictures]) / 255
    reward = load_reward(name, sources=RewardSources({"clip-score": folder}))
    torch.testing.assert_close(reward(images, PROMPTS), 100 * (seen * read).sum(-1), atol=1e-4, rtol=1e-5)
    assert reward.name == name


def test_the_prefix_changes_the_score(clip):
    plain, dmd2 = (
        load_reward(name, sources=RewardSources({"clip-score": clip[0]})) for name in ("clip-score", "clip-score-dmd2")
    )
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert (plain(image, ["a red cat"]) - dmd2(image, ["a red cat"])).abs() > 1e-3


def test_both_scores_read_one_set_of_weights():
    assert reward_weights.OF_REWARD["clip-score-dmd2"] == reward_weights.OF_REWARD["clip-score"] == ("clip-score",)
    descriptions = describe_metrics(("clip-score", "clip-score-dmd2"), RewardSources())
    plain, dmd2 = descriptions["clip-score"], descriptions["clip-score-dmd2"]
    assert plain.prefix == "none" and dmd2.prefix == PREFIX
    assert replace(plain, prefix=PREFIX) == dmd2
    assert list(dmd2.to_facts()) == ["model", "weights", "scale", "prefix"]
