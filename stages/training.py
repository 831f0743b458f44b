"""What cold start and joint training share: assemble, resume from the newest checkpoint, report, write the student."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file

from dmdr import distributed
from dmdr.assembly.agreement import build_probe
from dmdr.assembly.checks import prepare_kernels
from dmdr.assembly.networks import assemble, is_sharded
from dmdr.assembly.run import build_run, build_watcher
from dmdr.assembly.stage_config import EMA_FILE, FAKE_FILE, STUDENT_FILE, name_kept, select_stage
from dmdr.config.batches import check_split
from dmdr.config.prompt_record import PromptRecord
from dmdr.config.stages import StageName
from dmdr.draws import Run
from dmdr.errors import RewardUnavailable, Stopped
from dmdr.metrics.verifier import check_training_prompts
from dmdr.optimizers import check_optimizers
from dmdr.promptset import PromptSet
from dmdr.promptset.ahead import Ahead
from dmdr.rewards.sources import list_sources
from dmdr.shared_base import FAKE, STUDENT, SharedBase
from dmdr.state import Row, StateInfo, TensorsBelow, TrainState, check_info
from dmdr.watch.alarms import list_kept
from dmdr.watch.figures import select_looks
from dmdr.watch.recovery import Saved
from dmdr.watch.summary import exported_ema, list_students, summarize
from stages.live.stage import LiveStage
from stages.reports.agreement import describe_agreement
from stages.reports.fake_warmup import describe_warmup, summarize_warmup
from stages.reports.run_cost import find_open_cost, read_status
from stages.runtime.context import Context
from stages.runtime.device import pick_device
from stages.runtime.ledger import Budget, name_unit, write_spent
from stages.runtime.prompt_inputs import PromptInputs
from stages.runtime.remaining import count_later_steps, count_update
from stages.store.checkpoint_writer import CheckpointWriter
from stages.store.records import Spent

AT_ONCE = 1024  # records of prompts that are read together
SHOWN = ("loss_dm", "loss_fake", "real_scale")  # on the progress bar, and every reward


class Session:
    """One training stage between its start and its seal: progress, checkpoints, and the student that it writes.

    It is the vault of the stage's watch: the checkpoints that the watch keeps are those of the stage.
    """

    def __init__(
        self, context: Context, run: Run, live: LiveStage, budget: Budget, *, agreement: float | None = None
    ) -> None:
        """agreement: as an Assembly's."""
        self.context, self.live, self.budget, self.agreement = context, live, budget, agreement
        self.run = run if run.watch is None else replace(run, watch=replace(run.watch, vault=self))
        self.stage, self.state = live.stage, live.state
        stage, state = self.stage, self.state
        self.checkpoints = context.artifact.checkpoints(context.config.execution.keep_checkpoints)
        self.check = partial(check_info, updates=stage.training.updates, warmup=stage.fake_warmup)
        self.writer = CheckpointWriter(self.checkpoints)
        newest = self.checkpoints.newest(self.check)
        if newest is not None:
            state.restore(newest.tensors, cast(StateInfo, newest.info))  # `save` wrote it
            context.progress.say(f"continues from its checkpoint after {self.describe_place()}")
        context.ledger.before = find_open_cost(context.artifact, read_status(context.artifact)).spent
        self.saved = state.step
        self.stored = None if newest is None else state.step  # the step of the last checkpoint, there or on its way
        self.kept = [] if stage.watch is None else list_kept(stage.watch, select_looks(state.rows))
        self.stopped, self.begun, self.over_budget = False, False, False

    def stop(self) -> bool:
        """Whether some rank was told to stop, or the run has cost what it may; all ranks get the same answer.

        Raises:
            StoreError: the last checkpoint could not be written.
        """
        self.writer.check()
        if not self.begun:
            self.begun = True
            self.live.begin()
        over_budget = self.budget.limit is not None and self.budget.is_spent(self.measure())
        self.stopped = distributed.any_rank(self.context.stop() or over_budget)
        if self.stopped:
            self.over_budget = distributed.any_rank(over_budget)
        return self.stopped

    def measure(self) -> Spent:
        """What the stage has used so far."""
        return self.context.ledger.measure(self.live.device)

    def describe_place(self) -> str:
        """How far the stage is, in words."""
        state, warmup = self.state, self.stage.fake_warmup
        if state.warmup < warmup:
            return f"update {state.warmup} of {warmup} of the fake score alone"
        return f"update {state.update}"

    def record(self, row: Row) -> None:
        """Show a finished update, and begin a checkpoint when one is due."""
        state, warmup = self.state, self.stage.fake_warmup
        self.context.progress.update(state.step, warmup + self.stage.training.updates, **select_shown(row))
        self.live.record()
        if state.step == warmup:
            self.context.progress.say(describe_warmup(summarize_warmup(state.rows)))
        if state.step - self.saved >= self.context.config.execution.checkpoint_every:
            self.save()

    def save(self) -> None:
        """Begin a checkpoint unless the newest is of this update."""
        if self.state.step > self.saved:
            self._begin_checkpoint()

    def _begin_checkpoint(self) -> None:
        step, state = self.state.step, self.state
        kept = [self.stage.fake_warmup + update for update in self.kept]

        def count() -> None:
            if distributed.rank() == 0:
                write_spent(self.context.artifact, self.measure())

        self.writer.begin(step, state.tensors(), state.info(), apart=kept, then=count)
        self.saved = self.stored = step

    def keep(self, updates: Sequence[int]) -> None:
        """Store the present state if it is of one of these updates, and let go of those of all others."""
        self.kept = [*updates]
        if self.state.update in self.kept and self.stored != self.state.step:
            self._begin_checkpoint()

    def fetch(self, update: int) -> Saved:
        """The state before an update that is kept.

        Raises:
            DataError: it is not there, or damaged.
        """
        self.writer.wait()  # it may be on its way
        checkpoint = self.checkpoints.load(self.stage.fake_warmup + update, self.check)
        return Saved(checkpoint.tensors, cast(StateInfo, checkpoint.info))  # `save` wrote it

    def go_on_from(self, state: TrainState) -> None:
        """Show that the stage went back. What lies in the store of the course that it left goes with the next
        checkpoint; until then a resumed stage leaves that course at the same place."""
        self.saved = self.stored = state.step
        self.live.go_back()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Training goes on inside. However it ends, the checkpoint on its way is whole before anything else happens.

        Where a reward stays away, one more is written: an update that could not score its samples changed nothing.

        Raises:
            RewardUnavailable: it stayed away.
            StoreError: the last checkpoint could not be written.
        """
        try:
            yield
            self.writer.wait()
        except RewardUnavailable:
            self.save()
            self.writer.wait()
            raise
        except BaseException:
            with suppress(BaseException):  # it comes second to the error that ends the stage
                self.writer.wait()
            raise

    def finish(self) -> dict[str, object]:
        """Write the student; return what the record says of the stage.

        Raises:
            Stopped: the stage was told to stop; its checkpoint holds everything done.
            BudgetSpent: the run has cost what it may; its checkpoint holds everything done.
        """
        state, stage, updates = self.state, self.stage, self.stage.training.updates
        if self.stopped:
            self.save()
            self.writer.wait()
            self.live.end("stopped")
            place = self.describe_place() + (f" of {updates}" if state.warmup == stage.fake_warmup else "")
            if self.over_budget:
                raise self.budget.build_error(self.measure(), f"after {place}")
            raise Stopped(f"stopped after {place}; repeat the command to go on")
        if state.update < updates:
            self.context.progress.say(f"ended by {stage.name}.watch after update {state.update} of {updates}, and kept")
        self.live.end("finished")
        write_student(self.context, self.run.base, state)
        self.write_kept()
        facts: dict[str, object] = {"updates": state.update, **select_shown(state.last_row)}
        if self.agreement is not None:
            facts["agreement"] = self.agreement
        if stage.fake_warmup:
            facts["fake_warmup"] = summarize_warmup(state.rows).model_dump()
        if stage.watch is not None:
            facts["watch"] = summarize(stage.watch, state, stage.name, has_rl=stage.rl is not None)
        return facts

    def write_kept(self) -> None:
        """Write the students of the best looks, which are sealed beside the exported one.

        Raises:
            DataError: the checkpoint of one is gone, or damaged.
        """
        for update in list_students(self.stage.watch, self.state):
            ema = TensorsBelow("ema/", self.fetch(update).tensors)
            file = self.context.out / name_kept(update)
            file.parent.mkdir(exist_ok=True)
            write_tensors(self.run.base, file, STUDENT, ema)


def start_session(context: Context, name: StageName, *, before: Path | None = None) -> Session:
    """Assemble a training stage and continue it from its newest checkpoint.

    before: the output of the stage whose student goes on here; None begins at student.start, or at the teacher.

    Raises:
        ConfigError: the batch cannot be split over the processes, or an optimizer, compiler or attention is missing.
        DataError: the start or a checkpoint is of another model.
        RewardUnavailable: the service of a reward does not answer.
    """
    config, stage = context.config, select_stage(context.config, name)
    device, sharded = pick_device(config), is_sharded(config)
    micro_batch = config.execution.micro_batch_size
    steps, ranks = config.student.steps, distributed.ranks()  # torchrun may have started more than the config says
    check_split(name, stage.training, stage.rl, steps=steps, ranks=ranks, micro_batch=micro_batch)
    prepare_kernels(config, device)
    check_optimizers(stage.training, name, split=sharded and config.student.form == "full")
    inputs = PromptInputs(context)
    backbone = inputs.load_teacher("cpu" if sharded else device, weights=not sharded or distributed.rank() == 0)
    rewards = list_sources(config, say=context.progress.say, stop=context.stop)
    prompts = inputs.open_encoded("train", backbone)
    empty_prompt = PromptSet.unconditional(inputs.files)
    probe = build_probe(config, stage, backbone, prompts, empty_prompt)
    assembly = assemble(config, stage, backbone, before=before, device=device, rewards=rewards, probe=probe)
    if assembly.agreement is not None:
        context.progress.say(describe_agreement(config.frozen_base, assembly.agreement))
    if config.execution.compile:
        assembly.base.compile_blocks()
    if assembly.rl is not None:
        check_training_prompts(assembly.rl.config.rewards, read_records(inputs.open_split("train")))
        assembly.rl.algorithm.reward.probe(prompts.records(list(range(min(3, len(prompts))))))
    step = count_update(config, stage.training)
    later = count_later_steps(config, name, step=step, prompts=len(inputs.open_split("evaluation")))
    context.progress.expect(later)

    def ring(line: str) -> None:
        context.progress.say(line)
        live.alarm(line)

    watch = build_watcher(config, stage, assembly.base, prompts, empty_prompt=empty_prompt, say=ring, rewards=rewards)
    run = build_run(config, stage, assembly, prompts=prompts, empty_prompt=empty_prompt, watch=watch)
    if isinstance(prompts, Ahead):
        run = replace(run, prepare=prompts.prepare)
    unit, budget = name_unit(config), Budget(config, context.artifact)
    budget.check_price(unit)
    live = LiveStage(context, stage, run, assembly.state, device=unit, later=later)
    return Session(context, run, live, budget, agreement=assembly.agreement)


def read_records(prompts: PromptSet) -> Iterator[PromptRecord]:
    """The records of all prompts, a shard's worth at a time."""
    for start in range(0, len(prompts), AT_ONCE):
        yield from prompts.records(list(range(start, min(start + AT_ONCE, len(prompts)))))


def select_shown(row: Row) -> dict[str, float]:
    """The figures of a metrics row that the progress bar and the record show."""
    return {key: value for key, value in row.items() if key in SHOWN or key.startswith("reward/")}


def write_student(context: Context, base: SharedBase, state: TrainState) -> None:
    """Write both forms of the student, the fake score, the metrics and what the student is."""
    out, student = context.out, context.config.student
    ema, ema_update = exported_ema(state)
    write_tensors(base, out / STUDENT_FILE, STUDENT, base.student_parameters)
    write_tensors(base, out / EMA_FILE, STUDENT, ema)
    write_tensors(base, out / FAKE_FILE, FAKE, base.fake_parameters)
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in state.rows), encoding="utf-8")
    description = {
        "form": student.form,
        "steps": student.steps,
        "lora_rank": student.lora_rank,
        "ema": student.ema,
        "ema_update": ema_update,
    }
    (out / "student.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def write_tensors(base: SharedBase, file: Path, role: str, values: Mapping[str, torch.Tensor]) -> None:
    """Write the parameters of a role as others load them. All ranks call it, and the first writes."""
    is_first = distributed.rank() == 0
    tensors = {}
    for name, value in base.to_diffusers(role, dict(values)).items():
        tensor = distributed.full_tensor(value.detach())  # all ranks have to ask for it, one tensor at a time
        if is_first:
            tensors[name] = tensor.cpu().contiguous()
    if is_first:
        save_file(tensors, file)
