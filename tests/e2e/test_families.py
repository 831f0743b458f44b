"""A whole run on each family that the lab has no teacher of: the same stages, the same code, diffusers folders."""

from __future__ import annotations

import json
import re

import pytest

from dmdr.config.load import load_config
from dmdr.config.stages import STAGES
from tests.support.trained_run import run_stage

TEACHER_NFE = {"z_image": 4, "flux": 2}  # of two steps: CFG against distilled guidance
PLAIN = {"z_image": 0, "flux": 1}  # the guidance_scale at which the pipeline runs none


@pytest.mark.parametrize("student", [{"form": "lora", "lora_rank": 2}, {"form": "full"}], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["z_image", "flux"])
def test_a_whole_run(family, student, request, tiny_config, tmp_path):
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    asked = {"path": str(folder), "guidance_scale": 3.0, "steps": 2, "resolution": 16}
    forms = ["pipeline", "weights"] + ["lora"] * (student["form"] == "lora")
    config = load_config(tiny_config(teacher=asked, student={"steps": 2, **student}, export={"forms": forms}))
    made = {stage: run_stage(config, tmp_path / "store", stage) for stage in STAGES}

    facts = json.loads((made["export"] / "provenance.json").read_text())
    assert list(facts["parity"]) == forms
    assert max(facts["parity"].values()) <= 1e-4
    assert facts["call"] == {"num_inference_steps": 2, "guidance_scale": PLAIN[family], "height": 16, "width": 16}
    rows = [json.loads(line) for line in (made["joint"] / "metrics.jsonl").read_text().splitlines()]
    assert rows and all(row["grad_student"] > 0 and row["grad_fake"] > 0 and row["loss_rl"] != 0 for row in rows)
    models = {
        each["name"]: each["nfe"] for each in json.loads((made["evaluate"] / "scorecard.json").read_text())["models"]
    }
    assert (models["teacher"], models["student"]) == (TEACHER_NFE[family], 2)

    card = (made["export"] / "pipeline" / "README.md").read_text()
    assert "There is no single file" in card
    image = tmp_path / "i.png"
    pipeline = repr(str(made["export"] / "pipeline"))
    snippet = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    exec(snippet.replace('"pipeline"', pipeline).replace("image.png", str(image)))  # what the card tells a user to type
    assert image.is_file()
