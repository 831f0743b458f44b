"""The exported folder's README.md: what the model is, where it comes from, how to load it."""

from __future__ import annotations


def card(facts: dict) -> str:
    """Markdown for `provenance.json`'s data, with the front matter that model hubs read."""
    student, teacher, steps = facts["student"], facts["teacher"], facts["student"]["steps"]
    rewards = ", ".join(f"{name} (weight {weight:g})" for name, weight in facts["rewards"].items()) or "none"
    call = ", ".join(f"{name}={value:g}" for name, value in facts["call"].items())
    counts = ", ".join(f"{name} {value:,}" for name, value in facts["prompts"]["counts"].items())
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [dmdr, distillation, few-step]
license: other
license_name: same-as-teacher
---

# {facts["run"]}: {steps} step{"s" * (steps > 1)} to an image

A student of `{teacher["name"]}`, distilled by DMDR (distribution matching and reinforcement learning at
once). It draws an image in {steps} network forward{"s" * (steps > 1)} ({steps} NFE), without classifier-free guidance.

```python
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("pipeline")  # this folder
image = pipe("a red circle", {call}).images[0]
image.save("image.png")
```

Give the numbers as above: the scheduler in this folder is made for exactly {steps} step{"s" * (steps > 1)} at this
size, and guidance is already in the weights.{_lora(facts)}

## Licence

The licence follows the teacher's: what holds for `{teacher["name"]}` holds for this model.

## Provenance

| what | value |
|---|---|
| teacher | `{teacher["name"]}`, sha256 `{teacher["digest"]}` |
| prompt set | `{facts["prompts"]["fingerprint"]}`{f" ({counts})" if counts else ""} |
| student | {_student(student)} |
| rewards trained on | {rewards} |
| code | dmdr {facts["code"]["version"]} |
| parity with the training sampler | latents within {facts["parity"]:.1e} |
{_stages(facts["stages"])}

A score on a reward that is named above proves little: the student was trained to raise it.

## Settings

| setting | value |
|---|---|
{_settings(facts["settings"])}
"""


def _student(student: dict) -> str:
    form = "full weights" if student["form"] == "full" else f"LoRA of rank {student['lora_rank']}, fused"
    return f"{student['steps']} step{'s' * (student['steps'] > 1)}, {form}, EMA of decay up to {student['ema']:g}"


def _lora(facts: dict) -> str:
    if facts["student"]["form"] == "full":
        return ""
    return (
        " The LoRA alone is in\n`lora/` beside this folder: `load_lora_weights` on the teacher, "
        "with this folder's scheduler, draws the same."
    )


def _stages(stages: dict[str, dict]) -> str:
    rows = {stage: f"`{each['fingerprint']}`, {each['duration_s']:.0f} s" for stage, each in stages.items()}
    return "\n".join(f"| stage {stage} | {row} |" for stage, row in rows.items())


def _settings(settings: dict[str, object]) -> str:
    return "\n".join(f"| {name} | {_cell(value)} |" for name, value in settings.items())


def _cell(value: object) -> str:
    """A value that cannot break the table it stands in."""
    return str(value).replace("|", "\\|").replace("\n", " ")
