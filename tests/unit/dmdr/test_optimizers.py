"""Learning rates that fall: each update takes the step that its place in the stage asks for."""

from __future__ import annotations

import pytest

from dmdr.config.few_steps import FewSteps
from dmdr.config.training import Optimizer, Training
from dmdr.draws import Run
from dmdr.optimizers import learning_rate
from dmdr.shared_base import SharedBase
from dmdr.state import TrainState
from dmdr.train import training_step
from tests.support.few_prompts import FewPrompts
from tests.support.tiny_teachers import copy_teacher

PROMPTS = ["a red circle", "two squares"]


@pytest.mark.parametrize(("update", "step"), [(0, 1e-2), (2, 6e-3), (4, 2e-3)])
def test_a_first_step_of_adam_is_as_long_as_the_rate_of_its_update(tiny_sd3_folder, update, step):
    """Whatever the gradient: it is divided by its own size. So a resumed stage has the rate of its place as well."""
    backbone = copy_teacher(tiny_sd3_folder)
    base = SharedBase(backbone, fake_rank=2, fake_scale=1.0, student_rank=None, seed=0)
    falling = Optimizer(learning_rate=1e-2, final_learning_rate=2e-3, weight_decay=0.0)
    constant = Optimizer(learning_rate=3e-3, weight_decay=0.0)
    training = Training(updates=5, batch_size=2, fake_updates=1, student=falling, fake_score=constant)
    state = TrainState(base, training, ema=0.5)
    state.update = update
    trained = {"student": base.student_parameters, "fake_score": base.fake_parameters}
    before = {role: {name: p.detach().clone() for name, p in each.items()} for role, each in trained.items()}
    training_step(
        Run(
            stage="cold_start",
            seed=0,
            training=training,
            base=base,
            prompts=FewPrompts(backbone, PROMPTS),
            unconditional=backbone.collate(backbone.encode([""])[0]),
            times=backbone.student_times(FewSteps(2)),
            guidance_scale=2.0,
        ),
        state,
    )
    moved = {
        role: max((p.detach() - before[role][name]).abs().max() for name, p in each.items())
        for role, each in trained.items()
    }
    assert {role: float(length) for role, length in moved.items()} == pytest.approx(
        {"student": step, "fake_score": 3e-3}, rel=1e-3
    )


def test_a_stage_of_one_update_has_the_first_rate():
    assert learning_rate(Optimizer(learning_rate=1e-2, final_learning_rate=1e-3), 0, 1) == 1e-2
