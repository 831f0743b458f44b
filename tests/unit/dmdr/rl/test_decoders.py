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
from dmdr.shared_base import SharedBase
from dmdr.teacher.load import load_teacher
from stages.store.inputs import fingerprint_inputs

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
