"""What an update costs: ours at its floor, the others as their parts add up and as was counted of their code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dmdr.planning import bench, structures
from dmdr.planning.structures import Case

pytestmark = pytest.mark.slow

FULL, LORA = None, 64


def parts(case: Case) -> dict[str, float]:
    """In F: one forward of each role at the batch, real with CFG, and a forward and backward of what is trained."""
    base, c, empty = case.base, case.build_conditioning(case.batch), case.build_conditioning(1)

    def call(role: Callable, backward: bool = False) -> None:
        with torch.set_grad_enabled(backward):
            out = role(case.draw_latents(case.batch), case.draw_levels().t, c)
        if backward:
            out.sum().backward()

    def real(scale: float) -> Callable:
        return lambda x_t, t, c: base.real_x0(x_t, t, c, empty, guidance_scale=7.0, lora_scale=scale)

    work = {
        "student": partial(call, base.student),
        "student trained": partial(call, base.student, backward=True),
        "fake": partial(call, base.fake),
        "fake trained": partial(call, base.fake, backward=True),
        "bare real": partial(call, real(0.0)),
        "real": partial(call, real(0.5)),
    }
    forward = bench.count_flops(case.run_forward)
    return {name: bench.count_flops(each) / forward for name, each in work.items()}


def test_bench_counts_as_torch_does():
    case = bench.build_meta_case("SD3-Medium", 2, 2, LORA, depth=2)
    with FlopCounterMode(display=False) as counter:
        structures.run_ours(case)
    assert bench.count_flops(partial(structures.run_ours, case)) == counter.get_total_flops() > 0


@pytest.mark.parametrize(
    ("steps", "k", "student_rank", "fake_rank"),
    [(4, 2, FULL, FULL), (4, 2, LORA, 32), (1, 3, FULL, 32), (1, 3, LORA, FULL)],  # each meets each of another kind
)
def test_the_structures_cost_what_their_parts_add_up_to(steps, k, student_rank, fake_rank):
    case = bench.build_meta_case("SD3-Medium", steps, k, student_rank, depth=2, fake_rank=fake_rank)
    p = parts(case)
    scores = p["fake"] + p["bare real"]
    by_hand = {
        "official": k * (steps * p["student"] + p["fake trained"]) + p["student trained"] + p["fake"] + p["real"],
        "dmd2": k * ((steps - 1) / 2 * p["student"] + p["fake trained"])
        + (k - 1) * p["student"]
        + p["student trained"]
        + scores,
        "fastvideo": k * (steps * p["student"] + p["fake trained"])
        + (steps - 1) * p["student"]
        + p["student trained"]
        + scores,
    }
    assert p["fake"] > 0.99 and p["bare real"] == pytest.approx(2, rel=1e-3), "F is not the bare base's"
    assert bench.to_forwards(bench.count_structures(case, by_hand)) == pytest.approx(by_hand, rel=0.01)


@pytest.mark.parametrize(
    ("name", "fake_rank", "theirs"),
    [("official", 32, 37.9), ("dmd2", FULL, 32.5), ("fastvideo", FULL, 44.0)],
)
def test_the_structures_cost_what_was_counted_of_their_code(name, fake_rank, theirs):
    """SD3-Medium, a full student, N = 4, K = 5, CFG; DMD2 without its GAN. Counted by us when their code was read, in
    the form in which each trains its fake score; with a LoRA of ours in its place the last two cost 29 and 41 F."""
    work = bench.extrapolate_depth(
        lambda depth: bench.build_meta_case("SD3-Medium", 4, 5, FULL, depth=depth, fake_rank=fake_rank), 24, [name]
    )
    assert bench.to_forwards(work)[name] == pytest.approx(theirs, rel=0.03)


@pytest.mark.parametrize(("student_rank", "floor"), [(FULL, 21.5), (LORA, 20.5)], ids=["full", "lora"])
def test_an_update_of_ours_costs_the_floor(student_rank, floor):
    """SD3-Medium at its whole depth, N = 4, K = 5, CFG."""
    work = bench.extrapolate_depth(
        lambda depth: bench.build_meta_case("SD3-Medium", 4, 5, student_rank, depth=depth), 24, ["ours", "official"]
    )
    found = bench.to_forwards(work)
    assert found["ours"] <= floor and found["ours"] < 0.6 * found["official"]


@pytest.mark.parametrize(
    ("network", "student_rank", "names"),
    [("SD3-Medium", FULL, ["ours"]), ("SD3-Medium", LORA, ["ours"]), ("SDXL", LORA, [])],  # a UNet is slow to count
)
def test_two_depths_tell_any_other(network, student_rank, names):
    """Of a whole update, and of one forward of a UNet."""

    def make(depth: int) -> Case:
        return bench.build_meta_case(network, 1, 1, student_rank, depth=depth)

    assert bench.extrapolate_depth(make, 4, names) == bench.count_structures(make(4), names)


@pytest.mark.parametrize("name", structures.STRUCTURES)
@pytest.mark.parametrize("student_rank", [FULL, LORA], ids=["full", "lora"])
def test_every_structure_trains_student_and_fake_score(name, student_rank):
    """What is counted is work that arrives: gradients at both, none at the base."""
    case = bench.build_lab_case(3, 2, student_rank, device="cpu")
    case.batch = 2
    with torch.no_grad():  # at its start a LoRA is the teacher, and there is nothing to match
        for parameter in case.base.fake_parameters.values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    for update in structures.build_updates(case, name):
        for optimizer in (case.student_optimizer, case.fake_optimizer):
            optimizer.zero_grad()
        update()
        for trained in (case.base.student_parameters, case.base.fake_parameters):
            assert max(float(p.grad.abs().max()) for p in trained.values() if p.grad is not None) > 1e-5
        bare = [p for key, p in case.base.backbone.network.named_parameters() if ".lora_" not in key]
        assert bare and all(p.grad is None for p in bare)


def test_dmd2_leaves_at_its_step_and_fastvideo_runs_on():
    """The random exit as forwards: left F a rollout, where FastVideo's is N - 1 F whichever step it draws."""
    case = bench.build_meta_case("SD3-Medium", 4, 1, FULL, depth=2)
    forward = bench.count_flops(case.run_forward)
    costs = [bench.count_flops(update) / forward for update in structures.build_updates(case, "dmd2")]
    assert [b - a for a, b in zip(costs, costs[1:], strict=False)] == pytest.approx([1.0] * 3, rel=1e-3)
    assert len({bench.count_flops(partial(structures.run_fastvideo, case)) for _ in range(4)}) == 1
