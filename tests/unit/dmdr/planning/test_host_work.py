"""The host's work of one rank, counted as training draws it, and flat in the number of ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dmdr.assembly.networks import assemble
from dmdr.assembly.run import build_run
from dmdr.assembly.stage_config import select_stage
from dmdr.config.load import load_config
from dmdr.noise import RowNoise
from dmdr.planning.host_work import count_host_work
from dmdr.planning.meta import build_meta_backbone
from dmdr.train import training_step
from tests.support.few_prompts import FewPrompts
from tests.support.tiny_teachers import copy_teacher

REWARDS = {"weight": 0.5, "rewards": {"lab-conv": 1.0}}
RLS = {
    "none": None,
    "refl": {"algorithm": "refl", **REWARDS},
    "branches": {"algorithm": "grpo", **REWARDS, "branches": 3, "states": 6, "inner_updates": 2},
    "whole": {"algorithm": "dpo", **REWARDS, "branches": 0, "batch": 6, "group_size": 3},
    "surrogate": {"algorithm": "surrogate", **REWARDS, "samples": 6, "steps": 1, "width": 8},
    "es": {"algorithm": "es", **REWARDS, "states": 5, "pairs": 2, "grid": 3},
    "weighting": {"algorithm": "weighting", **REWARDS},
}
RATES = {"student": {"learning_rate": 1e-4}, "fake_score": {"learning_rate": 1e-4}}


class Counting(RowNoise):
    """Counts the bytes that it draws."""

    drawn = 0

    def draw(self, *arguments, **named):
        noise = super().draw(*arguments, **named)
        self.drawn += noise.nbytes
        return noise


@pytest.mark.parametrize("rl", RLS)
def test_noise_is_counted_as_an_update_draws_it(rl, tiny_config, tiny_sd3_folder):
    decoupled = "below" if rl == "none" else None
    training = {"updates": 2, "batch_size": 5, "fake_updates": 4, **RATES, "rl": RLS[rl], "decoupled": decoupled}
    config = load_config(tiny_config(student={"steps": 4}, joint=training))
    backbone, stage = copy_teacher(tiny_sd3_folder), select_stage(config, "joint")
    counted = count_host_work(config, "joint", backbone, ranks=1)
    assembly = assemble(config, stage, backbone)
    prompts = FewPrompts(backbone, ["a red circle", "two squares", "a cross"])
    run = build_run(config, stage, assembly, prompts=prompts, empty_prompt=backbone.encode([""])[0][0])
    run = replace(run, noise=Counting())
    training_step(run, assembly.state)
    assert counted.noise == run.noise.drawn > 0
    scored = {"branches": 3 * 6, "whole": 6, "surrogate": 6, "es": 5 * 2 * 2, "weighting": 5}
    assert counted.scores == 4 * scored.get(rl, 0)


@pytest.mark.parametrize("rl", RLS)
@pytest.mark.parametrize("fake_updates", [5, 6])
def test_a_rank_has_as_much_to_do_beside_255_others(rl, fake_updates, tiny_config, tiny_sd3_folder):
    """8 samples a GPU. With a batch that trajectories do not share evenly, one trajectory more."""
    training = {"updates": 2, "batch_size": 8, "fake_updates": fake_updates, **RATES, "rl": RLS[rl]}
    config = load_config(tiny_config(student={"steps": 4}, joint=training))
    backbone = build_meta_backbone(config.teacher)
    works = [count_host_work(config, "joint", backbone, ranks=ranks) for ranks in (1, 8, 64, 256)]
    print(works)
    assert {each.samples for each in works} == {8}
    for each in works[1:]:
        assert each.noise <= 1.1 * works[0].noise and each.prompts <= 1.2 * works[0].prompts
        assert each.scores == each.ranks * works[0].scores <= 256 * 20 * 4, "a few bytes an image"
