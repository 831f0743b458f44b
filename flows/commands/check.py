"""`dmdr check`: whatever a long run will meet, met in minutes before it starts. A line for each check, the cheap first.

1. A check that fails says what to do, and the next one runs, unless it needs what failed.
2. The store is tried under a name that no run can have, and nothing stays there. The run itself is only read.
3. What has to be computed is a run in small (`rehearsal.py`), in a temporary folder, by the stages' own code.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dmdr.config.load import load_config
from dmdr.config.plain_text import to_line
from dmdr.config.prompt_record import PromptRecord
from dmdr.config.run import Config
from dmdr.errors import ConfigError, Stopped
from dmdr.rewards.identity import digest_rewards
from dmdr.rewards.sources import RewardSources, list_sources
from dmdr.teacher.load import family_of, find_teacher_of
from flows.commands.config_file import change_config, find_config
from flows.commands.dry_run import foresee
from flows.commands.rehearsal import KEPT, Rehearsal
from stages.prompt_sources.record_spool import RecordSpool
from stages.prompt_sources.report import Tally
from stages.runtime.last_wall import describe_end
from stages.runtime.prerequisites import (
    check_evaluation,
    check_student_start,
    check_teacher_settings,
    check_training,
    check_worlds,
    load_rewards,
    needs_records,
    warn_of_teacher,
)
from stages.store.artifacts import Artifact
from stages.store.teacher_folder import resolve_teacher
from stages.store.trial import try_store

if TYPE_CHECKING:
    from dmdr.promptset import Split  # brings torch

OK, FIX, LEFT_OUT = "ok", "fix", "--"
PROGRAM = "dmdr check"


@dataclass
class Checklist:
    """Runs checks one after another, and prints a line for each. exit_code: of the first that failed, or 0."""

    exit_code: int = 0
    passed: set[str] = field(default_factory=set)

    def run(self, name: str, check: Callable[[], str], *, needs: tuple[str, ...] = ()) -> None:
        """Run a check, which returns what it found, unless one that it needs has not passed."""
        lacking = [each for each in needs if each not in self.passed]
        if lacking:
            _print_line(LEFT_OUT, name, None, f"not checked, because it needs: {', '.join(lacking)}")
            return
        if sys.stderr.isatty():
            print(f"\r\x1b[K{name} ...", end="", file=sys.stderr, flush=True)
        began = time.monotonic()
        status = OK
        try:
            words = check()
            self.passed.add(name)
        except Exception as error:
            end = describe_end(error, PROGRAM)
            status, words = FIX, end.line
            self.exit_code = self.exit_code or end.exit_code
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        _print_line(status, name, time.monotonic() - began, words)


def _print_line(status: str, name: str, seconds: float | None, words: str) -> None:
    took = "" if seconds is None else f"{seconds:.1f} s"
    print(f"{status:<4} {name:<10} {took:>8}  {to_line(words)}", flush=True)


def check_config(path: str, *, run: str | None, store: str, changes: tuple[str, ...] = ()) -> int:
    """Check all that a run of a config will meet; returns the exit code of the first check that failed, or 0.

    run: its name; None: the config's. changes: "key=value" texts that change the config.
    """
    with suppress(ValueError):  # of a thread that is not the main one
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(Stopped.exit_code))  # so that temporary files are deleted
    checklist, loaded = Checklist(), list[Config]()

    def load() -> str:
        with change_config(find_config(path), changes) as changed:
            loaded.append(load_config(changed))
        return describe_config(loaded[0], run or loaded[0].run)

    checklist.run("config", load)
    if loaded:
        with tempfile.TemporaryDirectory(prefix="dmdr-check-") as folder:
            check_all(checklist, loaded[0], run or loaded[0].run, store, Path(folder))
    return checklist.exit_code


def check_all(checklist: Checklist, config: Config, run: str, store: str, folder: Path) -> None:
    """Every check after the config's own, in the order of their cost. folder: empty, for what a run in small writes."""
    inputs = Inputs(config)
    checklist.run("store", lambda: try_store(store))
    checklist.run("files", inputs.find_teacher)
    rehearsal = Rehearsal(inputs.config, folder)
    checklist.run("run", lambda: check_name(inputs.config, run, store), needs=("files",))
    checklist.run("prompts", inputs.read_prompts)
    checklist.run("training", lambda: check_requirements(config))
    checklist.run("metrics", inputs.check_metrics, needs=("prompts",))
    checklist.run("memory", lambda: rehearsal.plan(inputs.counts), needs=("files",))
    checklist.run("rewards", lambda: load_all_rewards(config), needs=("training",))

    fits = rehearsal.list_memory_needs()
    checklist.run("teacher", lambda: rehearsal.encode(inputs.kept, inputs.counts), needs=("files", "prompts", *fits))
    checklist.run("disk", lambda: rehearsal.measure_disk(store, inputs.counts), needs=("store", "teacher", "memory"))
    checklist.run("images", rehearsal.draw, needs=("teacher", "metrics"))
    for stage in config.training_stages:
        needs = ("teacher", "rewards", *fits) if config.list_rewards(stage) else ("teacher", *fits)
        checklist.run(stage, partial(rehearsal.train, stage), needs=needs)
    checklist.run("export", rehearsal.export, needs=("joint",))


def describe_config(config: Config, run: str) -> str:
    """What a config asks for, in one line."""
    student = config.student
    updates = ", ".join(f"{each} {config.training_of(each).updates:,} updates" for each in config.training_stages)
    form = "full" if student.lora_rank is None else f"LoRA {student.lora_rank}"
    steps = "1 step" if student.steps == 1 else f"{student.steps} steps"
    return f"run {run}: a student of {steps} ({form}) of {config.teacher.path}; {updates}"


def check_name(config: Config, run: str, store: str) -> str:
    """What would become of each stage of a run of that name. Nothing of it is changed.

    Raises:
        ConfigError: a stage would be refused, because one of the same name was made with other settings.
    """
    on_cluster = config.execution.cluster is not None
    steps = {
        stage: foresee(config, Artifact(store, run, stage), None, on_cluster=on_cluster) for stage in config.stages
    }
    for stage, step in steps.items():
        if step.code:
            raise ConfigError(f"{stage} would be refused: {step.why}")
    told = [f"{stage} would {step.does}" for stage, step in steps.items() if step.does != "run"]
    return ", ".join(told) or f"nothing of a run {run} is there yet"


def check_requirements(config: Config) -> str:
    """What training reads besides teacher and prompts: optimizers, decoders, and weights of rewards."""
    check_training(config)
    return "optimizers, decoders and the weights of rewards are there"


def load_all_rewards(config: Config) -> str:
    """Load each reward of training once, and ask the services of training and evaluation."""
    names, sources = sorted(config.list_training_rewards()), list_sources(config)
    load_rewards(config)
    services = [name for name, reward in config.rewards.items() if reward.url is not None]
    told = [f"{name}: answers, digest {digest[:12]}" for name, digest in ask_services(services, sources).items()]
    loaded = [name for name in names if name not in services]
    return "; ".join([*([f"{', '.join(loaded)}: loaded"] if loaded else []), *told]) or "training has none"


def ask_services(names: list[str], sources: RewardSources) -> dict[str, str]:
    """Name -> digest of each service. One that is away is not waited for.

    Raises:
        RewardUnavailable, ConfigError, DataError: one does not answer as a service does.
    """
    digests = digest_rewards(names, sources, waits=False)
    return {name.removeprefix("reward:"): digest for name, digest in digests.items()}


class Inputs:
    """Teacher and prompts as the config names them.

    config: with its teacher found. kept: the first prompts of each split. counts: of all prompts.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.counts = config, Tally().total()
        self.kept: dict[Split, list[PromptRecord]] = {"train": [], "evaluation": []}
        self._judged = RecordSpool()

    def find_teacher(self) -> str:
        """Find the files of teacher and start, and fetch those of a hub.

        Raises:
            ConfigError, DataError, InputMissing: one is not there or does not fit, or the rewards are of another world.
        """
        self.config = resolve_teacher(self.config, None, lambda size: None)
        source = find_teacher_of(self.config.teacher)
        check_worlds(self.config)
        notes: list[str] = []
        warn_of_teacher(self.config, notes.append, fetches=True)
        check_teacher_settings(self.config, fetches=True)
        check_student_start(self.config, notes.append, fetches=True)
        return "; ".join([f"the teacher is of the family {family_of(source)}", *notes])

    def read_prompts(self) -> str:
        """Read all sources once.

        Raises:
            ConfigError, DataError, InputMissing: as the stage prompts.
        """
        from dmdr.metrics.verifier import TrainingPrompts
        from stages.prompt_sources.selection import select_records
        from stages.prompts import refuse_empty  # brings torch

        tally, notes = Tally(), list[str]()
        judges = needs_records(self.config)
        train = TrainingPrompts(self.config.trained_rewards)
        for split, record in select_records(self.config.prompts, tally, notes.append):
            if len(self.kept[split]) < KEPT[split]:
                self.kept[split].append(record)
            if split == "train":
                train.look(record)
            elif judges:
                self._judged.append(record)
        self.counts = counts = tally.total()
        refuse_empty(counts)
        train.refuse_lacking()
        left_out = {"duplicates": counts.duplicates, "evaluation prompts among them": counts.overlap, "bad": counts.bad}
        told = [f"{count:,} {what}" for what, count in left_out.items() if count]
        words = f"{counts.train:,} to train on, {counts.evaluation:,} to evaluate"
        return "; ".join([words, *([f"left out: {', '.join(told)}"] if told else []), *notes[:1]])

    def check_metrics(self) -> str:
        """Whether the metrics can judge the evaluation prompts, and which have their weights.

        Raises:
            ConfigError, DataError, InputMissing: as `check_evaluation`.
        """
        from dmdr.promptset import spread_evenly  # brings torch

        notes: list[str] = []
        indices = spread_evenly(len(self._judged), self.config.evaluate.limit or len(self._judged))
        check_evaluation(self.config, self._judged.select(indices), notes.append)
        return "; ".join([", ".join(self.config.evaluate.metrics) or "diversity alone", *notes])
