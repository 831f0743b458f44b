"""`python -m dmdr.planning.bench`: counts and times one update of ours and of three other code bases.

The unit F is one forward of the bare base on the training batch, without gradients. The formulas of
torch.utils.flop_counter count the real update code, without optimizer steps, decoder and reward. The lab's teacher and
the published networks are counted on the meta device, which computes shapes but no numbers; on a CPU, torch would not
count attention.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from dmdr.config.batches import count_rl, count_student_forwards
from dmdr.config.rl import DPO, GRPO, AnyRL, EvolutionStrategies, ReFL
from dmdr.planning.architectures import ARCHITECTURES, SD3_MEDIUM_LAYERS, SD35_LARGE_LAYERS, SDXL_LAYERS
from dmdr.planning.cost import CostCounter
from dmdr.planning.shapes import KnownShapes
from dmdr.planning.structures import GUIDANCE, STRUCTURES, Case, build_updates
from dmdr.teacher.load import build_backbone, find_teacher, load_teacher

DEPTHS = {"SDXL": SDXL_LAYERS[-1], "SD3-Medium": SD3_MEDIUM_LAYERS, "SD3.5-Large": SD35_LARGE_LAYERS}


def build_lab_case(steps: int, k: int, student_rank: int | None, *, device: str) -> Case:
    """The lab's teacher with the fake score of configs/lab-flow.yaml, on meta for counting or on the CPU for timing."""
    backbone = load_teacher(find_teacher("lab:flow"))
    prompt = backbone.encode(["a photo of a red circle left of a blue square"])[0][0]
    network: torch.nn.Module = backbone.network
    network.to(device)
    return Case(backbone, prompt, batch=32, steps=steps, k=k, fake_rank=16, student_rank=student_rank)


def build_meta_case(
    name: str, steps: int, k: int, student_rank: int | None, *, depth: int, fake_rank: int | None = 32
) -> Case:
    """A published network at 1,024 x 1,024 pixels with the official demo's fake score.

    depth: number of transformer layers; for SDXL, of those in a block of the innermost level.
    """
    layers = {"transformer_layers_per_block": (*SDXL_LAYERS[:-1], depth)} if name == "SDXL" else {"num_layers": depth}
    backbone = build_backbone(ARCHITECTURES[name].build_pipeline(**layers), resolution=1024)
    return Case(backbone, backbone.blank(), batch=2, steps=steps, k=k, fake_rank=fake_rank, student_rank=student_rank)


def count_flops(work: Callable[[], object]) -> int:
    cost = CostCounter("meta")
    with KnownShapes(cost):
        work()
    return cost.flops


def count_structures(case: Case, names: Iterable[str] = STRUCTURES) -> dict[str, float]:
    """FLOPs of F and of one student update by each structure, on average over its forms."""
    work = {"F": float(count_flops(case.run_forward))}
    for name in names:
        work[name] = compute_mean([count_flops(update) for update in build_updates(case, name)])
    return work


def extrapolate_depth(
    build_case: Callable[[int], Case], depth: int, names: Iterable[str] = STRUCTURES
) -> dict[str, float]:
    """`count_structures(build_case(depth))`, computed from depths 2 and 3.

    The layers between the first and the last all add the same work.
    """
    two, three = (count_structures(build_case(few), names) for few in (2, 3))
    return {name: two[name] + (depth - 2) * (three[name] - two[name]) for name in two}


def time_structures(case: Case, repeats: int = 3) -> dict[str, float]:
    """Seconds of one student update by each structure, on average over its forms: the best of `repeats` runs.

    One run before them warms up. The structures take turns, so that a busy moment of the machine slows all of them.
    """
    forms = {name: build_updates(case, name) for name in STRUCTURES}
    best = {name: [float("inf")] * len(updates) for name, updates in forms.items()}
    for repeat in range(repeats + 1):
        for name, updates in forms.items():
            for index, update in enumerate(updates):
                started = time.perf_counter()
                update()
                if repeat > 0:
                    best[name][index] = min(best[name][index], time.perf_counter() - started)
    return {name: compute_mean(seconds) for name, seconds in best.items()}


def compute_mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def to_forwards(work: dict[str, float]) -> dict[str, float]:
    """FLOPs of structures as multiples of F."""
    return {name: flops / work["F"] for name, flops in work.items() if name != "F"}


def describe_form(rank: int | None) -> str:
    return "full" if rank is None else f"lora {rank}"


def format_row(label: str, figures: dict[str, float]) -> str:
    """A row of a table: the figure of each structure, and that figure as a multiple of ours if both are there."""
    cells = []
    for name in STRUCTURES:
        cell = f"{figures[name]:.2f}" if name in figures else "-"
        if name in figures and name != "ours" and "ours" in figures:
            cell += f" ({figures[name] / figures['ours']:.2f}x)"
        cells.append(f"{cell:>16}")
    return f"{label:<34}" + "".join(cells)


def print_networks() -> None:
    print(f"{'network':<14}{'parameters':>16}{'TFLOP a forward, 1,024 px':>28}")
    for name, architecture in ARCHITECTURES.items():
        tflop = architecture.count_flops() / 1e12
        print(f"{name:<14}{architecture.count_parameters():>16,}{tflop:>28.2f}", flush=True)


def print_structures(k: int) -> None:
    print(f"\nforward-equivalents per student update, K={k}, CFG on (F = one forward at the training batch)")
    for name, structure in STRUCTURES.items():
        print(f"  {name:<10}{(structure.__doc__ or '').partition(chr(10))[0]}")
    print(f"{'network':<13}{'student':<9}{'fake':<9}{'N':<3}" + "".join(f"{name:>16}" for name in STRUCTURES))
    for student_rank, steps in ((None, 1), (None, 2), (None, 4), (None, 8), (64, 4)):
        work = count_structures(build_lab_case(steps, k, student_rank, device="meta"))
        print(format_row(format_label("lab", student_rank, 16, steps), to_forwards(work)), flush=True)
    for name in ("SD3-Medium", "SD3.5-Large"):
        for student_rank in (None, 64):
            print_published(name, k, student_rank, 32, STRUCTURES)
        print_published(name, k, None, None, ("dmd2", "fastvideo"))  # the fake score in the form in which they train it
    for student_rank in (None, 64):
        print_published("SDXL", k, student_rank, 32, ("ours",))  # ours alone: a UNet is slow to count


def print_rl(steps: int = 4, batch: int = 32) -> None:
    """Print what each RL algorithm adds to an update: samples of no gradient, and states that are trained on."""
    print(f"\nforward-equivalents that RL adds, N={steps}, batch {batch}, without reward and decoder")
    print(f"{'algorithm':<34}{'sampled':>16}{'trained':>16}")
    published = {"branches": 0, "batch": batch, "group_size": 8}
    rows: list[tuple[str, type[AnyRL], dict[str, int]]] = [
        ("refl", ReFL, {}),
        ("grpo, branches 8 of 24 states", GRPO, {}),
        (f"grpo, {batch} whole images", GRPO, published),
        ("dpo, branches 8 of 24 states", DPO, {}),
        (f"dpo, {batch} whole images", DPO, published),
        ("es, 8 pairs of 32 states", EvolutionStrategies, {}),
    ]
    for label, kind, settings in rows:
        named = {"algorithm": label.partition(",")[0], "weight": 1.0, "rewards": {"lab-conv": 1.0}}
        config = kind.model_validate({**named, **settings})
        sampled, forwards = count_student_forwards(config, steps), 4 if isinstance(config, DPO) else 3  # the reference
        print(f"{label:<34}{sampled / batch:>16.2f}{forwards * count_rl(config, steps).states / batch:>16.2f}")


def count_decoupled(case: Case) -> float:
    """What `decoupled` adds to an update, in F: the scores of its CFG part at a sample of its own."""
    base, c, empty = case.base, case.build_conditioning(case.batch), case.build_conditioning(1)
    at = case.draw_latents(case.batch), case.draw_levels().t
    apart = count_flops(lambda: base.decoupled_real_x0(at, at, c, empty, guidance_scale=GUIDANCE, lora_scale=0.5))
    together = count_flops(lambda: base.real_x0(*at, c, empty, guidance_scale=GUIDANCE, lora_scale=0.5))
    return (apart - together) / count_flops(case.run_forward)


def print_decoupled() -> None:
    added = count_decoupled(build_lab_case(4, 5, None, device="meta"))
    print(f"\nforward-equivalents that decoupled renoise levels add to ours: {added:.2f}")


def print_published(name: str, k: int, student_rank: int | None, fake_rank: int | None, names: Iterable[str]) -> None:
    """Print the row of a published network at its full depth, for 4 steps."""

    def build_case(depth: int) -> Case:
        return build_meta_case(name, 4, k, student_rank, depth=depth, fake_rank=fake_rank)

    work = extrapolate_depth(build_case, DEPTHS[name], names)
    print(format_row(format_label(name, student_rank, fake_rank, 4), to_forwards(work)), flush=True)


def format_label(network: str, student_rank: int | None, fake_rank: int | None, steps: int) -> str:
    return f"{network:<13}{describe_form(student_rank):<9}{describe_form(fake_rank):<9}{steps:<3}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dmdr.planning.bench",
        description="Count and time one update of ours and of three other code bases.",
    )
    parser.add_argument("--k", type=int, default=5, help="fake-score updates per student update")
    parser.add_argument("--no-time", action="store_true", help="only count")
    arguments = parser.parse_args()
    print_networks()
    print_structures(arguments.k)
    print_decoupled()
    print_rl()
    if not arguments.no_time:
        print(f"\nseconds per student update, lab, full student, N=4, {torch.get_num_threads()} threads, best of 3")
        print(format_row("", time_structures(build_lab_case(4, arguments.k, None, device="cpu"))))


if __name__ == "__main__":
    main()
