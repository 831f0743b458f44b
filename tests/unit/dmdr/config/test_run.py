"""What a config refuses about RL, the watch and the models compared: one line that names the key and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dmdr.config.identity import identity
from dmdr.config.load import load_config
from dmdr.config.stages import STAGES
from dmdr.errors import ConfigError

REFL = {"algorithm": "refl", "weight": 0.5, "rewards": {"lab-conv": 1.0}}
GRPO = {**REFL, "algorithm": "grpo"}
ES = {**REFL, "algorithm": "es"}
DPO = {**REFL, "algorithm": "dpo"}
WEIGHTING = {**REFL, "algorithm": "weighting"}
WATCH = {"reward": "lab-mixer"}
IMAGE = f"images.example.org/dmdr-train@sha256:{'1' * 64}"


@pytest.fixture
def changed(tiny_config: Callable[..., Path]) -> Callable[..., Path]:
    """The tiny config with changes to its joint stage and, by keyword, to whole sections."""

    def write(joint: dict, **sections: dict) -> Path:
        path = tiny_config()
        data = yaml.safe_load(path.read_text())
        data["joint"] |= joint
        for name, section in sections.items():
            data[name] = {**data.get(name, {}), **section}
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    return write


@pytest.mark.parametrize(
    ("joint", "sections", "message"),
    [
        ({"rl": {"weight": 1.0, "rewards": {"lab-conv": 1.0}}}, {}, "joint.rl.algorithm is missing; set one of refl"),
        (
            {"rl": {**REFL, "algorithm": "ppo"}},
            {},
            "joint.rl.algorithm is ppo; set one of refl, dpo, grpo, ",
        ),
        (
            {"rl": {**ES, "map": "log", "normalise": True}},
            {},
            "joint.rl.map log .* joint.rl.normalise .*; use map: linear",
        ),
        (
            {"rl": {**ES, "map": "log", "preferences": {"lab-conv": {"positive": ["fine"], "negative": ["poor"]}}}},
            {},
            "joint.rl.map log needs rewards above 0, .*lab-conv; use map: linear",
        ),
        (
            {"rl": {**GRPO, "branches": 0, "group_size": 1}},
            {},
            "joint.rl.group_size: .*greater than or equal to 2",
        ),
        (
            {"rl": {**DPO, "branches": 0, "group_size": 1}},
            {},
            "joint.rl.group_size: .*greater than or equal to 2",
        ),
        ({"rl": {**GRPO, "grup_size": 4}}, {}, "unknown key joint.rl.grup_size; did you mean group_size"),
        ({"rl": {**REFL, "group_size": 4}}, {}, "unknown key joint.rl.group_size; known keys: .*pretraining"),
        ({"rl": {**GRPO, "clip_range": 0.1}}, {}, "clip_range does nothing with inner_updates 1.*inner_updates to 2"),
        ({"rl": {**REFL, "weight": -1.0}}, {}, "joint.rl.weight: .*greater than or equal to 0, got -1.0"),
        (
            {"rl": {**GRPO, "group_size": 4}},
            {},
            "group_size is for whole trajectories and .*branches is 8; drop it",
        ),
        ({"rl": {**DPO, "batch": 4}}, {}, "joint.rl.batch is for whole trajectories"),
        ({"rl": {**GRPO, "branches": 0, "states": 4}}, {}, "joint.rl.states is for branches and .*branches is 0; drop"),
        ({"rl": {**GRPO, "branches": 1}}, {}, "joint.rl.branches is 1, and one has nothing to compare with"),
        ({"rl": {**GRPO, "branches": 0, "batch": 9}}, {}, "batch 9 is not a multiple of .*group_size 8; make it 16"),
        ({"rl": {**GRPO, "branches": 0, "hybrid": True}}, {}, "joint.rl.hybrid needs branches and .*branches is 0"),
        ({"rl": {**GRPO, "hybrid": True, "shuffled": True}}, {}, "shuffled is a control without a signal.*drop one"),
        ({"rl": {**REFL, "shuffled": True}}, {}, "unknown key joint.rl.shuffled"),
        ({"rl": {**GRPO, "inner_updates": 2}}, {}, "inner_updates 2 needs as many batches of joint.fake_updates 2"),
        ({"rl": {**REFL, "matching": 4}}, {}, "joint.rl.matching is set but joint.rl.weight_is is fixed"),
        ({"rl": GRPO}, {"student": {"steps": 1}}, "grpo learns from the renoising steps and student.steps 1 has none"),
        ({"rl": DPO}, {"student": {"steps": 1}}, "dpo learns from the renoising steps and student.steps 1 has none"),
        (
            {"rl": GRPO},
            {"student": {"eta": 0}},
            "grpo learns from the noise of the renoising steps and .*eta 0 adds none",
        ),
        (
            {"rl": DPO},
            {"student": {"eta": 0.0}},
            "dpo learns from the noise.*set algorithm: refl, or student.eta above",
        ),
        ({}, {"student": {"eta": 1.5}}, "student.eta: .*less than or equal to 1, got 1.5"),
        ({}, {"student": {"steps": 1, "eta": 0.5}}, "student.eta does nothing with student.steps 1"),
        ({}, {"student": {"timesteps": [399]}}, "student.timesteps has 1 of them and student.steps is 2; give one for"),
        ({}, {"student": {"timesteps": [400, 900]}}, "student.timesteps 400, 900 must descend, from noise to data"),
        ({}, {"student": {"timesteps": [900, 900]}}, "must descend"),
        ({}, {"student": {"timesteps": [900, 0]}}, "student.timesteps 900, 0 must lie above 0 and be at most 1000"),
        ({}, {"student": {"timesteps": [1001, 5]}}, "must lie above 0 and be at most 1000"),
        ({}, {"student": {"timesteps": [900, 5], "shift": 3.0}}, "both set the student's times; drop one"),
        ({}, {"student": {"shift": 0}}, "student.shift: .*greater than 0, got 0"),
        ({"rl": None, "distribution_matching": False}, {}, "joint.rl is missing: nothing would be trained"),
        ({"rl": {**REFL, "weight_is": "matched"}, "distribution_matching": False}, {}, "needs distribution_matching"),
        (
            {"rl": {**WEIGHTING, "weight_is": "matched"}},
            {},
            "weighting has no gradient of its own to match",
        ),
        (
            {"rl": WEIGHTING, "distribution_matching": False},
            {},
            "weighting weighs distribution matching",
        ),
        (
            {"rl": {**WEIGHTING, "part": "guidance"}},
            {"teacher": {"guidance_scale": 1.0}},
            "joint.rl.part is guidance but teacher.guidance_scale 1 leaves no CFG to weigh; set part: all",
        ),
        ({"rl": REFL, "watch": {"reward": "lab-conv"}}, {}, "lab-conv is trained on; watch one that is not in"),
        ({"rl": REFL, "watch": {**WATCH, "on_alarm": "cry"}}, {}, "joint.watch.on_alarm: .*off.*warn.*stop"),
        ({"rl": REFL, "watch": {"every": 5}}, {}, "joint.watch.reward is missing; name a held-out reward"),
        (
            {},
            {"cold_start": {"watch": {**WATCH, "keep_best": 1}}},
            "cold_start.watch.keep_best is for joint training: a cold start goes towards its teacher",
        ),
        ({}, {"cold_start": {"watch": {"export": "best"}}}, "cold_start.watch.export is for joint training"),
        (
            {"rl": REFL, "watch": {**WATCH, "on_alarm": "recover", "recoveries": 0}},
            {},
            "joint.watch.recoveries: .*greater than 0, got 0",
        ),
        (
            {"rl": REFL, "watch": {**WATCH, "recoveries": 2}},
            {},
            "joint.watch.recoveries is 2 but neither joint.watch.on_alarm nor on_divergence is recover; drop it",
        ),
        ({"rl": REFL}, {"evaluate": {"models": ["student", "student"]}}, "evaluate.models names a model twice"),
        ({"rl": REFL}, {"evaluate": {"models": ["pupil"]}}, "evaluate.models.0: .*'pupil'"),
        ({}, {"export": {"forms": ["lora", "pipeline"]}}, "lora but student.form is full; take lora out, or set form"),
        ({}, {"export": {"forms": ["weights"]}}, "lacks pipeline, which evaluate samples the student from; add it"),
        ({}, {"export": {"forms": ["single-file"]}}, "single-file without pipeline.*; add it"),
        ({}, {"export": {"forms": ["pipeline", "pipeline"]}}, "export.forms names a form twice"),
        ({}, {"export": {"forms": ["onnx"]}}, "export.forms.0: .*'onnx'"),
        ({}, {"export": {"forms": []}}, "export.forms: .*at least 1"),
        ({}, {"teacher": {"path": "x.safetensors"}}, "is one file and teacher.parts is missing; name the diffusers"),
        (
            {},
            {"execution": {"cluster": {"image": IMAGE, "nodes": 2}}},
            "2 nodes for prompts.*stages.cold_start and joint$",
        ),
        (
            {},
            {"execution": {"cluster": {"image": IMAGE, "claims": {"x": "models"}}}},
            "claims has 'x', which is not an abs",
        ),
        (
            {},
            {"execution": {"cluster": {"image": IMAGE, "topology": "example.com/rack"}}},
            "topology is example.com/rack, .* every stage runs on one node; set nodes .*, or drop topology",
        ),
        ({}, {"execution": {"cluster": {"image": IMAGE, "topology": "a rack"}}}, "cluster.topology: .*'a rack'"),
        (
            {},
            {"execution": {"sharding": "hsdp", "cluster": {"image": IMAGE}}},
            "hsdp, .*cluster gives cold_start one; set fsdp, or nodes under execution.cluster.stages.cold_start",
        ),
        ({}, {"teacher": {"parts": "lab:flow"}}, "teacher.parts is set but teacher.path is not a .safetensors"),
    ],
)
def test_refused_in_one_line(changed, joint, sections, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        load_config(changed(joint, **sections))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("rl", [REFL, GRPO, {**GRPO, "inner_updates": 2, "clip_range": 0.1}, DPO, None])
def test_every_row_of_table_5_is_a_config(changed, rl):
    config = load_config(changed({"rl": rl, "fake_updates": 3}))
    if rl is None:
        assert config.joint.rl is None
        return
    assert config.joint.rl.algorithm == rl["algorithm"] and config.joint.distribution_matching
    alone = load_config(changed({"rl": rl, "fake_updates": 3, "distribution_matching": False}))
    assert identity(alone, "joint") != identity(config, "joint"), "another result, another identity"
    assert identity(alone, "cold_start") == identity(config, "cold_start"), "both start from the same cold start"


def test_how_the_student_samples_names_its_result_only_where_it_is_not_the_default(changed):
    plain = load_config(changed({}))
    assert not {"student.eta", "student.timesteps", "student.shift"} & identity(plain, "cold_start").keys()
    for setting in ({"eta": 0.0}, {"eta": 0.5}, {"timesteps": [900, 400]}, {"shift": 2.0}):
        other = load_config(changed({}, student=setting))
        assert identity(other, "cold_start") != identity(plain, "cold_start")
        assert identity(other, "prompts") == identity(plain, "prompts")


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_that_ship_are_valid(path):
    assert load_config(path).run == path.stem


def test_the_default_forms_name_the_result_as_it_was_before_there_were_forms(changed):
    """What was sealed then stays sealed; other forms are another export, and nothing else of the run."""
    before, other = load_config(changed({})), load_config(changed({}, export={"forms": ["pipeline", "weights"]}))
    assert {key for key in identity(before, "export") if not key.startswith("student.")} == {"teacher.resolution"}
    for stage in STAGES:
        assert (identity(before, stage) == identity(other, stage)) == (stage != "export")
    assert before.forms == ("pipeline",)
    lora = load_config(changed({}, student={"form": "lora", "lora_rank": 2}))
    assert lora.forms == ("pipeline", "lora")
