"""python -m tests.support.ranked_updates TEACHER OUT: one update of each case by 1, 2 and 4 ranks, in float64.

Each number of ranks is a group of forked processes over gloo. The first rank writes OUT/RANKS.json: for each case the
figures of the update, and the sum and some numbers of each gradient, which are enough to tell two updates apart.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from dmdr.config.few_steps import FewSteps
from dmdr.config.load import ALGORITHMS
from dmdr.config.training import Joint, Optimizer
from dmdr.draws import Run, roll_out_prompts
from dmdr.noise import RowNoise
from dmdr.rl.algorithms import build_algorithm
from dmdr.rl.objective import RLTerm
from dmdr.rl.surrogate import Surrogate
from dmdr.shared_base import SharedBase
from dmdr.state import TrainState
from dmdr.train import training_step
from dmdr.watch.halves import compare_halves
from tests.support.few_prompts import FewPrompts
from tests.support.tiny_teachers import copy_teacher

PROMPTS = ["a red circle", "two blue squares", "a green cross", "a yellow triangle above a red circle", "a dot", "two"]
GRPO, DPO = {"algorithm": "grpo"}, {"algorithm": "dpo"}
BRANCHES, WHOLE = {"branches": 3, "states": 12}, {"branches": 0, "batch": 8, "group_size": 2}
# name -> settings of RL, batch size, fake updates, micro batch
CASES: dict[str, tuple[dict | None, int, int, int | None]] = {
    "in parts": (None, 8, 5, 1),
    "uneven": (None, 5, 4, 2),
    "one update": (None, 6, 1, None),
    "refl, matched": ({"algorithm": "refl", "weight_is": "matched", "matching": 2}, 4, 5, None),
    "grpo, branches": ({**GRPO, **BRANCHES, "inner_updates": 3}, 4, 5, None),
    "grpo, uneven hybrid": ({**GRPO, **BRANCHES, "states": 16, "hybrid": True}, 5, 4, None),
    "grpo, whole": ({**GRPO, **WHOLE, "inner_updates": 2}, 4, 5, None),
    "dpo, branches": ({**DPO, **BRANCHES}, 4, 5, 3),
    "dpo, whole": ({**DPO, **WHOLE}, 4, 5, None),
    "grpo, shuffled": ({**GRPO, **BRANCHES, "shuffled": True}, 4, 5, None),
    "surrogate": ({"algorithm": "surrogate", "samples": 8, "steps": 2, "width": 8}, 4, 5, None),
    "es, uneven": ({"algorithm": "es", "states": 7, "pairs": 2, "grid": 3, "normalise": True}, 4, 5, None),
    "weighting, in parts": ({"algorithm": "weighting"}, 8, 5, 2),
    "weighting, uneven": ({"algorithm": "weighting", "part": "guidance", "shuffled": True}, 5, 4, None),
}

COMPARED = ("grpo, branches", "dpo, whole")  # cases whose batch of RL is compared by halves as well


class Still(torch.optim.Optimizer):
    """Takes no step, so that the gradients of an update stay to be read."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {})

    def step(self, closure=None) -> None:
        pass


def make_run(folder: Path, case: str, *, device: str = "cpu") -> tuple[Run, TrainState]:
    """A run of that case on a tiny teacher, and its state."""
    settings, batch_size, fake_updates, micro_batch = CASES[case]
    backbone = copy_teacher(folder)
    prompts, empty = FewPrompts(backbone, PROMPTS), backbone.encode([""])[0]
    backbone.network.to(device)
    backbone.vae.to(device)
    base = SharedBase(backbone, fake_rank=2, fake_scale=2.0, student_rank=2, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # at B = 0 a LoRA has half of its gradient
        for parameter in [*base.fake_parameters.values(), *base.student_parameters.values()]:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    base.keep_reference()
    rl = None
    if settings is not None:
        config = ALGORITHMS[settings["algorithm"]].model_validate(
            {"weight": 0.5, "rewards": {"lab-conv": 1.0}, **settings}
        )
        rl = RLTerm(build_algorithm(config, base, seed=0), config)
        for reward in rl.algorithm.reward.rewards.values():
            reward.double()
            reward.scale, reward.bias = 4.0, 0.0
        if isinstance(rl.algorithm, Surrogate):
            rl.algorithm.network.double()
            rl.algorithm.average.double()
    for network in (backbone.network, base.student_network, backbone.pipe.vae):
        network.double()
    optimizer = Optimizer(learning_rate=1e-2, clip=1e9)
    training = Joint(
        updates=4,
        batch_size=batch_size,
        fake_updates=fake_updates,
        student=optimizer,
        fake_score=optimizer,
        rl=None if rl is None else rl.config,
    )
    run = Run(
        stage="joint",
        seed=0,
        training=training,
        base=base,
        prompts=prompts,
        unconditional=backbone.collate(empty),
        times=backbone.student_times(FewSteps(4)).double().to(device),
        guidance_scale=2.0,
        rl=rl,
        micro_batch=micro_batch,
        noise=RowNoise(device),
    )
    state = TrainState(base, training, ema=0.5, beside=rl.algorithm.trained if rl else {})
    for role in ("student", "fake_score"):
        own = getattr(state, role)
        setattr(state, role, replace(own, optimizer=Still(own.parameters.values())))
    return run, state


def update(folder: Path, case: str) -> dict[str, list[float]]:
    """Figures and gradients of one update."""
    run, state = make_run(folder, case)
    figures = training_step(run, state)
    found = {name: [value] for name, value in figures.items()}
    if case in COMPARED:
        window = roll_out_prompts(run, 1)[1]
        objective = run.rl.algorithm.build_objective(window)
        halves = compare_halves(run.base, window, objective, group=run.batch_rl.group)
        found |= {name: [float(value)] for name, value in halves.items()}
    parameters = {**state.student.parameters, **state.fake_score.parameters}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            found[name] = [float(parameter.grad.sum()), *parameter.grad.flatten()[:8].tolist()]
    return found


def run_rank(rank: int, ranks: int, folder: Path, out: Path) -> None:
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{out / f'{ranks}.group'}", rank=rank, world_size=ranks)
    results = {case: update(folder, case) for case in CASES}
    if rank == 0:
        (out / f"{ranks}.json").write_text(json.dumps(results))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    torch.set_num_threads(1)
    folder, out = (Path(argument) for argument in sys.argv[1:])
    context = multiprocessing.get_context("fork")
    for ranks in (1, 2, 4):
        group = [context.Process(target=run_rank, args=(rank, ranks, folder, out)) for rank in range(ranks)]
        for process in group:
            process.start()
        for process in group:
            process.join()
        if any(process.exitcode for process in group):
            os._exit(1)


if __name__ == "__main__":
    main()
