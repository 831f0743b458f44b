"""The average of the student that is exported, against its closed form."""

from __future__ import annotations

import pytest
import torch

from dmdr.config.training import Optimizer, Training
from dmdr.shared_base import SharedBase
from dmdr.state import TrainState
from tests.support.tiny_teachers import copy_teacher

UPDATES = 12


@pytest.mark.parametrize("ema", [0.0, 0.5, 0.999])
def test_ema_is_the_weighted_mean_of_the_students_path(tiny_sd3_folder, ema):
    base = SharedBase(copy_teacher(tiny_sd3_folder), fake_rank=2, fake_scale=1.0, student_rank=None, seed=0)
    optimizer = Optimizer(learning_rate=1e-3)
    training = Training(updates=UPDATES, batch_size=1, student=optimizer, fake_score=optimizer)
    state = TrainState(base, training, ema=ema)
    name, student = next(iter(base.student_parameters.items()))
    generator, path = torch.Generator().manual_seed(3), []
    for update in range(UPDATES):
        with torch.no_grad():
            student.copy_(torch.randn(student.shape, generator=generator))
        path.append(student.detach().double().clone())
        state.advance({"update": update})
    if ema == 0.0:
        weights = [0.0] * (UPDATES - 1) + [1.0]
    elif ema == 0.999:  # never reached: the cubes telescope, (u^3 - (u - 1)^3) / n^3
        weights = [(u**3 - (u - 1) ** 3) / UPDATES**3 for u in range(1, UPDATES + 1)]
    else:  # (1 - 1/u)^3 passes 0.5 at u = 5: a plain exponential from there
        weights = [(u**3 - (u - 1) ** 3) / 4**3 * 0.5 ** (UPDATES - 4) for u in range(1, 5)]
        weights += [0.5 ** (UPDATES - u + 1) for u in range(5, UPDATES + 1)]
    assert sum(weights) == pytest.approx(1)
    expected = sum(weight * each for weight, each in zip(weights, path, strict=True))
    assert torch.allclose(state.ema[name].double(), expected, atol=1e-6)
