"""The student of joint training as a diffusers folder, checked against the training sampler, with its provenance."""

from __future__ import annotations

import json

from dmdr import teacher
from dmdr.backbones import Backbone
from dmdr.export import WEIGHTS, load_student, parity, save_lora, save_pipeline
from dmdr.identity import identity
from stages import Context, Stopped, provenance
from stages.device import device
from stages.model_card import card


def run(context: Context) -> dict:
    """Writes pipeline/ (with its model card), provenance.json and, for a LoRA student, lora/.

    Raises:
        DataError: the weights do not fit the teacher, or the folder does not draw the student's images.
        Stopped: SIGTERM arrived; the next run starts over.
    """
    config, trained = context.config, context.input("joint")
    steps = config.student.steps
    backbone = teacher.load(teacher.resolve(config.teacher.path), device(config), resolution=config.teacher.resolution)
    if config.student.form == "lora":
        save_lora(backbone, trained / WEIGHTS, context.out / "lora")
    load_student(backbone.network, trained)
    folder = context.out / "pipeline"
    context.progress.update(1, 3)
    save_pipeline(backbone, backbone.network, steps, folder)
    if context.stop():
        raise Stopped("stopped; nothing was kept, repeat the command to begin anew")
    context.progress.update(2, 3)
    difference = parity(backbone, backbone.network, steps, folder, seed=config.seed)
    facts = describe(context, backbone, difference)
    (folder / "README.md").write_text(card(facts), encoding="utf-8")
    text = json.dumps(facts, indent=2, allow_nan=False, ensure_ascii=False)
    (context.out / "provenance.json").write_text(text + "\n", encoding="utf-8")
    context.progress.update(3, 3)
    return {"steps": steps, "parity": difference}


def describe(context: Context, backbone: Backbone, difference: float) -> dict:
    """The data of provenance.json."""
    config, sealed = context.config, provenance.records(context)
    return {
        "schema": 1,
        "run": context.artifact.run,
        "teacher": {
            "name": provenance.teacher_name(config.teacher.path),
            "digest": sealed["prompts"]["inputs"]["teacher"],
        },
        "prompts": {"fingerprint": sealed["prompts"]["fingerprint"], "counts": sealed["prompts"]["facts"]},
        "student": config.student.model_dump(mode="json"),
        "nfe": config.student.steps,
        "call": {
            "num_inference_steps": config.student.steps,
            "guidance_scale": backbone.plain_guidance,
            "height": backbone.resolution,
            "width": backbone.resolution,
        },
        "rewards": dict(config.joint.rl.rewards) if config.joint.rl else {},
        "parity": difference,
        "stages": {stage: provenance.summary(record) for stage, record in sealed.items()},
        "code": sealed["joint"]["code"],
        "settings": provenance.settings(sealed, identity(config, "export")),
    }
