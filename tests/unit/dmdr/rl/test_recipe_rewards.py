"""What rewards read and how they are mapped in the authors' recipe: prefixes, preferences, scales, the hinge."""

from __future__ import annotations

import pytest
import torch

from dmdr.config.prompt_record import PromptRecord
from dmdr.config.rl import DPO as DPOConfig
from dmdr.config.rl import Preference
from dmdr.config.rl import ReFL as ReFLConfig
from dmdr.errors import ConfigError
from dmdr.noise import noise_for
from dmdr.rewards.open_clip import load_open_clip
from dmdr.rewards.wording import Wording
from dmdr.rl.mixture import Mixture
from dmdr.rl.refl import ReFL
from dmdr.rollout import States, Window
from dmdr.shared_base import SharedBase
from dmdr.update import Batch
from tests.support.tiny_teachers import copy_teacher

PROMPTS = ["a red circle", "two blue squares"]
RECORDS: list[PromptRecord] = [{"prompt": prompt} for prompt in PROMPTS]
POSITIVE, NEGATIVE = ("Natural-lighting", "Detailed", "Realistic"), ("Painting", "CG Render", "Oil")
PREFERENCE = Preference(positive=POSITIVE, negative=NEGATIVE, k=0.1)


class ByLength:
    """Scores an image by its brightness and the length of its prompt; the gradient reaches the images."""

    name, differentiable = "by-length", True

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata=()) -> torch.Tensor:
        self.read += prompts
        return images.mean(dim=(1, 2, 3)) * torch.tensor([float(len(prompt)) for prompt in prompts])


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_a_preference_is_its_equation_on_unit_features(tiny_open_clip, images):
    """image . ((1 + k) text(P) - text(N)), with the encoders of open_clip; times 100, our unit of a cosine."""
    folder, model = tiny_open_clip()
    reward = load_open_clip("hpsv2.1", folder, "cpu")
    worn = Wording("hpsv2.1", 0, preference=PREFERENCE)
    positive, negative = worn.draw_words(PREFERENCE, 7)
    found = worn.score(reward, images, RECORDS, 7)
    with torch.no_grad():
        image = reward.embed_images(images)
        liked, unliked = (reward.embed_captions([f"{word}. {p}" for p in PROMPTS]) for word in (positive, negative))
    assert torch.allclose(found, 100 * (image * (1.1 * liked - unliked)).sum(-1), atol=1e-4)

    class Plain:  # the same reward through the way that any other takes
        name, differentiable = "plain", True

        def __call__(self, seen, prompts, metadata=()):
            return reward(seen, prompts)

    assert torch.allclose(found, worn.score(Plain(), images, RECORDS, 7), atol=1e-3)


def test_words_are_drawn_by_seed_and_update_alone():
    worn, again, other = Wording("r", 3, preference=PREFERENCE), Wording("r", 3), Wording("r", 4)
    words = [worn.draw_words(PREFERENCE, update) for update in range(60)]
    torch.randn(10)
    assert words == [again.draw_words(PREFERENCE, update) for update in range(60)]
    assert words != [other.draw_words(PREFERENCE, update) for update in range(60)]
    assert {positive for positive, _ in words} == set(POSITIVE) and {negative for _, negative in words} == set(NEGATIVE)
    assert len(set(words)) == 9, "each positive word meets each negative one"


def test_a_prefix_stands_before_the_prompts_of_its_reward_alone(images):
    reward, other = ByLength(), ByLength()
    Wording("a", 0, prefix="Realistic photo ").score(reward, images, RECORDS, 0)
    Wording("b", 0).score(other, images, RECORDS, 0)
    assert reward.read == [f"Realistic photo {prompt}" for prompt in PROMPTS] and other.read == PROMPTS


def make_refl(folder, monkeypatch, rewards: dict, **settings) -> tuple[ReFL, SharedBase]:
    monkeypatch.setattr("dmdr.rl.mixture.load_any_reward", lambda name, device, addresses: rewards[name])
    base = SharedBase(copy_teacher(folder), fake_rank=2, fake_scale=2.0, student_rank=None, seed=0)
    shares = settings.pop("shares", dict.fromkeys(rewards, 1.0))
    return ReFL(ReFLConfig(algorithm="refl", weight=1.0, rewards=shares, **settings), base, seed=5), base


def make_batch(base: SharedBase, update: int = 3) -> tuple[Window, Batch]:
    """Two trajectories of one step, and a batch of both."""
    x0 = noise_for(1, "x0", shape=(1, 2, *base.backbone.latent_shape))
    states = States(torch.ones(1), x0, x0)
    pairs = torch.arange(2)
    window = Window(states, {}, RECORDS, torch.tensor([1.0, 0.0]), 1.0, seed=5, stage="joint", update=update)
    return window, Batch(x0[0], x0[0], torch.ones(2), {}, pairs * 0, pairs, slice(0, 2), of=2)


def test_the_hinge_is_that_of_each_reward_in_its_scale(tiny_sd3_folder, monkeypatch):
    """L = sum of share * mean relu(margin - scale * score): closed for the one, open for the other."""
    rewards = {"high": ByLength(), "low": ByLength()}
    refl, base = make_refl(
        tiny_sd3_folder,
        monkeypatch,
        rewards,
        map="hinge",
        margin=0.7,
        scales={"low": 0.01},
        shares={"high": 0.3, "low": 5.0},
    )
    window, batch = make_batch(base)
    x0 = batch.x0.clone().requires_grad_(True)
    loss, figures = refl.build_objective(window).loss(x0, batch)
    with torch.no_grad():
        brightness = base.backbone.decode(batch.x0).mean(dim=(1, 2, 3))
    scores = brightness * torch.tensor([12.0, 16.0])
    assert (scores > 0.7).all() and (0.01 * scores < 0.7).all()
    expected = 5.0 * (0.7 - 0.01 * scores).mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert float(figures["reward/high"]) == pytest.approx(float(scores.mean()), rel=1e-5), "figures keep their unit"
    loss.backward()
    y0 = batch.x0.clone().requires_grad_(True)
    (-5.0 * 0.01 * ByLength()(base.backbone.decode(y0), PROMPTS)).mean().backward()
    assert torch.allclose(x0.grad, y0.grad, atol=1e-8), "an open hinge is linear, and a closed one has no gradient"


def test_refl_reads_what_the_config_puts_before_a_prompt(tiny_sd3_folder, monkeypatch):
    rewards = {"plain": ByLength(), "photo": ByLength(), "torn": ByLength()}
    refl, base = make_refl(
        tiny_sd3_folder, monkeypatch, rewards, prefixes={"photo": "Photo "}, preferences={"torn": PREFERENCE}
    )
    for reward in rewards.values():
        reward.read.clear()  # the plain images of the check
    for update in (3, 4):
        window, batch = make_batch(base, update)
        refl.build_objective(window).loss(batch.x0, batch)
    assert rewards["plain"].read == 2 * PROMPTS
    assert rewards["photo"].read == 2 * [f"Photo {prompt}" for prompt in PROMPTS]
    drawn = [Wording("torn", 5).draw_words(PREFERENCE, update) for update in (3, 4)]
    assert rewards["torn"].read == [f"{word}. {prompt}" for words in drawn for word in words for prompt in PROMPTS]


def test_dpo_mixes_and_scores_with_the_same_words(tiny_sd3_folder, monkeypatch):
    reward = ByLength()
    monkeypatch.setattr("dmdr.rl.mixture.load_any_reward", lambda name, device, addresses: reward)
    config = DPOConfig(
        algorithm="dpo", weight=1.0, rewards={"r": 2.0}, scales={"r": 0.5}, preferences={"r": PREFERENCE}
    )
    backbone = copy_teacher(tiny_sd3_folder)
    mixture = Mixture(config, backbone, differentiable=False, seed=5)
    x0 = noise_for(1, "x0", shape=(2, *backbone.latent_shape))
    reward.read.clear()
    scores = mixture.score_samples(x0, RECORDS, 1, update=9)
    assert {text.split(". ")[0] for text in reward.read} == set(Wording("r", 5).draw_words(PREFERENCE, 9))
    assert torch.equal(mixture.mix(scores), 2.0 * (0.5 * scores["r"]))


def test_a_preference_that_is_not_a_number_is_refused_before_the_first_step(tiny_sd3_folder, monkeypatch):
    class Broken(ByLength):
        def __call__(self, images, prompts, metadata=()):
            return super().__call__(images, prompts) * float("inf")

    with pytest.raises(ConfigError, match="torn gives"):
        make_refl(tiny_sd3_folder, monkeypatch, {"torn": Broken()}, preferences={"torn": PREFERENCE})
