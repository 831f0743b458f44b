"""Noise by rows: the same for any rows that are asked for together, drawn ahead or when it is needed."""

from __future__ import annotations

import random
import threading

import torch
from scipy import stats

from dmdr.noise import RowNoise, noise_for, uniforms_for

SHAPE = (2, 3, 4)


def draw(noise: RowNoise, update: int, rows, name: str = "renoise") -> torch.Tensor:
    return noise.draw(7, ("joint", name), update, (1,), rows=rows, shape=SHAPE)


def test_a_row_depends_on_its_key_alone():
    whole = draw(RowNoise(), 3, range(10))
    assert torch.equal(draw(RowNoise(), 3, range(4, 7)), whole[4:7])
    assert torch.equal(draw(RowNoise(), 3, [9, 2]), whole[[9, 2]])
    for row in range(10):
        assert torch.equal(whole[row], noise_for(7, "joint", "renoise", 3, 1, row, shape=SHAPE))
    others = [draw(RowNoise(), 4, range(10)), draw(RowNoise(), 3, range(10), "rollout")]
    assert not any((each == whole).any() for each in others)


def test_rows_are_independent_standard_normals():
    drawn = draw(RowNoise(), 0, range(2000)).flatten(1).double()
    assert stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 0.001
    neighbours = torch.corrcoef(torch.stack([drawn[:-1].flatten(), drawn[1:].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 0.02, "five deviations"
    uniforms = uniforms_for(7, "levels", rows=range(5000))
    assert stats.kstest(uniforms.numpy(), "uniform").pvalue > 0.001
    assert torch.equal(uniforms_for(7, "levels", rows=[30, 4]), uniforms[[30, 4]])


def test_drawn_ahead_it_is_the_same_noise():
    """In any order of updates, as after a warm-up or a resume, with draws that come and go."""
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng, ahead, plain = random.Random(seed), RowNoise(ahead=True), RowNoise(ahead=False)
    for update in [0, 1, 2, 3, 0, 1, 2, 7, 8]:
        for name in rng.sample(["renoise", "rollout", "branches"], rng.randint(1, 3)):
            rows = range(3) if rng.random() < 0.8 else range(1, 5)
            assert torch.equal(draw(ahead, update, rows, name), draw(plain, update, rows, name))
    assert len(ahead._next) < 8, "what nobody asked for again is dropped"


def test_the_next_update_is_drawn_by_another_thread():
    seen = list[int]()

    class Watching(RowNoise):
        def _fill(self, asked, update):
            seen.append(threading.get_ident())
            return super()._fill(asked, update)

    noise = Watching(ahead=True)
    for update in range(4):
        draw(noise, update, range(3))
    own = threading.get_ident()
    assert seen.count(own) == 1, "the first alone; the others were ready or under way"


def test_on_meta_it_has_no_numbers():
    assert draw(RowNoise("meta"), 0, range(5)).is_meta
