"""The README.md of an exported form: what the model is, what it draws, how to load each form, where it comes from.

Here its words are chosen; templates/model_card.md.jinja holds its text. A hub shows the same card with other addresses:
there the repository's root is one form, and the others are its folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dmdr.config.student import Student
from dmdr.metrics.scorecard import Figures
from dmdr.teacher.hub import ADDRESS
from dmdr.teacher.load import ONE_FILE
from stages.reports.export_facts import ExportFacts, LicenceFacts, StartFacts
from stages.reports.numbers import format_count
from stages.reports.provenance import describe_control
from stages.reports.rendering import render_template
from stages.reports.scorecard_text import format_scorecard

LONGEST = 120  # characters of a prompt under its image
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class HubPlace:
    """Where a card is shown: a repository of a model hub whose root is the form `root`."""

    repo: str
    root: str


@dataclass(frozen=True)
class ModelCard:
    """What the card says besides the facts of the export.

    teacher, parts: as arguments of from_pretrained or from_single_file; pinned: the teacher is on the hub at a commit.
    bases: the repositories of teacher and start on the hub. absent: arguments for parts that are not there. call:
    arguments that draw an image. prompt: in quotes. scores: of the scorecard, as a table. control: a warning, if there
    is one.
    """

    facts: ExportFacts
    place: HubPlace | None
    student: str
    rewards: str
    counts: str
    teacher: str
    parts: str | None
    pinned: bool
    bases: Sequence[str]
    licence: LicenceFacts
    absent: str
    call: str
    prompt: str
    has_single_file: bool
    scores: str | None
    settings: Sequence[tuple[str, str]]
    control: str | None

    @property
    def relation(self) -> str:
        """What a hub calls the model beside its base."""
        return "adapter" if list(self.facts.parity) == ["lora"] or self._is_root("lora") else "finetune"

    def address(self, form: str, inside: str = "") -> str:
        """A form, or a folder in it, as arguments of from_pretrained."""
        path = [] if self._is_root(form) else [form]
        folder = "/".join([*path, inside] if inside else path)
        if self.place is None:
            return f'"{folder}"'
        return f'"{self.place.repo}"' + (f', subfolder="{folder}"' if folder else "")

    def file(self, form: str, name: str) -> str:
        """A file of a form as an argument of from_single_file."""
        path = name if self._is_root(form) else f"{form}/{name}"
        return f'"{path}"' if self.place is None else f'"{HUB}/{self.place.repo}/blob/main/{path}"'

    def _is_root(self, form: str) -> bool:
        return self.place is not None and self.place.root == form


def render_card(facts: ExportFacts, *, place: HubPlace | None = None, scorecard: Figures | None = None) -> str:
    """The card in Markdown, with the front matter that model hubs read.

    place: where it is shown; None: beside the folders of the other forms. scorecard: None if it is not known.
    """
    teacher, classes = facts.teacher, facts.classes
    pinned = [ADDRESS.fullmatch(name) for name in (teacher.name, teacher.parts or "")]
    base = next((each["repo"] for each in pinned if each), None)
    start = ADDRESS.fullmatch(facts.start.name) if facts.start else None
    bases = [each for each in (base, start["repo"] if start else None) if each]
    card = ModelCard(
        facts,
        place=place,
        student=describe_student(facts.student, facts.update),
        rewards=", ".join(f"{name} (weight {weight:g})" for name, weight in facts.rewards.items()) or "none",
        counts=", ".join(f"{name} {value:,}" for name, value in facts.prompts.counts.items()),
        teacher=quote_address(teacher.name),
        parts=quote_address(teacher.parts) if teacher.parts else None,
        pinned=ADDRESS.fullmatch(teacher.name) is not None,
        bases=list(dict.fromkeys(bases)),
        licence=join_licences(name_licence(facts.licence, base), facts.start),
        absent="".join(f", {part}=None" for part in classes.absent),
        call=", ".join(f"{name}={format_argument(value)}" for name, value in facts.call.list_arguments().items()),
        prompt=quote(facts.samples[0] if facts.samples else "a red circle"),
        has_single_file=classes.family in ONE_FILE,
        scores=None if scorecard is None else format_scorecard(scorecard),
        settings=[(name, escape_cell(value)) for name, value in facts.settings.items()],
        control=describe_control(facts.settings),
    )
    return render_template("model_card.md.jinja", card=card, facts=facts, quote=quote, caption=write_caption)


def name_licence(licence: LicenceFacts | None, base: str | None) -> LicenceFacts:
    """What the card says of the licence; base: the teacher's repository, where a file that the licence names lies."""
    if licence is None:
        link = f"{HUB}/{base}" if base else None
        return LicenceFacts(license="other", license_name="same-as-teacher", license_link=link)
    if base and licence.license_link and "://" not in licence.license_link:
        return licence.model_copy(update={"license_link": f"{HUB}/{base}/blob/main/{licence.license_link}"})
    return licence


def join_licences(teacher: LicenceFacts, start: StartFacts | None) -> LicenceFacts:
    """The licence of a student that started elsewhere: the teacher's, unless the start's is known to be another."""
    if start is None or start.licence is None or start.licence.license == teacher.license != "other":
        return teacher
    names = [each.license_name or each.license for each in (teacher, start.licence)]
    return LicenceFacts(license="other", license_name="-and-".join(names), license_link=teacher.license_link)


def describe_student(student: Student, update: int | None = None) -> str:
    """Steps, form and average of the weights. update: of joint training, where it is not the one that it exports."""
    form = "full weights" if student.form == "full" else f"LoRA of rank {student.lora_rank}"
    sampler = "" if student.few_steps.is_stochastic else ", deterministic"
    after = "" if update is None else f", after update {update:,} of joint training"
    return f"{format_count(student.steps, 'step')}{sampler}, {form}, EMA of decay up to {student.ema:g}{after}"


def format_argument(value: float | list[int] | list[float]) -> str:
    """An argument as Python reads it."""
    return f"[{', '.join(f'{each:g}' for each in value)}]" if isinstance(value, list) else f"{value:g}"


def quote_address(name: str) -> str:
    """A path, or a hub's repository and revision, as arguments in Python."""
    pinned = ADDRESS.fullmatch(name)
    return f'"{pinned["repo"]}", revision="{pinned["commit"]}"' if pinned else f'"{name}"'


def quote(text: str) -> str:
    """A text in double quotes, as Python and YAML read it."""
    return json.dumps(text, ensure_ascii=False)


def escape_cell(value: object) -> str:
    """A value that cannot break the Markdown table that it stands in."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def write_caption(prompt: str) -> str:
    """A prompt as a line of Markdown that shows it as it is."""
    line = " ".join(prompt.split())
    short = line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."
    return re.sub(r"([\\`*_\[\]|<>#!])", r"\\\1", short)
