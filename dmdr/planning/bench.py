"""`python -m dmdr.planning.bench`: what an update costs, counted and timed, beside the structures of three others.

Unit F: one forward of the bare base, no gradient, at the training batch. Counted with torch.utils.flop_counter over
the real update code (optimizer steps, decoder and reward excluded), for the lab's teacher and for the shapes of real
ones, on the meta device: shapes are computed there and numbers are not, and torch counts no attention on a CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable

import torch
from torch.utils.flop_counter import FlopCounterMode

from dmdr.backbones.null_tokens import NullTokenAttention
from dmdr.backbones.sd3 import SD3
from dmdr.backbones.sdxl import SDXL
from dmdr.path import VPPath
from dmdr.planning.architectures import ARCHITECTURES, SD3_MEDIUM, SD35_LARGE
from dmdr.planning.architectures import SDXL as SDXL_BASE
from dmdr.planning.shapes import KnownShapes
from dmdr.planning.structures import STRUCTURES, Case, build_updates
from dmdr.teacher.load import find_teacher, load_teacher

DEPTHS = {
    "SDXL": SDXL_BASE["transformer_layers_per_block"][-1],
    "SD3-Medium": SD3_MEDIUM["num_layers"],
    "SD3.5-Large": SD35_LARGE["num_layers"],
}


def build_lab_case(steps: int, k: int, student_rank: int | None, *, device: str) -> Case:
    """The lab's teacher with the fake score of configs/lab-flow.yaml: on meta to be counted, on the CPU to be timed."""
    backbone = load_teacher(find_teacher("lab:flow"))
    item = backbone.encode(["a photo of a red circle left of a blue square"])[0][0]
    context, pooled = tuple(item["context"].shape), item["pooled"].shape[1]
    backbone.network.to(device)
    return Case(backbone, context, pooled, batch=32, steps=steps, k=k, fake_rank=16, student_rank=student_rank)


class _SD3OnMeta(SD3):
    """The transformer without weights, text encoders or VAE: enough to count its work."""

    def __init__(self, name: str, depth: int) -> None:
        self.network = ARCHITECTURES[name].on_meta(num_layers=depth)
        self.network.set_attn_processor(NullTokenAttention())
        self.latent_shape = (16, 128, 128)
        self.context_tokens = 77 + 256


class _SDXLOnMeta(SDXL):
    """The UNet likewise; depth is that of its innermost transformers."""

    def __init__(self, depth: int) -> None:
        blocks = (*SDXL_BASE["transformer_layers_per_block"][:-1], depth)
        self.network = ARCHITECTURES["SDXL"].on_meta(transformer_layers_per_block=blocks)
        self.latent_shape, self.resolution = (4, 128, 128), 1024
        self.path = VPPath(torch.ones(1000))


def build_meta_case(
    name: str, steps: int, k: int, student_rank: int | None, *, depth: int, fake_rank: int | None = 32
) -> Case:
    """A real network at 1,024 x 1,024, `depth` of its equal blocks in a row, with the official demo's fake score."""
    backbone = _SDXLOnMeta(depth) if name == "SDXL" else _SD3OnMeta(name, depth)
    context, pooled = ((77, 2048), 1280) if name == "SDXL" else ((77 + 256, 4096), 2048)
    return Case(backbone, context, pooled, batch=2, steps=steps, k=k, fake_rank=fake_rank, student_rank=student_rank)


def count_flops(work: Callable[[], None]) -> int:
    with KnownShapes(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def count_structures(case: Case, names: Iterable[str] = STRUCTURES) -> dict[str, float]:
    """FLOPs of F and of a student update by each structure, the mean over what it draws."""
    work = {"F": float(count_flops(case.forward))}
    for name in names:
        found = [count_flops(update) for update in build_updates(case, name)]
        work[name] = sum(found) / len(found)
    return work


def extrapolate_depth(make: Callable[[int], Case], depth: int, names: Iterable[str] = STRUCTURES) -> dict[str, float]:
    """`counted` of make(depth), from depths 2 and 3: between the first and the last block, each adds the same work."""
    two, three = (count_structures(make(few), names) for few in (2, 3))
    return {name: two[name] + (depth - 2) * (three[name] - two[name]) for name in two}


def time_structures(case: Case, repeats: int = 3) -> dict[str, float]:
    """Best of `repeats` after one to warm up, the mean over what is drawn; in turns, so that a busy moment hits all."""
    runs = {name: build_updates(case, name) for name in STRUCTURES}
    best = {name: [float("inf")] * len(found) for name, found in runs.items()}
    for repeat in range(repeats + 1):
        for name, found in runs.items():
            for index, update in enumerate(found):
                started = time.perf_counter()
                update()
                if repeat > 0:
                    best[name][index] = min(best[name][index], time.perf_counter() - started)
    return {name: sum(found) / len(found) for name, found in best.items()}


def describe_form(rank: int | None) -> str:
    return "full" if rank is None else f"lora {rank}"


def format_row(label: str, figures: dict[str, float]) -> str:
    """Each structure's figure, and as a multiple of ours where ours was measured."""
    cells = []
    for name in STRUCTURES:
        cell = f"{figures[name]:.2f}" if name in figures else "-"
        if name in figures and name != "ours" and "ours" in figures:
            cell += f" ({figures[name] / figures['ours']:.2f}x)"
        cells.append(f"{cell:>16}")
    return f"{label:<34}" + "".join(cells)


def in_forwards(work: dict[str, float]) -> dict[str, float]:
    return {name: value / work["F"] for name, value in work.items() if name != "F"}


def print_networks() -> None:
    print(f"{'network':<14}{'parameters':>16}{'TFLOP a forward, 1,024 px':>28}")
    for name, each in ARCHITECTURES.items():
        print(f"{name:<14}{each.parameters():>16,}{each.flops() / 1e12:>28.2f}", flush=True)


def print_structures(k: int) -> None:
    print(f"\nforward-equivalents per student update, K={k}, CFG on (F = one forward at the training batch)")
    for name, structure in STRUCTURES.items():
        print(f"  {name:<10}{structure.__doc__.splitlines()[0]}")
    heading = f"{'network':<13}{'student':<9}{'fake':<9}{'N':<3}"
    print(heading + "".join(f"{name:>16}" for name in STRUCTURES))

    def label(name: str, student: int | None, fake: int | None, steps: int) -> str:
        return f"{name:<13}{describe_form(student):<9}{describe_form(fake):<9}{steps:<3}"

    for rank, steps in ((None, 1), (None, 2), (None, 4), (None, 8), (64, 4)):
        figures = in_forwards(count_structures(build_lab_case(steps, k, rank, device="meta")))
        print(format_row(label("lab", rank, 16, steps), figures), flush=True)

    def real(name: str, student: int | None, fake: int | None, names: Iterable[str]) -> None:
        work = extrapolate_depth(
            lambda depth: build_meta_case(name, 4, k, student, depth=depth, fake_rank=fake), DEPTHS[name], names
        )
        print(format_row(label(name, student, fake, 4), in_forwards(work)), flush=True)

    for name in ("SD3-Medium", "SD3.5-Large"):
        for rank in (None, 64):
            real(name, rank, 32, STRUCTURES)
        real(name, None, None, ("dmd2", "fastvideo"))  # the fake score as they train it
    for rank in (None, 64):
        real("SDXL", rank, 32, ("ours",))  # a UNet is slow to count


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dmdr.planning.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, default=5, help="fake-score updates per student update")
    parser.add_argument("--no-time", action="store_true", help="count only")
    arguments = parser.parse_args()
    print_networks()
    print_structures(arguments.k)
    if not arguments.no_time:
        print(f"\nseconds per student update, lab, full student, N=4, {torch.get_num_threads()} threads, best of 3")
        print(format_row("", time_structures(build_lab_case(4, arguments.k, None, device="cpu"))))


if __name__ == "__main__":
    main()
