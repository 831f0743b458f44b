"""The stage export: the student of joint training in the forms that the config names.

1. Each form is checked: its pipeline draws the same latents as the training sampler with the same, rounded weights.
2. What rounding to export.dtype changes is measured and told, but not judged: evaluation scores the exported pipeline.
3. provenance.json and SHA256SUMS, which `sha256sum -c` reads, lie beside the forms. Each form's folder has the model
   card (README.md), its images and a workflow for ComfyUI, because each is copied alone.
4. With `execution.signing_key` each form is signed, and the whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dmdr.assembly.stage_config import name_kept
from dmdr.backbones.protocol import Backbone
from dmdr.config.identity import identity
from dmdr.config.run import Config
from dmdr.config.student import Student
from dmdr.errors import USER_ERRORS, Stopped, doing
from dmdr.export.comfyui import build_workflow
from dmdr.export.parity import compare_latents, load_form, measure_difference, sample_probes
from dmdr.export.rounding import DTYPES, WRITING_ORDER, round_parts
from dmdr.export.write import WEIGHTS, absent_text_encoders, build_metadata, load_student, network_part, write_form
from dmdr.teacher.load import TeacherSource, digest_teacher, find_teacher_of, load_teacher
from dmdr.teacher.single_file import SingleFile
from dmdr.teacher.start_files import digest_start, find_start
from stages.generation.drawing import build_call
from stages.generation.samples import PROMPTS_FILE, choose_prompts, draw_samples
from stages.reports import provenance
from stages.reports.export_facts import (
    ClassFacts,
    ExportFacts,
    PromptFacts,
    StageFacts,
    StartFacts,
    TeacherFacts,
)
from stages.reports.licence import read_licence
from stages.reports.model_card import render_card
from stages.runtime.context import Context
from stages.runtime.device import pick_device
from stages.store.layout import digest
from stages.store.published_teachers import teacher_name
from stages.store.records import Record
from stages.store.signature import check_signing_key, sign_export

SUMS = "SHA256SUMS"
WORKFLOW, IMAGES = "comfyui.json", "images"


@dataclass(frozen=True)
class Written:
    """What was found and written beside the forms.

    parity: form -> greatest difference of its latents from those of the training sampler. rounding: the root mean
    square difference that export.dtype made to the latents. samples: the prompts of the card's images. comfyui: the
    forms that have a workflow. update: as for `run`.
    """

    parity: dict[str, float]
    rounding: float
    samples: tuple[str, ...]
    comfyui: tuple[str, ...]
    update: int | None = None


def run(context: Context, *, update: int | None = None) -> dict[str, object]:
    """Write a folder for each form of the config, provenance.json and SHA256SUMS. Returns the facts for the record.

    update: of a student that the watch kept; None: the one that training exports.

    Raises:
        ConfigError, InputMissing: execution.signing_key is no key that can sign.
        DataError: the weights do not fit the teacher, or a form does not draw the student's images.
        NonFinite: an image of the model card is not a number.
        Stopped: SIGTERM arrived; the next run starts over.
    """
    config, source = context.config, find_teacher_of(context.config.teacher)
    few, dtype = config.student.few_steps, DTYPES[config.export.dtype]
    if config.execution.signing_key is not None:
        check_signing_key(config.execution.signing_key)  # before minutes of work
    backbone = load_teacher(source, pick_device(config), resolution=config.teacher.resolution)
    trained = context.input("joint")
    weights = trained / (WEIGHTS if update is None else name_kept(update))
    load_student(backbone.network, trained, weights=weights, lora_dtype=dtype)
    unrounded = sample_probes(backbone, few, seed=config.seed)
    parity = write_forms(context, backbone, source, weights)
    rounding = measure_difference(unrounded, sample_probes(backbone, few, seed=config.seed))
    prompts = choose_prompts(context.input("prompts", PROMPTS_FILE))
    workflows = write_workflows(context, backbone, prompts[0])
    written = Written(parity, rounding, tuple(prompts), workflows, update)
    facts = build_facts(context, backbone, source, written)
    images = draw_samples(backbone, few, prompts)
    for form in config.forms:
        folder = context.out / form
        (folder / IMAGES).mkdir()
        for number, image in enumerate(images, start=1):
            image.save(folder / IMAGES / f"{number}.png")
        (folder / "README.md").write_text(render_card(facts), encoding="utf-8")
    text = json.dumps(facts.to_json(), indent=2, allow_nan=False, ensure_ascii=False)
    (context.out / "provenance.json").write_text(text + "\n", encoding="utf-8")
    (context.out / SUMS).write_text(list_checksums(context.out), encoding="utf-8")
    if config.execution.signing_key is not None:
        sign_export(context.out, config.forms, config.execution.signing_key)
    return {"steps": few.steps, "dtype": config.export.dtype, "parity": max(parity.values())}


def write_forms(context: Context, backbone: Backbone, source: TeacherSource, weights: Path) -> dict[str, float]:
    """Write each form and compare it with the training sampler: form -> the difference, in the config's order.

    weights: the file of the student. The backbone's network is the student, and in the end rounded as the last form is.

    Raises:
        DataError: a form does not draw the student's images.
        Stopped: SIGTERM arrived.
    """
    config = context.config
    few, dtype = config.student.few_steps, DTYPES[config.export.dtype]
    about = build_metadata(backbone, few, title=context.artifact.run, teacher=digest_teacher(source))
    parity: dict[str, float] = {}
    for number, form in enumerate(sorted(config.forms, key=WRITING_ORDER.index)):
        with doing(f"writing the form {form}"):
            round_parts(backbone, form, dtype)
            write_form(form, backbone, weights, few, context.out, about, dtype=dtype)
        _stop_if_asked(context)
        context.progress.update(2 * number + 1, 2 * len(config.forms))
        with doing(f"comparing the form {form} with the training sampler"):
            pipe = load_form(form, context.out, backbone, source, few)
            parity[form] = compare_latents(backbone, backbone.network, few, pipe, seed=config.seed)
        del pipe  # or it would wait in memory beside the next one
        _stop_if_asked(context)
        context.progress.update(2 * number + 2, 2 * len(config.forms))
    return {form: parity[form] for form in config.forms}


def write_workflows(context: Context, backbone: Backbone, prompt: str) -> tuple[str, ...]:
    """Write a ComfyUI workflow of this prompt into each form's folder that has one; returns those forms."""
    run, few = context.artifact.run, context.config.student.few_steps
    teacher = teacher_name(context.config.teacher.path)
    forms: list[str] = []
    for form in context.config.forms:
        workflow = build_workflow(form, backbone, few, title=run, teacher=teacher, prompt=prompt)
        if workflow is not None:
            text = json.dumps(workflow, indent=2, ensure_ascii=False)
            (context.out / form / WORKFLOW).write_text(text + "\n", encoding="utf-8")
            forms.append(form)
    return tuple(forms)


def list_checksums(folder: Path) -> str:
    """A line for each file: its sha256 and relative path, as `sha256sum -c` reads them."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return "".join(f"{digest(file).sha256}  {file.relative_to(folder).as_posix()}\n" for file in files)


def _stop_if_asked(context: Context) -> None:
    if context.stop():
        raise Stopped("stopped; nothing was kept, repeat the command to start over")


def name_start(student: Student) -> Student:
    """The settings of a student, whose start is named as it is on every machine."""
    if student.start is None:
        return student
    start = student.start.model_copy(update={"path": teacher_name(student.start.path)})
    return student.model_copy(update={"start": start})


def describe_start(config: Config, sealed: Mapping[str, Record]) -> StartFacts | None:
    """What the student started from; None: the teacher. Its card tells the licence, where it is still there."""
    start = config.student.start
    if start is None:
        return None
    digest = next(record.inputs["start"] for record in sealed.values() if "start" in record.inputs)
    licence = None
    try:
        source = find_start(start, config.student.form)
        if source.card is not None and digest_start(source) == digest:
            licence = read_licence(source.card.parent)
    except USER_ERRORS:  # the student is trained, and needs its start no more
        pass
    return StartFacts(name=teacher_name(start.path), digest=digest, licence=licence)


def build_facts(context: Context, backbone: Backbone, source: TeacherSource, written: Written) -> ExportFacts:
    """The content of provenance.json."""
    config, sealed = context.config, provenance.read_records(context)
    few, parts = config.student.few_steps, config.teacher.parts
    return ExportFacts(
        run=context.artifact.run,
        teacher=TeacherFacts(
            name=teacher_name(config.teacher.path),
            parts=teacher_name(parts) if parts else None,
            digest=sealed["prompts"].teacher_digest,
        ),
        prompts=PromptFacts(
            fingerprint=sealed["prompts"].fingerprint,
            counts={name: count for name, count in sealed["prompts"].facts.items() if isinstance(count, int)},
        ),
        student=name_start(config.student),
        start=describe_start(config, sealed),
        nfe=few.steps,
        call=build_call(backbone, few),
        rewards=config.trained_rewards,
        parity=written.parity,
        dtype=config.export.dtype,
        rounding=written.rounding,
        samples=written.samples,
        comfyui=written.comfyui,
        update=written.update,
        licence=read_licence(source.parts if isinstance(source, SingleFile) else source),
        classes=ClassFacts(
            family=backbone.family,
            pipeline=type(backbone.pipe).__name__,
            part=network_part(backbone),
            network=type(backbone.network).__name__,
            scheduler=type(backbone.student_scheduler(few)).__name__,
            absent=absent_text_encoders(backbone),
        ),
        stages={
            stage: StageFacts.model_validate({"fingerprint": record.fingerprint, **record.provenance.to_dict()})
            for stage, record in sealed.items()
        },
        code=sealed["joint"].provenance.code,
        settings=provenance.collect_settings(sealed, identity(config, "export")),
    )
