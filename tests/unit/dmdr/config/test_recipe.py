"""The settings of the authors' recipe: refused where they make no sense, and no change at their defaults."""

from __future__ import annotations

import pytest
import yaml

from dmdr.config.changes import apply_changes, parse_changes
from dmdr.config.identity import identity
from dmdr.config.load import load_config
from dmdr.config.rl import ReFL
from dmdr.config.stages import STAGES
from dmdr.errors import ConfigError
from stages.store.sealed_settings import _put

REFL = {"algorithm": "refl", "weight": 0.5, "rewards": {"lab-conv": 1.0}}
WORDS = {"positive": ["Realistic"], "negative": ["Painting"]}
PREFERS = {"preferences": {"lab-conv": WORDS}}
AESTHETIC = {"rewards": {"aesthetic": 1.0}}
LORA = {"steps": 2, "form": "lora", "lora_rank": 4}
RATE = {"learning_rate": 1e-4}


@pytest.fixture
def changed(tiny_config):
    """The tiny config with changed settings, each named by its dotted key."""

    def write(changes: dict):
        path = tiny_config()
        data = yaml.safe_load(path.read_text())
        for key, value in changes.items():
            *sections, last = key.split(".")
            place = data
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    return write


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher.guidance_scale": [7.5, 6.5]}, r"is \[7.5, 6.5\], whose first number is not the lower one; give"),
        ({"teacher.guidance_scale": [7, 7]}, r"is \[7, 7\], whose first number is not the lower"),
        ({"teacher.guidance_scale": [0.5, 2]}, r"is 0.5, 2, and a scale is a number from 1"),
        ({"teacher.guidance_scale": 0.5}, r"is 0.5, and a scale is a number from 1"),
        ({"teacher.guidance_scale": [6.5]}, r"is \[6.5\], and a range has two numbers"),
        ({"teacher.guidance_scale": []}, r"is \[\], and a range has two numbers"),
        ({"teacher.guidance_scale": [1, 2, 3]}, "a range has two numbers"),
        ({"teacher.guidance_scale": "7"}, "is no number; give a number from 1, or a range"),
        ({"teacher.guidance_scale": ["6", 7]}, "is no number"),
        ({"teacher.guidance_scale": True}, "is no number"),
        ({"teacher.guidance_scale": None}, "is no number"),
        ({"teacher.guidance_scale": float("inf")}, "is inf"),
        ({"teacher.guidance_scale": [2, float("nan")]}, "is 2, nan"),
        ({"teacher.unconditional": "empty"}, "teacher.unconditional: .*pipeline.*encoded.*zeros"),
        ({"teacher.unconditional": "zeros", "teacher.guidance_scale": 1}, "zeros but teacher.guidance_scale 1 runs no"),
        ({"joint.dm_floor": 1e-8, "joint.distribution_matching": False}, "joint.dm_floor is set but joint.distribu"),
        ({"student.lora_alpha": 8}, "student.lora_alpha is set but student.form is full"),
        ({"student.lora_init": "gaussian"}, "student.lora_init is set but student.form is full"),
        ({"student.lora_targets": ["to_q"]}, "student.lora_targets is set but student.form is full"),
        ({"student": {**LORA, "lora_alpha": 0}}, "student.lora_alpha: .*greater than 0"),
        ({"student": {**LORA, "lora_init": "zeros"}}, "student.lora_init: .*kaiming.*gaussian"),
        ({"fake_score.lora_targets": "all"}, "fake_score.lora_targets: .*neither a preset nor a list; set attention"),
        ({"fake_score.lora_targets": []}, "lora_targets is a list without names"),
        ({"fake_score.lora_targets": [3]}, "lora_targets is a list without names"),
        ({"fake_score.lora_targets": ["to_q", "to_q"]}, "names a module twice: to_q, to_q"),
        ({"cold_start.student": {**RATE, "eps": 0}}, "cold_start.student.eps: .*greater than 0"),
        ({"cold_start.student": {**RATE, "warmup": -1}}, "cold_start.student.warmup: .*greater than or equal to 0"),
        ({"joint.fake_score": {**RATE, "warmup": 3}}, "fake_score.warmup is 3 but its stage has 2 updates"),
        ({"cold_start.dm_floor": -1.0}, "cold_start.dm_floor: .*greater than or equal to 0"),
        ({"joint.rl": {**REFL, "map": "hinge"}}, "joint.rl.map is hinge but joint.rl.margin is missing"),
        ({"joint.rl": {**REFL, "margin": 0.7}}, "joint.rl.margin is set but joint.rl.map is linear; drop it"),
        (
            {"joint.rl": {**REFL, "map": "hinge", "margin": 1, "rewards": {"lab-conv": -1.0}}},
            "hinge, which needs weights above 0, and lab-conv has -1",
        ),
        ({"joint.rl": {**REFL, **PREFERS, "map": "log"}}, "log needs rewards above 0, and joint.rl.preferences"),
        ({"joint.rl": {**REFL, "scales": {"hpsv2.1": 0.01}}}, "joint.rl.scales has hpsv2.1, which is not in joint.rl"),
        ({"joint.rl": {**REFL, "prefixes": {"x": "A "}}}, "joint.rl.prefixes has x, which is not in joint.rl.rewards"),
        (
            {"joint.rl": {**REFL, **AESTHETIC, "prefixes": {"aesthetic": "A "}}},
            "aesthetic, which does not read the pro",
        ),
        ({"joint.rl": {**REFL, **AESTHETIC, "preferences": {"aesthetic": WORDS}}}, "aesthetic, which does not read"),
        ({"joint.rl": {**REFL, **PREFERS, "prefixes": {"lab-conv": "A "}}}, "both have lab-conv; name it in one"),
        ({"joint.rl": {**REFL, "scales": {"lab-conv": 0}}}, "joint.rl.scales.lab-conv: .*greater than 0"),
        (
            {"joint.rl": {**REFL, "preferences": {"lab-conv": {**WORDS, "positive": []}}}},
            "joint.rl.preferences.lab-conv.positive: .*at least 1",
        ),
        (
            {"joint.rl": {**REFL, "preferences": {"lab-conv": {**WORDS, "kk": 1}}}},
            "unknown key joint.rl.preferences.lab-conv.kk",
        ),
    ],
)
def test_refused_in_one_line(changed, changes, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        load_config(changed(changes))
    assert "\n" not in str(refusal.value)


DEFAULTS = {
    "teacher.unconditional": "pipeline",
    "student.lora_targets": "attention",
    "student.lora_init": "kaiming",
    "fake_score.lora_targets": "attention",
    "fake_score.lora_init": "kaiming",
    "cold_start.student": {**RATE, "eps": 1e-8, "warmup": 0},
    "joint.dm_floor": 0,
    "joint.rl": {**REFL, "scales": {}, "prefixes": {}, "preferences": {}},
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_setting_at_its_default_leaves_every_result_its_name(changed, stage):
    before, after = load_config(changed({})), load_config(changed(DEFAULTS))
    assert identity(after, stage) == identity(before, stage)
    younger = {"unconditional", "lora_alpha", "lora_targets", "lora_init", "eps", "warmup", "dm_floor"}
    younger |= {"margin", "scales", "prefixes", "preferences"}
    assert not [key for key in identity(before, stage) if key.rsplit(".", 1)[-1] in younger]


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"teacher.guidance_scale": [2.5, 3.5]}, {"cold_start", "joint", "evaluate"}),
        ({"teacher.unconditional": "zeros"}, {"prompts", "evaluate"}),  # training reads it from the prompts
        ({"fake_score.lora_init": "gaussian"}, {"cold_start", "joint"}),
        ({"cold_start.student": {**RATE, "warmup": 1}}, {"cold_start"}),
        ({"cold_start.dm_floor": 1e-8}, {"cold_start"}),
        ({"joint.rl": {**REFL, **PREFERS}}, {"joint"}),
    ],
)
def test_any_other_value_names_another_result(changed, changes, stages):
    before, after = load_config(changed({})), load_config(changed(changes))
    assert {stage for stage in STAGES if identity(after, stage) != identity(before, stage)} == stages


def test_a_reward_with_a_dot_in_its_name_has_settings_of_its_own(changed):
    """On the command line, and from the flat settings of a run's records, of which an export reads them."""
    rl = {**REFL, "rewards": {"hpsv2.1": 5.0}, "preferences": {"hpsv2.1": {**WORDS, "k": 0.3}}}
    config = load_config(changed({"joint.rl": rl, "teacher.world": None, "evaluate.metrics": ["hpsv2.1"]}))
    settings: dict[str, object] = {}
    for key, value in identity(config, "joint").items():
        if key.startswith("joint.rl"):
            _put(settings, key, value)
    assert ReFL.model_validate(settings["joint"]["rl"]) == config.joint.rl
    asked = parse_changes(["joint.rl.preferences.hpsv2.1.k=0.5", "joint.rl.scales.hpsv2.1=0.01"])
    changes = apply_changes({"joint": {"rl": rl}}, asked, "--set")["joint"]["rl"]
    assert changes["preferences"] == {"hpsv2.1": {**WORDS, "k": 0.5}} and changes["scales"] == {"hpsv2.1": 0.01}


def test_everything_but_the_real_score_takes_the_middle_of_a_range(changed):
    assert load_config(changed({"teacher.guidance_scale": [3.5, 4.5]})).teacher.guidance == 4.0
    assert load_config(changed({"teacher.guidance_scale": 4})).teacher.guidance == 4.0
