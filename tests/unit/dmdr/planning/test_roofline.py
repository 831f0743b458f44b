"""The time of operators by hand, the kinds into which they are counted, and what more machines add to an update."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dmdr.planning.cost import CostCounter
from dmdr.planning.gpus import GPUS
from dmdr.planning.roofline import (
    LAUNCH,
    LAUNCHES,
    PREPARE,
    compute_mfu,
    estimate_stage,
    estimate_update,
    time_operator,
)
from dmdr.planning.scaling import DRAW, READ, list_machines, scale_update
from dmdr.planning.stage_plan import StagePlan
from dmdr.planning.work import Tally, Work

H100 = GPUS["h100-80"]
PRODUCT = Work("product", "bfloat16", 620 * 10**12, 8)


def make_plan(**changes: object) -> StagePlan:
    """A stage on 8 GPUs, each of which multiplies for a second in 10 operators."""
    plan = StagePlan("cold_start", updates=100, ranks=8, forward=1.0)
    plan.set_work("rollout", Tally())
    plan.set_work("student", Tally({Work("product", "bfloat16", 62 * 10**12, 8): 80.0}, 8 * 620e12, 0.0))
    return replace(plan, **changes)


def count(work) -> dict[Work, int]:
    with CostCounter("meta") as cost:
        work()
    return dict(cost.operators)


def test_operators_are_counted_by_kind_flops_and_bytes() -> None:
    a, b = (
        torch.empty(4, 8, device="meta", dtype=torch.bfloat16),
        torch.empty(8, 16, device="meta", dtype=torch.bfloat16),
    )
    image, kernel = torch.empty(1, 3, 8, 8, device="meta"), torch.empty(5, 3, 3, 3, device="meta")
    heads = torch.empty(2, 3, 16, 8, device="meta")
    attend = torch.ops.aten._scaled_dot_product_efficient_attention

    def run() -> None:
        a @ b
        F.conv2d(image, kernel, padding=1)
        image + 1
        image.view(-1)[3:]
        torch.empty_like(image)
        attend(heads, heads, heads, None, False)

    found = count(run)
    kinds = {work.kind: work for work in found}
    assert len(found) == 4, "views and empty tensors are no work"
    assert kinds["product"] == Work("product", "bfloat16", 2 * 4 * 8 * 16, 2 * (4 * 8 + 8 * 16 + 4 * 16))
    assert kinds["convolution"].flops == 2 * 64 * 5 * 27
    assert kinds["elementwise"] == Work("elementwise", "float32", 0, 4 * 2 * 192)
    assert kinds["attention"].flops == 2 * 2 * 2 * 3 * 16 * 16 * 8


def test_an_expanded_tensor_is_read_once() -> None:
    row = torch.empty(1, 8, device="meta").expand(100, 8)
    (work,) = count(lambda: row + row)
    assert work.bytes == 4 * (8 + 8 + 800)


def test_backward_attention_is_a_kind_of_its_own() -> None:
    heads = torch.empty(1, 2, 16, 8, device="meta", requires_grad=True)
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    kinds = {
        work.kind: work.flops for work in count(lambda: attend(heads, heads, heads, None, True)[0].sum().backward())
    }
    assert kinds["attention backward"] == pytest.approx(2.5 * kinds["attention"])


def test_an_operator_takes_the_longer_of_arithmetic_and_traffic() -> None:
    assert time_operator(PRODUCT, H100) == pytest.approx(1.0, rel=0.01)
    wide = PRODUCT._replace(flops=1, bytes=26 * 10**11)
    assert time_operator(wide, H100) == pytest.approx(1.0, rel=0.01)
    assert time_operator(Work("attention", "bfloat16", 320 * 10**12, 8), H100) == pytest.approx(1.0, rel=0.02)
    assert time_operator(Work("convolution", "float32", 170 * 10**12, 8), H100) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("name", GPUS)
def test_float32_is_never_faster_than_bfloat16(name: str) -> None:
    for kind in ("product", "attention", "convolution"):
        half, full = (time_operator(Work(kind, dtype, 10**15, 8), GPUS[name]) for dtype in ("bfloat16", "float32"))
        assert half < full


def test_an_update_takes_what_its_operators_take_or_the_cpu_that_begins_them() -> None:
    time = estimate_update(make_plan(), H100)
    assert time.seconds == pytest.approx(1.0 + 10 * LAUNCH, rel=0.01) and not time.waits_for_host
    assert time.kinds[LAUNCHES] == pytest.approx(10 * LAUNCH)
    many = make_plan(tallies={"student": Tally({Work("elementwise", "float32", 0, 4): 8e6}, 1.0)})
    slow = estimate_update(many, H100)
    assert slow.waits_for_host and slow.seconds == pytest.approx(1e6 * PREPARE)
    assert estimate_stage(make_plan(), H100) == pytest.approx(100 * time.seconds)


def test_mfu_is_what_is_needed_and_leaves_out_what_is_computed_again() -> None:
    plan = make_plan()
    tally = replace(plan.tallies["student"], again=plan.flops / 4)
    plan = replace(plan, tallies={"student": tally})
    needed, executed = compute_mfu(plan, 1.0, H100, "bfloat16")
    assert executed == pytest.approx(620 / 989) and needed == pytest.approx(0.75 * executed)


def test_tallies_add_up_and_take_apart() -> None:
    one, other = Tally({PRODUCT: 2.0}, 5.0, 1.0), Tally({PRODUCT: 1.0, Work("elementwise", "float32", 0, 1): 3.0}, 2.0)
    assert (one + other) - other == one
    assert (one + one) == one.scale(2) and (one - one).launches == 0


def test_more_machines_take_longer_and_lose_efficiency() -> None:
    """By messages alone: each rank draws, reads and keeps for its own samples, and does so ahead."""
    plan = make_plan(noise=10**7, read=10**8, reduced=10**8, parts={"teacher": 10**10})
    scaled = [scale_update(plan, H100, nodes=n, processes=8, sharding="none") for n in list_machines(32)]
    assert [each.ranks for each in scaled] == [8, 16, 32, 64, 128, 256]
    assert [each.seconds for each in scaled] == sorted(each.seconds for each in scaled)
    assert {each.host for each in scaled} == {0.0} and {each.memory for each in scaled} == {plan.peak}
    slow = scale_update(replace(plan, noise=10**10), H100, nodes=32, processes=8, sharding="none")
    assert slow.host == pytest.approx(10**10 * DRAW + 10**8 / READ - slow.compute) and slow.host > 0
    assert scaled[1].gradients / scaled[0].gradients == pytest.approx((15 / 16) / (7 / 8) * H100.link / H100.network)
    assert list_machines(6) == [1, 2, 4, 6] and list_machines(1) == [1]


def test_weights_that_are_gathered_wait_only_for_what_networks_do_not_hide() -> None:
    """Full SD3.5-Large in parts of one: 136 gathers of 16 GB an update take 6 s within a machine, which hides them, and
    44 s over machines."""
    plan = make_plan(gathered=136 * 16 * 10**9)
    within, across = (scale_update(plan, H100, nodes=n, processes=8, sharding="fsdp") for n in (1, 2))
    assert within.compute + within.weights == pytest.approx(136 * 16e9 * 7 / 8 / 450e9)
    assert across.weights == pytest.approx(136 * 16e9 * 15 / 16 / 50e9 - across.compute)
    assert scale_update(plan, H100, nodes=2, processes=8, sharding="none").weights == 0
