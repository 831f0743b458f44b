"""The README.md of an exported form: what the model is, where it comes from, how to load each form."""

from __future__ import annotations

from dmdr.config.run import Student
from dmdr.teacher.hub import ADDRESS
from dmdr.teacher.load import ONE_FILE
from stages.reports.export_facts import ClassFacts, ExportFacts, StageFacts, TeacherFacts


def render_card(facts: ExportFacts) -> str:
    """Markdown for `provenance.json`'s data, with the front matter that model hubs read."""
    student, teacher, steps = facts.student, facts.teacher, facts.student.steps
    rewards = ", ".join(f"{name} (weight {weight:g})" for name, weight in facts.rewards.items()) or "none"
    counts = ", ".join(f"{name} {value:,}" for name, value in facts.prompts.counts.items())
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [dmdr, distillation, few-step]
license: other
license_name: same-as-teacher
---

# {facts.run}: {steps} step{"s" * (steps > 1)} to an image

A student of `{teacher.name}`, distilled by DMDR (distribution matching and reinforcement learning at
once). It draws an image in {steps} network forward{"s" * (steps > 1)} ({steps} NFE), without classifier-free guidance.

Give the numbers as below: the scheduler is made for exactly {steps} step{"s" * (steps > 1)} at this size, and guidance
is already in the weights. Paths are relative to the folder that holds the form's; there, `sha256sum -c SHA256SUMS`
checks every file (with `--ignore-missing` where not all forms were copied).

{_forms(facts)}

## Licence

The licence follows the teacher's: what holds for `{teacher.name}` holds for this model.

## Provenance

| what | value |
|---|---|
| teacher | `{teacher.name}`{_parts(teacher)}, sha256 `{teacher.digest}` |
| prompt set | `{facts.prompts.fingerprint}`{f" ({counts})" if counts else ""} |
| student | {_student(student)} |
| rewards trained on | {rewards} |
| code | dmdr {facts.code["version"]} |
{_parity(facts.parity)}
{_stages(facts.stages)}

A score on a reward that is named above proves little: the student was trained to raise it.

## Settings

| setting | value |
|---|---|
{_settings(facts.settings)}
"""


def _parts(teacher: TeacherFacts) -> str:
    return f" with `{teacher.parts}`" if teacher.parts else ""


def _student(student: Student) -> str:
    form = "full weights" if student.form == "full" else f"LoRA of rank {student.lora_rank}"
    return f"{student.steps} step{'s' * (student.steps > 1)}, {form}, EMA of decay up to {student.ema:g}"


def _forms(facts: ExportFacts) -> str:
    """For each form that was written, what it is and the code that draws an image with it."""
    classes, run = facts.classes, facts.run
    scheduler, network, teacher = classes.scheduler, classes.network, _teacher(facts.teacher, classes)
    code = {
        "pipeline": (
            "A diffusers folder, complete.",
            'from diffusers import DiffusionPipeline\npipe = DiffusionPipeline.from_pretrained("pipeline")',
        ),
        "lora": (
            "The LoRA alone, for the teacher's pipeline.",
            f"from diffusers import {classes.pipeline}, {scheduler}\n{teacher}\n"
            f'pipe.scheduler = {scheduler}.from_pretrained("lora/scheduler")\npipe.load_lora_weights("lora")',
        ),
        "weights": (
            "The network alone, for the teacher's pipeline.",
            f"from diffusers import {classes.pipeline}, {network}, {scheduler}\n{teacher}\n"
            f'pipe.{classes.part} = {network}.from_pretrained("weights")\n'
            f'pipe.scheduler = {scheduler}.from_pretrained("weights/scheduler")',
        ),
        "single-file": (
            "Network, VAE and text encoders in one file, in the layout that ComfyUI reads; its metadata has the "
            "sampler's numbers.",
            f"from diffusers import {classes.pipeline}\n"
            + _from_file(f"single-file/{run}.safetensors", "pipeline", classes),
        ),
    }
    call = ", ".join(f"{name}={value:g}" for name, value in facts.call)
    draw = f'image = pipe("a red circle", {call}).images[0]\nimage.save("image.png")'
    written = ((form, *code[form]) for form in facts.parity)
    sections = [f"## {form}\n\n{what}\n\n```python\n{load}\n{draw}\n```" for form, what, load in written]
    if classes.family not in ONE_FILE:
        sections.append("There is no single file: DMDR knows no original layout of this family.")
    return "\n\n".join(sections)


def _teacher(teacher: TeacherFacts, classes: ClassFacts) -> str:
    """The code that loads the teacher's own pipeline, by its hub's name or by a path that the reader completes."""
    if teacher.parts:
        code = _from_file(teacher.name, teacher.parts, classes)
        return f"# the teacher, with the paths that it has where you are\n{code}"
    place = "" if ADDRESS.fullmatch(teacher.name) else ", with the path that it has where you are"
    where = _quoted(teacher.name)
    return f"# the teacher{place}\npipe = {classes.pipeline}.from_pretrained({where}{_absent(classes)})"


def _from_file(file: str, config: str, classes: ClassFacts) -> str:
    code = f'pipe = {classes.pipeline}.from_single_file("{file}", config={_quoted(config)}{_absent(classes)})'
    if classes.family == "sd3" and not classes.absent:
        code += "\npipe.text_encoder_3.eval()  # diffusers leaves its dropout on"
    return code


def _quoted(name: str) -> str:
    """A path, or a hub's repository and revision, as arguments."""
    pinned = ADDRESS.fullmatch(name)
    return f'"{pinned["repo"]}", revision="{pinned["commit"]}"' if pinned else f'"{name}"'


def _absent(classes: ClassFacts) -> str:
    return "".join(f", {part}=None" for part in classes.absent)


def _parity(differences: dict[str, float]) -> str:
    each = differences.items()
    return "\n".join(f"| {form}, beside the training sampler | latents within {most:.1e} |" for form, most in each)


def _stages(stages: dict[str, StageFacts]) -> str:
    rows = {stage: f"`{each.fingerprint}`, {each.duration_s:.0f} s" for stage, each in stages.items()}
    return "\n".join(f"| stage {stage} | {row} |" for stage, row in rows.items())


def _settings(settings: dict[str, object]) -> str:
    return "\n".join(f"| {name} | {_cell(value)} |" for name, value in settings.items())


def _cell(value: object) -> str:
    """A value that cannot break the table it stands in."""
    return str(value).replace("|", "\\|").replace("\n", " ")
