"""The README.md of an exported form: what the model is, where it comes from, how to load each form.

Here its words are chosen; templates/model_card.md.jinja holds its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dmdr.config.run import Student
from dmdr.teacher.hub import ADDRESS
from dmdr.teacher.load import ONE_FILE
from stages.reports.export_facts import ExportFacts
from stages.reports.numbers import format_count
from stages.reports.rendering import render_template


@dataclass(frozen=True)
class ModelCard:
    """What the card says besides the facts of the export.

    teacher, parts: as arguments of from_pretrained or from_single_file; pinned: the teacher is on the hub at a commit.
    absent: arguments for the parts that the pipeline does not have. call: arguments that draw an image.
    """

    facts: ExportFacts
    student: str
    rewards: str
    counts: str
    teacher: str
    parts: str | None
    pinned: bool
    absent: str
    call: str
    has_single_file: bool
    settings: Sequence[tuple[str, str]]


def render_card(facts: ExportFacts) -> str:
    """The card in Markdown, with the front matter that model hubs read."""
    teacher, classes = facts.teacher, facts.classes
    card = ModelCard(
        facts,
        student=describe_student(facts.student),
        rewards=", ".join(f"{name} (weight {weight:g})" for name, weight in facts.rewards.items()) or "none",
        counts=", ".join(f"{name} {value:,}" for name, value in facts.prompts.counts.items()),
        teacher=quote_address(teacher.name),
        parts=quote_address(teacher.parts) if teacher.parts else None,
        pinned=ADDRESS.fullmatch(teacher.name) is not None,
        absent="".join(f", {part}=None" for part in classes.absent),
        call=", ".join(f"{name}={value:g}" for name, value in facts.call),
        has_single_file=classes.family in ONE_FILE,
        settings=[(name, escape_cell(value)) for name, value in facts.settings.items()],
    )
    return render_template("model_card.md.jinja", card=card, facts=facts)


def describe_student(student: Student) -> str:
    """Steps, form and average of the weights."""
    form = "full weights" if student.form == "full" else f"LoRA of rank {student.lora_rank}"
    return f"{format_count(student.steps, 'step')}, {form}, EMA of decay up to {student.ema:g}"


def quote_address(name: str) -> str:
    """A path, or a hub's repository and revision, as arguments in Python."""
    pinned = ADDRESS.fullmatch(name)
    return f'"{pinned["repo"]}", revision="{pinned["commit"]}"' if pinned else f'"{name}"'


def escape_cell(value: object) -> str:
    """A value that cannot break the Markdown table that it stands in."""
    return str(value).replace("|", "\\|").replace("\n", " ")
