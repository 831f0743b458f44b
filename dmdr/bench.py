"""`python -m dmdr.bench`: what one student update costs, counted and timed, beside the naive structure.

Unit F: one forward of the base, no gradient, at the training batch. Counted with torch.utils.flop_counter over the
real update code (optimizer steps, decoder and reward excluded): on the lab teacher and on SD3-Medium's shapes, the
latter on the meta device, where shapes are computed and numbers are not.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from dmdr import losses, teacher
from dmdr.architectures import ARCHITECTURES
from dmdr.backbones import Backbone, Conditioning
from dmdr.backbones.null_tokens import NullTokenAttention
from dmdr.backbones.scores import SharedBase
from dmdr.backbones.sd3 import SD3
from dmdr.rollout import backward_simulation
from dmdr.update import Renoise, rollout, select, trajectories, update_fake_score, update_student

GUIDANCE = 7.0


class Case:
    """One network with K, N and the batch at which its update is measured; conditioning holds `count` prompts."""

    def __init__(
        self,
        backbone: Backbone,
        context: tuple[int, int],
        pooled: int,
        *,
        batch: int,
        steps: int,
        k: int,
        ranks: tuple[int, int | None],  # LoRA ranks of the fake score and of the student; None is a full student
    ) -> None:
        self.like = next(backbone.network.parameters())
        with torch.device(self.like.device):
            self.base = SharedBase(backbone, fake_rank=ranks[0], fake_scale=2.0, student_rank=ranks[1], seed=0)
        self.batch, self.steps, self.k = batch, steps, k
        self.context, self.pooled = context, pooled
        still = {"lr": 0.0, "foreach": False}
        self.optimizers = (
            torch.optim.SGD(self.base.student_parameters.values(), **still),
            torch.optim.SGD(self.base.fake_parameters.values(), **still),
        )
        self.times = torch.linspace(1, 0, steps + 1).to(self.like)

    def conditioning(self, count: int) -> Conditioning:
        return {"context": self.like.new_zeros(count, *self.context), "pooled": self.like.new_zeros(count, self.pooled)}

    def latents(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, *self.base.backbone.latent_shape, device=self.like.device)

    def renoise(self) -> Renoise:
        return Renoise(torch.rand(self.batch, device=self.like.device), self.latents(self.batch))

    def forward(self) -> None:
        """F itself."""
        with torch.no_grad():
            c, t = self.conditioning(self.batch), self.renoise().t
            self.base.backbone.predict(self.base.student_network, self.latents(self.batch), t, c)

    def ours(self) -> None:
        """One window of `dmdr.train`: the same calls on stand-in data."""
        count = trajectories(self.batch, self.k, self.steps)
        c = self.conditioning(count)
        states = rollout(self.base, c, self.times, self.latents(self.steps, count))
        for part in range(self.k):
            pairs = (torch.arange(self.batch) + part * self.batch) % (count * self.steps)
            chosen = select(states, c, pairs.to(self.like.device))
            if part < self.k - 1:
                update_fake_score(self.base, chosen, self.renoise(), self.optimizers[1], clip=1.0)
        update_student(
            self.base, chosen, self.conditioning(1), self.renoise(), self.optimizers, guidance_scale=GUIDANCE,
            real_scale=0.5, rl=None, clips=(1.0, 1.0),
        )  # fmt: skip

    def naive(self) -> None:
        """The official structure: a full rollout for each of K fake updates, a separate score and a separate loss."""
        c, base, path = self.conditioning(self.batch), self.base, self.base.backbone.path
        for part in range(self.k):
            states = backward_simulation(
                lambda x, t: base.student(x, t, c), base.backbone, times=self.times,
                noises=self.latents(self.steps, self.batch),
            )  # fmt: skip
            chosen = select(states, c, torch.arange(self.batch, device=self.like.device))
            update_fake_score(base, chosen, self.renoise(), self.optimizers[1], clip=1.0)
            if part == self.k - 1:
                x0, renoise = base.student(chosen.x_t, chosen.t, c), self.renoise()
                x_t = path.renoise(x0.detach(), renoise.noise, renoise.t)
                with torch.no_grad():
                    fake = path.to_x0(x_t, base.fake(x_t, renoise.t, c), renoise.t)
                real = base.real_x0(x_t, renoise.t, c, self.conditioning(1), guidance_scale=GUIDANCE, lora_scale=0.5)
                losses.distribution_matching(x0, real, fake).backward()


def flops(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def seconds(work, repeats: int = 3) -> float:
    """Best of `repeats`, after one to warm up."""
    best = float("inf")
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def lab(steps: int, k: int, rank: int | None) -> Case:
    """The lab's teacher with the fake score of configs/lab-flow.yaml."""
    backbone = teacher.load(teacher.resolve("lab:flow"))
    item = backbone.encode(["a photo of a red circle left of a blue square"])[0][0]
    context, pooled = tuple(item["context"].shape), item["pooled"].shape[1]
    return Case(backbone, context, pooled, batch=32, steps=steps, k=k, ranks=(16, rank))


class _OnMeta(SD3):
    """SD3-Medium's transformer without weights, text encoders or VAE: enough to count its work."""

    def __init__(self, layers: int) -> None:
        self.network = ARCHITECTURES["SD3-Medium"].on_meta(num_layers=layers)
        self.network.set_attn_processor(NullTokenAttention())
        self.latent_shape = (16, 128, 128)
        self.context_tokens = 77 + 256


def sd3_medium(steps: int, k: int, rank: int | None, layers: int = 24) -> Case:
    """SD3-Medium at 1024x1024 with the fake score of the official demo; fewer layers are counted sooner."""
    return Case(_OnMeta(layers), (77 + 256, 4096), 2048, batch=2, steps=steps, k=k, ranks=(32, rank))


def counted(case: Case) -> tuple[float, float]:
    """Forward-equivalents per student update: (ours, naive)."""
    forward = flops(case.forward)
    return flops(case.ours) / forward, flops(case.naive) / forward


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dmdr.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, default=5, help="fake-score updates per student update")
    parser.add_argument("--no-time", action="store_true", help="count only")
    arguments = parser.parse_args()
    print(f"{'network':<14}{'parameters':>16}{'TFLOP a forward, 1,024 px':>28}")
    for name, each in ARCHITECTURES.items():
        print(f"{name:<14}{each.parameters():>16,}{each.flops() / 1e12:>28.2f}", flush=True)
    print(f"\nforward-equivalents per student update, K={arguments.k}, CFG on (F = one forward at the training batch)")
    print(f"{'network':<12}{'student':<9}{'N':>2}{'ours':>8}{'naive':>8}{'ratio':>8}")
    for name, make in (("lab", lab), ("SD3-Medium", sd3_medium)):
        for rank in (None, 64):
            for steps in (1, 2, 4, 8):
                if name == "SD3-Medium" and steps != 4:
                    continue
                ours, naive = counted(make(steps, arguments.k, rank))
                form = "full" if rank is None else f"lora {rank}"
                print(f"{name:<12}{form:<9}{steps:>2}{ours:>8.2f}{naive:>8.2f}{naive / ours:>8.2f}", flush=True)
    if not arguments.no_time:
        case = lab(4, arguments.k, None)
        ours, naive = seconds(case.ours), seconds(case.naive)
        threads = torch.get_num_threads()
        print(f"lab, full, N=4, {threads} threads: {ours:.2f} s ours, {naive:.2f} s naive, {naive / ours:.2f}x")


if __name__ == "__main__":
    main()
