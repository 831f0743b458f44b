"""What cold start and joint training share: load, resume from the newest checkpoint, train, write the student."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dmdr import distributed, optimizers
from dmdr.config.run import RL, Training, Watch
from dmdr.errors import Stopped
from dmdr.hacking_alarm import Watcher, exported_ema, summarize
from dmdr.promptset import PromptSet
from dmdr.rl.objective import Algorithm
from dmdr.shared_base import DTYPES, FAKE, STUDENT, SharedBase
from dmdr.state import TrainState, fill_parameters
from dmdr.teacher.load import find_teacher_of, load_teacher
from dmdr.train import Run, check_split, train
from stages.runtime.context import Context
from stages.runtime.device import pick_device

STUDENT_FILE, EMA_FILE, FAKE_FILE = "student.safetensors", "student_ema.safetensors", "fake_score.safetensors"
SHOWN = ("loss_dm", "loss_fake", "real_scale")  # on the progress bar, and every reward


def train_student(
    context: Context,
    stage: str,
    training: Training,
    *,
    start: Path | None = None,
    rl: tuple[Callable[[SharedBase], Algorithm], RL] | None = None,
    distribution_matching: bool = True,
    watch: Watch | None = None,
) -> dict:
    """Train the student of `context` and write it into context.out; returns the last figures.

    Args:
        start: output of the stage to start from; None starts from the teacher.
        rl: makes the RL algorithm; its settings.

    Raises:
        ConfigError: the batch cannot be split over the processes, or an optimizer is missing.
        DataError: the start or a checkpoint is of another model.
        NonFinite: training diverged.
        Stopped: SIGTERM arrived; a checkpoint holds everything done.
    """
    config = context.config
    splits = config.execution.sharding == "fsdp" and distributed.ranks() > 1
    optimizers.check_optimizers(training, stage, split=splits and config.student.form == "full")
    backbone = load_teacher(
        find_teacher_of(config.teacher),
        "cpu" if splits else pick_device(config),
        text=False,
        resolution=config.teacher.resolution,
    )
    base = SharedBase(
        backbone,
        fake_rank=config.fake_score.lora_rank,
        fake_scale=config.fake_score.scale,
        student_rank=config.student.lora_rank,
        seed=config.seed,
        compute=DTYPES[config.precision],
    )
    if config.execution.gradient_checkpointing:
        base.recompute_activations()
    if start is not None:
        fill_parameters(
            base.student_parameters,
            base.from_diffusers(STUDENT, load_file(start / EMA_FILE)),
            f"student of {start.name}",
        )
        fill_parameters(
            base.fake_parameters, base.from_diffusers(FAKE, load_file(start / FAKE_FILE)), f"fake score of {start.name}"
        )
    if rl is not None and rl[1].needs_reference():
        base.keep_reference()  # before a checkpoint moves the student on
    if splits:
        base.split(pick_device(config))
    algorithm = rl and (rl[0](base), rl[1])
    state = TrainState(base, training, ema=config.student.ema)
    checkpoints = context.artifact.checkpoints(config.execution.keep_checkpoints)
    found = checkpoints.newest()
    if found is not None:
        state.restore(found[1], found[2])
        context.progress.say(f"continues from its checkpoint after update {state.update}")

    folder, like = context.input("prompts"), backbone.network.device
    prompts, times = PromptSet(folder, "train"), backbone.student_times(config.student.steps).to(like)
    watcher = watch and Watcher(
        watch,
        base,
        prompts=prompts,
        times=times,
        seed=config.seed,
        batch_size=config.execution.micro_batch_size or training.batch_size,
        say=context.progress.say,
        weights=config.weights,
    )
    run = Run(
        stage=stage,
        seed=config.seed,
        training=training,
        base=base,
        prompts=prompts,
        unconditional=backbone.collate([PromptSet.unconditional(folder)]),
        times=times,
        guidance_scale=config.teacher.guidance_scale,
        rl=algorithm,
        distribution_matching=distribution_matching,
        watch=watcher,
        micro_batch=config.execution.micro_batch_size,
    )
    check_split(run)
    saved = state.update

    def checkpoint(now: bool) -> None:
        nonlocal saved
        if now or state.update - saved >= config.execution.checkpoint_every:
            if state.update > saved:
                checkpoints.save(state.update, state.tensors(), state.info())
            saved = state.update

    def report(row: dict[str, float]) -> None:
        shown = {key: value for key, value in row.items() if key in SHOWN or key.startswith("reward/")}
        context.progress.update(state.update, training.updates, **shown)

    def stop() -> bool:
        return distributed.any_rank(context.stop())

    if not train(run, state, checkpoint=checkpoint, report=report, stop=stop):
        raise Stopped(f"stopped after update {state.update} of {training.updates}; repeat the command to go on")
    if state.update < training.updates:
        context.progress.say(f"ended by {stage}.watch after update {state.update} of {training.updates}, and kept")
    write_student(context, base, state)
    last = state.rows[state.update - 1]  # a watched stage has one more, without a reward
    found = {key: last[key] for key in last if key in SHOWN or key.startswith("reward/")}
    return {"updates": state.update, **found, **({"watch": summarize(watch, state)} if watch else {})}


def write_student(context: Context, base: SharedBase, state: TrainState) -> None:
    """Both forms of the student, the fake score, the metrics and what the student is."""
    out, student = context.out, context.config.student

    def save(file: str, role: str, values: dict[str, torch.Tensor]) -> None:
        first, found = distributed.rank() == 0, {}
        for name, value in base.to_diffusers(role, values).items():
            whole = distributed.full_tensor(value.detach())  # for which all ranks have to ask, one tensor at a time
            if first:
                found[name] = whole.cpu().contiguous()
        if first:
            save_file(found, out / file)

    save(STUDENT_FILE, STUDENT, base.student_parameters)
    ema, of_update = exported_ema(state)
    save(EMA_FILE, STUDENT, ema)
    save(FAKE_FILE, FAKE, base.fake_parameters)
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in state.rows), encoding="utf-8")
    what = {"form": student.form, "steps": student.steps, "lora_rank": student.lora_rank, "ema": student.ema}
    text = json.dumps({**what, "ema_update": of_update}, indent=2)
    (out / "student.json").write_text(text + "\n", encoding="utf-8")
