"""What ReFL's gradient goes through: tiles against one whole tile, a tiny decoder, and how far apart gradients are."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from diffusers import AutoencoderTiny

from dmdr.config.identity import identity
from dmdr.config.load import load_config
from dmdr.config.rl import ReFL
from dmdr.errors import ConfigError, DataError, InputMissing
from dmdr.noise import noise_for
from dmdr.rewards.load import load_reward
from dmdr.rl import decoders
from dmdr.rl.refl import ReFL as Algorithm
from dmdr.rl.tiny_decoder import find_tiny_decoder
from dmdr.rollout import States, Window
from dmdr.shared_base import SharedBase
from dmdr.teacher.load import load_teacher
from dmdr.update import Batch
from stages.store.inputs import fingerprint_inputs
from tests.support.training_results import TRAINING

PROMPTS = ["a red circle", "two squares"]


def refl(**changes) -> ReFL:
    return ReFL(**{"algorithm": "refl", "weight": 1.0, "rewards": {"lab-conv": 1.0}, **changes})


def tiny_decoder(folder, channels: int = 4, blocks: int = 2):
    """A TAESD of two stages with random weights: latents of 8 x 8 become images of 16 x 16."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        widths, counts = (8,) * blocks, (1,) * blocks
        AutoencoderTiny(
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            num_encoder_blocks=counts,
            num_decoder_blocks=counts,
            latent_channels=channels,
        ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def backbone(tiny_sd3_folder):
    return load_teacher(tiny_sd3_folder)


def test_tiles_are_decoded_one_at_a_time_forward_and_backward(backbone):
    decoder, calls = decoders.load_decoder(refl(decoder="tiled"), backbone), []
    backbone.pipe.vae.decoder.register_forward_pre_hook(lambda module, given: calls.append(tuple(given[0].shape[2:])))
    latents = noise_for(1, "x", shape=(2, *backbone.latent_shape)).requires_grad_(True)
    images = decoder(latents)
    whole = backbone.decode(latents.detach())
    assert images.shape == whole.shape and not torch.equal(images, whole)
    tiles = calls[:-1]
    assert len(tiles) > 1 and all(max(size) <= 4 for size in tiles) and calls[-1] == (8, 8)
    images.sum().backward()
    assert len(calls) == 2 * len(tiles) + 1, "each tile once more in the backward pass"
    assert latents.grad.abs().amin(dim=(0, 1)).max() > 0
    assert torch.equal(backbone.decode(latents.detach()), whole), "the teacher's own decoder is as it was"


def test_a_decoder_without_context_is_the_same_in_tiles(backbone):
    """With convolutions of one pixel and no norm a tile knows all that it needs; blending equals changes nothing."""
    vae = backbone.pipe.vae
    vae.decoder = torch.nn.Sequential(torch.nn.Conv2d(4, 3, 1), torch.nn.Upsample(scale_factor=2))
    latents = noise_for(2, "x", shape=(2, *backbone.latent_shape))
    both = [latents.clone().requires_grad_(True) for _ in range(2)]
    images = [decoders.decode_tiled(backbone, both[0]), backbone.decode(both[1])]
    assert torch.allclose(*images, atol=1e-6)
    for each in images:
        each.square().sum().backward()
    assert torch.allclose(both[0].grad, both[1].grad, atol=1e-5)


def test_refl_trains_through_the_tiny_decoder(backbone, tmp_path):
    base = SharedBase(backbone, fake_rank=2, fake_scale=2.0, student_rank=None, seed=0)
    algorithm = Algorithm(refl(decoder="tiny", tiny_decoder=tiny_decoder(tmp_path / "tiny")), base)
    x0 = noise_for(3, "x", shape=(2, *backbone.latent_shape))
    images = algorithm.decode(x0)
    assert images.shape == (2, 3, 16, 16) and 0 <= float(images.min()) <= float(images.max()) <= 1
    assert not torch.equal(images, backbone.decode(x0))
    reward = load_reward("lab-conv", "cpu")
    same = decoders.measure_gradient_cosine(reward, x0, PROMPTS, backbone.decode, backbone.decode)
    other = decoders.measure_gradient_cosine(reward, x0, PROMPTS, backbone.decode, algorithm.decode)
    assert same.tolist() == pytest.approx([1, 1]) and other.shape == (2,) and float(other.max()) < 0.99


@pytest.mark.parametrize("changes", [{}, {"map": "log"}, {"map": "hinge", "margin": 0.6}, {"pretraining": 0.3}])
def test_one_image_at_a_time_gives_the_loss_and_gradient_of_all(backbone, changes):
    """Also where the last part is smaller than the others, and no more images are ever decoded together."""
    base = SharedBase(backbone, fake_rank=2, fake_scale=2.0, student_rank=4, seed=0)
    base.keep_reference()
    algorithm, decoded = Algorithm(refl(**changes), base), []
    backbone.pipe.vae.decoder.register_forward_pre_hook(lambda module, given: decoded.append(len(given[0])))
    c = backbone.collate(backbone.encode([*PROMPTS, "a star"])[0])
    x_t, t = noise_for(5, "x", shape=(3, *backbone.latent_shape)), torch.tensor([0.2, 0.5, 0.9])
    count = torch.arange(3)
    states = States(t[:1], x_t[None], x_t[None])
    records = [{"prompt": prompt} for prompt in (*PROMPTS, "a star")]
    window = Window(states, c, records, torch.tensor([0.9, 0.0]), 1.0, 0, "joint", 0, None)
    found = []
    for most in (None, 1, 2):
        backbone.decoded_at_once = most
        decoded.clear()
        x0 = noise_for(6, "x", shape=(3, *backbone.latent_shape)).requires_grad_(True)
        batch = Batch(x_t, x0, t, c, 0 * count, count, slice(0, 3), of=6)
        loss, figures = algorithm.build_objective(window).loss(x0, batch)
        assert max(decoded) == (most or 3) and sum(decoded) == 3
        found.append((loss.detach(), torch.autograd.grad(loss, x0)[0], figures))
    for loss, gradient, figures in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-5, atol=1e-6)
        assert float((gradient - found[0][1]).norm() / gradient.norm()) < 1e-4
        assert figures.keys() == found[0][2].keys()
        assert all(float(each) == pytest.approx(float(found[0][2][name]), rel=1e-5) for name, each in figures.items())


def test_a_decoder_in_bfloat16_has_the_gradient_of_float32_to_the_rounding(backbone):
    """The teacher's own decoder, which watch and evaluation use, stays in float32."""
    decoder = decoders.load_decoder(refl(decoder_precision="bfloat16"), backbone)
    latents = noise_for(7, "x", shape=(2, *backbone.latent_shape))
    images, exact = decoder(latents), backbone.decode(latents)
    assert images.dtype == torch.float32 and not torch.equal(images, exact)
    assert float((images - exact).abs().max()) < 0.05
    reward = load_reward("lab-conv", "cpu")
    cosine = decoders.measure_gradient_cosine(reward, latents, PROMPTS, backbone.decode, decoder)
    print("cosine of the gradients", cosine)
    assert float(cosine.min()) > 0.99
    assert torch.equal(backbone.decode(latents), exact)


def test_the_decoders_precision_names_a_result_and_its_default_leaves_old_names_alone(tiny_config):
    def name(**changes) -> dict[str, object]:
        rl = {"algorithm": "refl", "weight": 1.0, "rewards": {"lab-conv": 1.0}, **changes}
        return identity(load_config(tiny_config(joint={**TRAINING, "rl": rl})), "joint")

    plain, rounded = name(), name(decoder_precision="bfloat16")
    assert name(decoder_precision="float32") == plain and "joint.rl.decoder_precision" not in plain
    assert rounded == {**plain, "joint.rl.decoder_precision": "bfloat16"}


def test_the_cosine_is_that_of_the_gradients():
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    latents = torch.randn(3, 1, 1, 2, generator=torch.Generator().manual_seed(4))
    found = decoders.measure_gradient_cosine(
        lambda images, prompts: images.flatten(1)[:, 0], latents, ["x"] * 3, lambda x: x, lambda x: x @ turn.T
    )
    assert found.tolist() == pytest.approx([0.6] * 3)


def test_a_decoder_that_does_not_fit_is_refused(backbone, tmp_path):
    with pytest.raises(ValueError, match="decoder is tiny but joint.rl.tiny_decoder is missing"):
        refl(decoder="tiny")
    with pytest.raises(ValueError, match="tiny_decoder is set but joint.rl.decoder is whole"):
        refl(tiny_decoder="x")
    channels, large = tiny_decoder(tmp_path / "a", channels=16), tiny_decoder(tmp_path / "b", blocks=3)
    for said, folder in {"channels": channels, "images of 32": large}.items():
        with pytest.raises(DataError, match=re.escape(folder) + ".*" + said):
            decoders.load_decoder(refl(decoder="tiny", tiny_decoder=folder), backbone)
    with pytest.raises(InputMissing, match="no config.json"):
        find_tiny_decoder(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="pin the commit"):
        find_tiny_decoder("hub:somebody/taesd3@main")


def test_the_tiny_decoders_content_names_a_result_and_its_place_does_not(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("stages.store.inputs.list_reads", lambda stage, models, stages: ())
    place, moved = tiny_decoder(tmp_path / "here"), tmp_path / "there"
    shutil.copytree(place, moved)
    rl = {"algorithm": "refl", "weight": 0.5, "rewards": {"lab-conv": 1.0}}
    rate = {"learning_rate": 1e-4}
    training = {"updates": 2, "batch_size": 2, "student": rate, "fake_score": rate}

    def named(**changes) -> tuple[dict, dict]:
        config = load_config(tiny_config(joint={**training, "rl": {**rl, **changes}}))
        return identity(config, "joint"), fingerprint_inputs(config, "joint", "store", "run")

    plain = named()
    assert "joint.rl.decoder" not in plain[0] and "tiny_decoder" not in plain[1]
    first = named(decoder="tiny", tiny_decoder=place)
    assert first[0] == {**plain[0], "joint.rl.decoder": "tiny"}
    assert first[1].keys() - plain[1].keys() == {"tiny_decoder"}
    assert named(decoder="tiny", tiny_decoder=str(moved)) == first
