"""The stage export: the student of joint training in the forms that the config names.

1. Each form is checked: its pipeline draws the same latents as the training sampler with the same, rounded weights.
2. What rounding to export.dtype changes is measured and told, but not judged: evaluation scores the exported pipeline.
3. provenance.json and SHA256SUMS, which `sha256sum -c` reads, lie beside the forms. The model card is the README.md in
   each form's folder, because each is copied alone.
"""

from __future__ import annotations

import json
from pathlib import Path

from dmdr.backbones.protocol import Backbone
from dmdr.config.identity import identity
from dmdr.errors import Stopped
from dmdr.export.parity import compare_latents, load_form, measure_difference, sample_probes
from dmdr.export.rounding import DTYPES, WRITING_ORDER, round_parts
from dmdr.export.write import WEIGHTS, absent_text_encoders, build_metadata, load_student, network_part, write_form
from dmdr.teacher.load import digest_teacher, find_teacher_of, load_teacher
from stages.reports import provenance
from stages.reports.export_facts import CallFacts, ClassFacts, ExportFacts, PromptFacts, StageFacts, TeacherFacts
from stages.reports.model_card import render_card
from stages.runtime.context import Context
from stages.runtime.device import pick_device
from stages.store.layout import digest
from stages.store.published_teachers import teacher_name

SUMS = "SHA256SUMS"


def run(context: Context) -> dict[str, object]:
    """Write a folder for each form of the config, provenance.json and SHA256SUMS. Returns the facts for the record.

    Raises:
        DataError: the weights do not fit the teacher, or a form does not draw the student's images.
        Stopped: SIGTERM arrived; the next run starts over.
    """
    config, trained, source = context.config, context.input("joint"), find_teacher_of(context.config.teacher)
    steps, forms = config.student.steps, config.forms
    dtype = DTYPES[config.export.dtype]
    backbone = load_teacher(source, pick_device(config), resolution=config.teacher.resolution)
    load_student(backbone.network, trained, lora_dtype=dtype)
    about = build_metadata(backbone, steps, title=context.artifact.run, teacher=digest_teacher(source))
    unrounded = sample_probes(backbone, steps, seed=config.seed)
    differences: dict[str, float] = {}
    for number, form in enumerate(sorted(forms, key=WRITING_ORDER.index)):
        round_parts(backbone, form, dtype)
        write_form(form, backbone, trained / WEIGHTS, steps, context.out, about, dtype=dtype)
        _stop_if_asked(context)
        context.progress.update(2 * number + 1, 2 * len(forms))
        pipe = load_form(form, context.out, backbone, source)
        differences[form] = compare_latents(backbone, backbone.network, steps, pipe, seed=config.seed)
        del pipe  # or it would wait in memory beside the next one
        _stop_if_asked(context)
        context.progress.update(2 * number + 2, 2 * len(forms))
    rounding = measure_difference(unrounded, sample_probes(backbone, steps, seed=config.seed))
    facts = build_facts(context, backbone, {form: differences[form] for form in forms}, rounding)
    for form in forms:
        (context.out / form / "README.md").write_text(render_card(facts), encoding="utf-8")
    text = json.dumps(facts.to_json(), indent=2, allow_nan=False, ensure_ascii=False)
    (context.out / "provenance.json").write_text(text + "\n", encoding="utf-8")
    (context.out / SUMS).write_text(list_checksums(context.out), encoding="utf-8")
    return {"steps": steps, "parity": max(differences.values())}


def list_checksums(folder: Path) -> str:
    """A line for each file: its sha256 and relative path, as `sha256sum -c` reads them."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return "".join(f"{digest(file).sha256}  {file.relative_to(folder).as_posix()}\n" for file in files)


def _stop_if_asked(context: Context) -> None:
    if context.stop():
        raise Stopped("stopped; nothing was kept, repeat the command to start over")


def build_facts(context: Context, backbone: Backbone, differences: dict[str, float], rounding: float) -> ExportFacts:
    """The content of provenance.json.

    differences: form -> greatest difference of its latents from those of the training sampler.
    rounding: the root mean square difference that export.dtype made to the latents.
    """
    config, sealed = context.config, provenance.read_records(context)
    steps, parts = config.student.steps, config.teacher.parts
    return ExportFacts(
        run=context.artifact.run,
        teacher=TeacherFacts(
            name=teacher_name(config.teacher.path),
            parts=teacher_name(parts) if parts else None,
            digest=sealed["prompts"].inputs["teacher"],
        ),
        prompts=PromptFacts(
            fingerprint=sealed["prompts"].fingerprint,
            counts={name: count for name, count in sealed["prompts"].facts.items() if isinstance(count, int)},
        ),
        student=config.student,
        nfe=steps,
        call=CallFacts(
            num_inference_steps=steps,
            guidance_scale=backbone.plain_guidance,
            height=backbone.resolution,
            width=backbone.resolution,
        ),
        rewards=dict(config.joint.rl.rewards) if config.joint.rl else {},
        parity=differences,
        dtype=config.export.dtype,
        rounding=rounding,
        classes=ClassFacts(
            family=backbone.family,
            pipeline=type(backbone.pipe).__name__,
            part=network_part(backbone),
            network=type(backbone.network).__name__,
            scheduler=type(backbone.student_scheduler(steps)).__name__,
            absent=absent_text_encoders(backbone),
        ),
        stages={
            stage: StageFacts.model_validate({"fingerprint": record.fingerprint, **record.provenance.to_dict()})
            for stage, record in sealed.items()
        },
        code=sealed["joint"].provenance.code,
        settings=provenance.collect_settings(sealed, identity(config, "export")),
    )
