"""A run in small: the stages' own code on a few prompts and one update a stage, in a folder that is deleted afterwards.

Teacher, shapes, batch and precision are the config's. Where several processes share a batch, this one takes the share
of one of them. Joint training starts from the teacher, or from student.start, as if a cold start had changed nothing.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dmdr.config.identity import identity
from dmdr.config.prompt_record import PromptRecord
from dmdr.config.rl import Policy
from dmdr.config.run import Config
from dmdr.config.stages import StageName
from dmdr.errors import ConfigError, DataError, StoreError
from dmdr.planning.gpus import FIT, GIB, list_remedies
from dmdr.teacher.load import digest_teacher, find_teacher_of
from stages.prompt_sources.report import PromptCounts
from stages.runtime.context import Context
from stages.runtime.progress import Progress, format_seconds
from stages.store.address import open_place
from stages.store.artifacts import Artifact
from stages.store.folder import Folder

if TYPE_CHECKING:
    from dmdr.planning.first_images import Images
    from dmdr.planning.stage_plan import StagePlan
    from dmdr.planning.trial import Trial
    from dmdr.promptset import Split

KEPT: dict[Split, int] = {"train": 8, "evaluation": 4}  # prompts of each split that are encoded
LIMIT = 180.0  # seconds of one update, or of drawing by the teacher; what would take longer is made smaller
REMEDIES = 2  # that a line names


class Notes(Progress):
    """Keeps what a stage says, and shows nothing."""

    def __init__(self, stage: str) -> None:
        super().__init__(stage, shown=False)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def count_written_bytes(config: Config, plan: StagePlan) -> float:
    """Bytes that a training stage has in the store at most: its checkpoints, its result, and what is exported of it."""
    trained = 4 * sum(plan.trained.values())
    student = 4 * plan.trained["student"]
    checkpoint = trained + plan.parts["optimizers"] + plan.parts["EMA"]
    result = trained + student
    exported = len(config.forms) * plan.parts["teacher"] if plan.stage == "joint" else 0
    return (config.execution.keep_checkpoints + 1) * checkpoint + result + exported


class Rehearsal:
    """A run in small. config: with its teacher found. folder: empty; everything is written there."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder, self.store = config, folder, str(folder / "store")
        self.plans: list[StagePlan] = []  # of the training stages, once they are planned

    def list_memory_needs(self) -> tuple[str, ...]:
        """The checks without which nothing large may be loaded: on a CPU, too little memory would end this process."""
        from stages.runtime.device import pick_device

        return ("memory",) if pick_device(self.config) == "cpu" else ()

    def plan(self, counts: PromptCounts) -> str:
        """Compare the plan of the training stages with the memory that is free here.

        counts: of all prompts, which decide whether text encoders lie beside the networks.

        Raises:
            ConfigError: a stage needs more.
        """
        from dmdr.planning.plan import plan_stage
        from dmdr.planning.prompts import add_text_encoders, choose
        from dmdr.planning.text_encoders import count_text_bytes
        from stages.runtime.device import measure_free_memory, pick_device

        device = pick_device(self.config)
        where, free = ("the GPU" if device == "cuda" else "this machine"), FIT * measure_free_memory(device)
        self.plans = [plan_stage(self.config, stage) for stage in self.config.training_stages]
        layout = choose(self.config, counts.train + counts.evaluation, self.plans)
        add_text_encoders(self.config, layout, self.plans, count_text_bytes(self.config.teacher))
        for plan in self.plans:
            if (need := max(plan.peak, plan.load)) > free:
                remedies = "; ".join(list_remedies(self.config, self.plans)[:REMEDIES])
                raise ConfigError(
                    f"{plan.stage} needs {need / GIB:.1f} GiB by its plan, and {where} has {free / GIB:.1f} GiB free "
                    f"for tensors: {remedies}; dmdr plan shows the parts"
                )
        needs = ", ".join(f"{plan.stage} {plan.peak / GIB:.1f}" for plan in self.plans)
        return f"{needs} GiB by the plan, of {free / GIB:.1f} GiB that {where} has free for tensors"

    def encode(self, kept: Mapping[Split, list[PromptRecord]], counts: PromptCounts) -> str:
        """Load the whole teacher, compare it with plain diffusers, and encode a few prompts, as the stage prompts does.

        kept: the few. counts: of all, which decide which way the run encodes.

        Raises:
            any of USER_ERRORS: as the stage.
        """
        from dmdr.planning.prompts import choose
        from stages.prompts import run

        config = self.config
        is_text = bool(self.plans) and choose(config, counts.train + counts.evaluation, self.plans) == "text"
        prompts = config.prompts.model_copy(
            update={
                "sources": (str(_write_records(self.folder / "train.jsonl", kept["train"])),),
                "evaluation": str(_write_records(self.folder / "evaluation.jsonl", kept["evaluation"])),
                "column": "prompt",
                "encode": "on_the_fly" if is_text else "stage",
                "folder": None,
            }
        )
        joint = config.joint.model_copy(update={"rl": None, "watch": None})  # their weights have checks of their own
        cold_start = config.cold_start and config.cold_start.model_copy(update={"rl": None})
        evaluate = config.evaluate.model_copy(update={"metrics": (), "pipelines": {}})
        sections = {"prompts": prompts, "cold_start": cold_start, "joint": joint, "evaluate": evaluate}
        few = config.model_copy(update=sections)
        context = self._begin("prompts", few)
        self._seal(context, run(context))
        assert isinstance(context.progress, Notes)
        warnings = [line for line in context.progress.lines if not line.startswith("read ")]
        return "; ".join(["draws as plain diffusers does, and encodes prompts", *warnings])

    def measure_disk(self, store: str, counts: PromptCounts) -> str:
        """Compare what the run will write, prompts and checkpoints above all, with the space of its store.

        Raises:
            StoreError: a folder has less space.
        """
        from dmdr.planning.prompts import choose, list_ways

        total = counts.train + counts.evaluation
        layout = choose(self.config, total, self.plans)
        prompts = next(
            way.stored for way in list_ways(self.config, total, self.plans, 0) if way.is_chosen(self.config, layout)
        )
        need = prompts + sum(count_written_bytes(self.config, plan) for plan in self.plans)
        words = f"about {need / GIB:.1f} GiB, {prompts / GIB:.1f} GiB of them prompts"
        place = open_place(store)
        if not isinstance(place, Folder):
            return f"the run will write {words}"
        there = next(each for each in (place.root, *place.root.parents) if each.exists())
        free = shutil.disk_usage(there).free
        if need > free:
            raise StoreError(
                f"the run will write {words}, and {there} has {free / GIB:.1f} GiB free; choose another --store"
            )
        return f"the run will write {words}, and {there} has {free / GIB:.1f} GiB free"

    def draw(self) -> str:
        """Draw a few images with the teacher, and let every reward and metric judge them.

        Raises:
            DataError: an image shows nothing, or a score is not a number.
            ConfigError, InputMissing: as evaluation.
        """
        from dmdr.metrics.load import check_resolution
        from dmdr.planning.first_images import draw_first_images
        from dmdr.promptset import PromptSet
        from stages.runtime.device import pick_device, release_memory
        from stages.runtime.prompt_inputs import PromptInputs

        config = self.config
        inputs = PromptInputs(self._begin("evaluate", config))
        backbone = inputs.load_teacher(pick_device(config))
        check_resolution(config.evaluate.metrics, backbone.resolution)
        prompts, empty_prompt = inputs.open_encoded("evaluation", backbone), PromptSet.unconditional(inputs.files)
        drawn = draw_first_images(config, backbone, prompts=prompts, empty_prompt=empty_prompt, limit=LIMIT)
        del backbone, prompts
        release_memory()
        if fault := _name_faults(drawn.teacher):
            raise DataError(f"the teacher's images show nothing ({fault}); give the teacher as it was published")
        if fault := _name_faults(drawn.exported):
            raise DataError(
                f"decoded in {config.export.dtype}, export.dtype, the teacher's images show nothing ({fault}), but "
                "those in float32 do; set export.dtype to another, or give a VAE that was made for it"
            )
        if broken := [figure for figure, score in drawn.scores.items() if score is None]:
            raise DataError(f"{', '.join(broken)}: the score of a whole image is not a number; check its weights")
        scores = ", ".join(f"{figure} {score:.3g}" for figure, score in drawn.scores.items())
        steps = f"{drawn.steps} steps" + (" only, for time" if drawn.steps < config.teacher.steps else "")
        notes = [f"left out: {', '.join(drawn.missing)}"] if drawn.missing else []
        if fault := _name_faults(drawn.student):
            notes.append(f"at its start the student draws nothing yet ({fault})")
        return "; ".join([f"by the teacher in {steps}: {scores}", *notes])

    def train(self, stage: StageName) -> str:
        """Run one update of a training stage at its real shapes, and keep the student of joint training.

        Raises:
            any of USER_ERRORS: as the stage.
        """
        from dmdr.planning.trial import try_update
        from stages.runtime.device import release_memory
        from stages.training import start_session, write_student

        config = self._share_batch(stage)
        context = self._begin(stage, config)
        session = start_session(context, stage)
        trial = try_update(session.run, session.state, limit=LIMIT)
        if session.run.watch is not None:
            session.run.watch.measure()
        if stage == "joint":
            write_student(context, session.run.base, session.state)
            self._seal(context, {})
        del session
        release_memory()
        return self._describe(stage, config.training_of(stage).batch_size, trial)

    def export(self) -> str:
        """Write every form of the student, let plain diffusers draw with each, and draw with the result as a user does.

        Raises:
            any of USER_ERRORS: as the stage.
            DataError: the student's image shows nothing.
        """
        import numpy as np

        from dmdr.metrics.faults import find_fault
        from stages.export import run
        from stages.generation.drawing import draw_image, load_models
        from stages.generation.source import find_student
        from stages.runtime.device import release_memory

        context = self._begin("export", self.config)
        facts = run(context)
        self._seal(context, facts)
        release_memory()
        source = find_student(self.store, self.config.run)
        student, _ = load_models(source, self.config, self.folder / "fetched", compare=False)
        image = draw_image(student, "a photo of an apple", 0).image
        if (fault := find_fault(np.asarray(image), True)) is not None:
            raise DataError(f"the exported student draws an image that shows nothing ({fault}); see the check images")
        return f"{', '.join(self.config.forms)}: plain diffusers draws the same latents, {facts['parity']:.0e} apart"

    def _begin(self, stage: StageName, config: Config) -> Context:
        """The context of a stage of the run in small."""
        artifact = Artifact(self.store, config.run, stage)
        artifact.claim(identity(config, stage), {"teacher": digest_teacher(find_teacher_of(config.teacher))})
        workspace = artifact.workspace()
        (out := workspace / "out").mkdir()
        return Context(config, artifact, out, workspace / "inputs", Notes(stage), lambda: False)

    @staticmethod
    def _seal(context: Context, facts: dict[str, object]) -> None:
        from stages.runtime.provenance import describe_process

        context.artifact.seal(context.out, facts=facts, provenance=describe_process(context.config, 0.0))

    def _share_batch(self, stage: StageName) -> Config:
        """The config with the batch that one process trains on. One look of the watch is enough."""
        training, ranks = self.config.training_of(stage), self.config.count_ranks(stage)
        changes: dict[str, object] = {"batch_size": math.ceil(training.batch_size / ranks)}
        if isinstance(training.rl, Policy):
            groups = math.ceil(training.rl.batch / training.rl.group_size / ranks)
            shares = {"batch": groups * training.rl.group_size, "states": math.ceil(training.rl.states / ranks)}
            changes["rl"] = training.rl.model_copy(update=shares)
        return self.config.model_copy(update={stage: training.model_copy(update=changes)})

    def _describe(self, stage: StageName, share: int, trial: Trial) -> str:
        updates, ranks = self.config.training_of(stage).updates, self.config.count_ranks(stage)
        batch = f"a batch of {share}" + (f" (that of one of {ranks} processes)" if ranks > 1 else "")
        last = f"{updates:,} updates take {format_seconds(updates * trial.whole)}"
        peak = f"; {trial.peak / GIB:.1f} GiB of GPU memory" if trial.peak else ""
        if trial.samples == share:
            return f"{batch} in {trial.seconds:.2g} s, so that {last}{peak}"
        return (
            f"{trial.samples} of {batch} in {trial.seconds:.2g} s; all of it would take about "
            f"{format_seconds(trial.whole)} here and was not tried; {last}{peak}"
        )


def _write_records(path: Path, records: list[PromptRecord]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def _name_faults(images: Images) -> str:
    """What is wrong with images, in words: "2 of 4 black"; empty where nothing is."""
    from dmdr.metrics.faults import find_fault

    pairs = zip(images.pixels, images.are_finite, strict=True)
    faults = [fault for pixels, is_finite in pairs if (fault := find_fault(pixels, is_finite)) is not None]
    return ", ".join(f"{faults.count(each)} of {len(images.pixels)} {each}" for each in dict.fromkeys(faults))
