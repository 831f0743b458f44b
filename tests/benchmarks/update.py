"""`python -m tests.benchmarks.update`: seconds of a whole training step of the lab on this machine's CPU.

The step is that of configs/lab-flow.yaml's joint stage: rollout, K - 1 updates of the fake score, one of the student,
optimizers and moving average, by one process of one thread and by two that share the batch. With `--beside FOLDER` a
checkout of another version takes turns with this one, so that a busy moment of the machine slows both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
CONFIG = "configs/lab-flow.yaml"
COMMAND = [sys.executable, "-P", str(Path(__file__)), "--worker"]


@dataclass(frozen=True)
class Timed:
    """Seconds of each update of a worker, on the clock and of its CPU; a group's are those of its slowest rank."""

    clock: list[float]
    cpu: list[float]


def time_updates(updates: int, ranks: int, rank: int, meeting: Path) -> tuple[list[float], list[float]]:
    """Seconds on the clock and of this process's CPU of each update; one before them warms up."""
    import torch
    import torch.distributed as dist

    from dmdr.assembly.networks import assemble
    from dmdr.assembly.run import build_run
    from dmdr.assembly.stage_config import select_stage
    from dmdr.config.load import load_config
    from dmdr.teacher.load import find_teacher, load_teacher
    from dmdr.train import training_step

    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    config = load_config(ROOT / CONFIG)
    backbone = load_teacher(find_teacher(config.teacher.path))
    stage = select_stage(config, "joint")
    assembly = assemble(config, stage, backbone)
    texts = ["a photo of a red circle left of a blue square", "two green crosses", "a yellow triangle"]

    class Prompts:
        """A few prompts in memory."""

        encoded, _ = backbone.encode(texts)

        def __len__(self) -> int:
            return len(texts)

        def items(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
            return [self.encoded[index] for index in indices]

        def records(self, indices: Sequence[int]) -> list[dict[str, str]]:
            return [{"prompt": texts[index]} for index in indices]

    empty = backbone.encode([""])[0][0]
    run = build_run(config, stage, assembly, prompts=Prompts(), empty_prompt=empty)  # type: ignore[arg-type]
    clock, cpu = [], []
    for _ in range(updates + 1):
        began, used = time.perf_counter(), time.process_time()
        assembly.state.advance(training_step(run, assembly.state))
        clock.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    return clock[1:], cpu[1:]


def run_worker(updates: int, ranks: int) -> None:
    """Time updates in `ranks` forks of this process, and print a line of seconds for each rank."""
    import dmdr.train  # noqa: F401  # once, before the forks

    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:

        def report(rank: int) -> None:
            clock, cpu = time_updates(updates, ranks, rank, Path(folder) / "group")
            line = f"{' '.join(f'{each:.4f}' for each in clock)} | {' '.join(f'{each:.4f}' for each in cpu)}\n"
            os.write(1, line.encode())

        forks = [context.Process(target=report, args=(rank,)) for rank in range(ranks)]
        for fork in forks:
            fork.start()
        for fork in forks:
            fork.join()
        if any(fork.exitcode for fork in forks):
            raise SystemExit("a process failed; its error is above")


def time_version(folder: Path, updates: int, ranks: int) -> Timed:
    """Run a worker with the packages of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*COMMAND, "--updates", str(updates), "--processes", str(ranks)]
    said = subprocess.run(command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout
    rows = [[[float(each) for each in half.split()] for half in line.split("|")] for line in said.splitlines()]
    return Timed(*([max(each) for each in zip(*(row[half] for row in rows), strict=True)] for half in (0, 1)))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.update", description="Time a training step of the lab on this CPU."
    )
    parser.add_argument("--beside", type=Path, help="the checkout of another version, which takes turns with this one")
    parser.add_argument("--updates", type=int, default=4, help="timed updates of a round")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each version")
    parser.add_argument("--processes", type=int, help="1 or 2 processes alone; by default both")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        run_worker(arguments.updates, arguments.processes)
        return
    versions = {"this": ROOT} | ({"beside": arguments.beside.resolve()} if arguments.beside else {})
    print(f"seconds of a training step, {CONFIG}, joint stage, one thread a process: median, fastest; CPU median")
    for ranks in (1, 2) if arguments.processes is None else (arguments.processes,):
        found: dict[str, list[Timed]] = {name: [] for name in versions}
        for _ in range(arguments.rounds):
            for name, folder in versions.items():
                found[name].append(time_version(folder, arguments.updates, ranks))
        for name, timed in found.items():
            clock, cpu = [s for each in timed for s in each.clock], [s for each in timed for s in each.cpu]
            print(f"{ranks} processes  {name:<8}{median(clock):8.3f}{min(clock):8.3f}{median(cpu):8.3f}", flush=True)


if __name__ == "__main__":
    main()
