"""The model card: valid front matter, one table, code that compiles, whatever a prompt holds, wherever it is shown."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from stages.reports.export_facts import ExportFacts
from stages.reports.licence import read_licence
from stages.reports.model_card import HubPlace, render_card

COMMIT = "0123456789" * 4
NASTY = (
    'a "red" | <b>sign</b> that says [x](y): #1',
    "line one\nline two: *bold* `code` \\ end",
    "'{{ 7 * 7 }}' — ünïcödé 猫",
    "word " * 80,
)


def facts_of(**changes: object) -> ExportFacts:
    """Facts of an SDXL run with all forms."""
    record = {"fingerprint": "ab" * 32, "code": {"version": "1"}, "device": "cpu", "duration_s": 3.0}
    data: dict[str, object] = {
        "run": "tiny",
        "teacher": {"name": f"hub:some/model@{COMMIT}", "parts": None, "digest": "cd" * 32},
        "prompts": {"fingerprint": "ef" * 32, "counts": {"train": 1200}},
        "student": {"steps": 4, "form": "lora", "lora_rank": 8, "ema": 0.9},
        "nfe": 4,
        "call": {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 64, "width": 64},
        "rewards": {"hpsv2.1": 1.0},
        "parity": {"pipeline": 1e-5, "lora": 1e-5, "weights": 1e-5, "single-file": 1e-5},
        "dtype": "bfloat16",
        "rounding": 0.01,
        "samples": NASTY,
        "comfyui": ("lora", "weights", "single-file"),
        "classes": {
            "family": "sdxl",
            "pipeline": "StableDiffusionXLPipeline",
            "part": "unet",
            "network": "UNet2DConditionModel",
            "scheduler": "LCMScheduler",
            "absent": [],
        },
        "stages": {"joint": {**record, "cost": {"cpu_s": 1.0, "peak_memory_mib": 2.0}}},
        "code": {"version": "1"},
        "settings": {"seed": 0},
    }
    return ExportFacts.model_validate(data | changes)


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))


@pytest.mark.parametrize("place", [None, HubPlace("me/model", "pipeline"), HubPlace("me/model", "lora")])
def test_nothing_in_a_prompt_breaks_the_card(place):
    card = render_card(facts_of(), place=place)
    about = front_matter(card)
    assert [each["text"] for each in about["widget"]] == list(NASTY)
    assert about["base_model"] == "some/model"
    assert about["base_model_relation"] == ("adapter" if place and place.root == "lora" else "finetune")
    shown = [line for line in card.splitlines() if "images/1.png)" in line]
    assert len(shown) == 1
    at = card.splitlines().index(shown[0])
    for line in card.splitlines()[at : at + 3]:
        assert len(re.findall(r"(?<!\\)\|", line)) == len(NASTY) + 1, line
    assert "<b>" not in card.split("## Use it")[0].replace('<b>sign</b> that says [x](y): #1"', "")
    for snippet in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        tree = ast.parse(snippet)
        prompts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value == NASTY[0]]
        assert len(prompts) == 1
        assert "to(device)" in snippet
    hidden = card.split("<details>", 1)[1]
    assert "ef" * 32 in hidden
    assert "ef" * 32 not in card.split("<details>", 1)[0]


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# A model", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: stabilityai-ai-community\nlicense_link: LICENSE.md\n---\n",
            {"license": "other", "license_name": "stabilityai-ai-community", "license_link": "LICENSE.md"},
        ),
        ("---\nlanguage: en\n---\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\nlicense: : : [\n---\n", None),
        ("# no front matter", None),
        (None, None),
    ],
)
def test_the_licence_is_the_one_of_the_teachers_card(card, expected, tmp_path: Path):
    if card is not None:
        (tmp_path / "README.md").write_text(card, encoding="utf-8")
    licence = read_licence(tmp_path)
    assert (licence and licence.model_dump(exclude_none=True)) == expected
    teacher = {"name": "folder", "parts": None, "digest": "cd" * 32}
    about = front_matter(render_card(facts_of(teacher=teacher, licence=licence)))
    assert {name: about[name] for name in (expected or {})} == (expected or {})
    assert about["license"] == (expected or {"license": "other"})["license"]
    assert "base_model" not in about


def test_a_licence_that_is_a_file_of_the_teacher_is_linked_there():
    licence = {"license": "other", "license_name": "flux-1-dev", "license_link": "LICENSE.md"}
    about = front_matter(render_card(facts_of(licence=licence)))
    assert about["license_link"] == "https://huggingface.co/some/model/blob/main/LICENSE.md"


def test_a_card_of_an_early_export_has_no_empty_parts():
    early = facts_of(samples=(), comfyui=(), dtype="float32", rounding=0.0)
    card = render_card(early)
    assert "widget" not in front_matter(card)
    assert "images/" not in card
    assert "### ComfyUI" not in card


def test_the_card_of_a_control_warns():
    control = render_card(facts_of(settings={"seed": 0, "joint.rl.shuffled": True}))
    assert "**joint.rl.shuffled dealt the rewards at random: this student is a control" in control.split("## Use it")[0]
    for settings in ({"joint.rl.shuffled": False}, {"seed": 0}):
        assert "a control" not in render_card(facts_of(settings=settings))
