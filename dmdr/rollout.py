"""Sample: backward simulation, the few-step student, the multi-step teacher with CFG.

1. Backward simulation follows inference: the input of each trained step is what the sampler itself would see there.
   (The official demo trains on an x0 that it renoises to the time of its prediction, one prediction ahead.)
2. States stay on the rank that rolled them out. What they are used for is dealt by trajectory (`config/deal.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from dmdr.backbones.protocol import Backbone, Conditioning
from dmdr.config.deal import Deal
from dmdr.config.few_steps import FewSteps
from dmdr.config.prompt_record import PromptRecord
from dmdr.noise import RowNoise, generator_for
from dmdr.path import Path, per_sample
from dmdr.transfer import send

WORTH_A_NOTE = 5.0  # times that an error of a prediction counts in the image


@dataclass(frozen=True)
class States:
    """Inputs and predictions of N sampling steps of B trajectories: times (N,), x_t and x0 (N, B, C, H, W)."""

    times: torch.Tensor
    x_t: torch.Tensor
    x0: torch.Tensor


@dataclass(frozen=True)
class Window:
    """A rank's part of the rollout of a training step, and what it was drawn for.

    states: N steps of the trajectories that this rank rolled out. c, records: conditioning and prompt of each.
    times: (N + 1,) of the sampler. eta: its share of fresh noise. seed, stage, update: what all that the step draws
    depends on. micro_batch: the most samples that a network sees at once; None: all. numbers: which trajectories this
    rank has, among those of all ranks; of: how many these are; None: this rank has all. source: of noise.
    """

    states: States
    c: Conditioning
    records: list[PromptRecord]
    times: torch.Tensor
    eta: float
    seed: int
    stage: str
    update: int
    micro_batch: int | None = None
    numbers: Sequence[int] | None = None
    of: int | None = None
    source: RowNoise = field(default_factory=RowNoise)

    @property
    def trajectories(self) -> int:
        """How many all ranks have."""
        return len(self.records) if self.of is None else self.of

    def generator(self, name: str, *key: int) -> torch.Generator:
        """A generator for one kind of draw of this step."""
        return generator_for(self.seed, self.stage, name, self.update, *key)

    def draw(self, name: str, rows: Sequence[int], shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal (rows, *shape) for one kind of draw of this step, on the device of the states; `rows` name
        each row among those of all ranks."""
        noise = self.source.draw(self.seed, (self.stage, name), self.update, rows=rows, shape=shape)
        return send(noise, self.times)

    def fit(self, size: int) -> int | None:
        """How many groups of `size` samples fit into the micro batch, at least one; None for all of them."""
        return None if self.micro_batch is None else max(1, self.micro_batch // size)

    def locate(self, trajectories: Sequence[int]) -> list[int]:
        """Where trajectories, numbered among those of all ranks, stand in this rank's states."""
        if self.numbers is None:
            return list(trajectories)
        places = {number: place for place, number in reversed(list(enumerate(self.numbers)))}
        return [places[number] for number in trajectories]

    def find_pairs(self, deal: Deal, chosen: Sequence[int], name: str, *, steps: int) -> torch.Tensor:
        """The flat indices, into N steps x this rank's trajectories, of states that were dealt.

        Each trajectory gives its states in a random order of its first `steps` steps, which depends on the seed, the
        stage, `name`, the update and the trajectory alone.
        """
        orders: dict[int, list[int]] = {}
        found: list[int] = []
        for state in chosen:
            number = deal.find_trajectory(state)
            if number not in orders:
                orders[number] = torch.randperm(steps, generator=self.generator(name, number)).tolist()
            found.append(orders[number][deal.find_turn(state)])
        places = self.locate([deal.find_trajectory(state) for state in chosen])
        return self.flatten(found, places)

    def flatten(self, steps: Sequence[int], places: Sequence[int]) -> torch.Tensor:
        """The flat indices of states, from their steps and where their trajectories stand: int64, on the CPU."""
        count = self.states.x0.shape[1]
        return torch.tensor(
            [step * count + place for step, place in zip(steps, places, strict=True)], dtype=torch.int64
        )


@dataclass(frozen=True)
class Renoising:
    """The step of the sampler from t to t_next, both (B,): x_next = mean + deviation noise.

    The noise of the step is eta parts fresh and sqrt(1 - eta^2) parts the noise that x_t had, so that its variance is 1
    whatever eta is. eta 1 renoises x0 with fresh noise alone. eta 0 is the deterministic step: Euler's on the flow
    path, DDIM's on the variance preserving one.
    """

    path: Path
    t: torch.Tensor
    t_next: torch.Tensor
    eta: float

    def mean(self, x_t: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W), from what the sampler was given and what it predicted."""
        signal, spread = self.path.signal_and_spread(self.t_next)
        mean = per_sample(signal, x0) * x0
        if self.eta == 1.0:
            return mean
        kept = math.sqrt(1 - self.eta**2) * spread
        return mean + per_sample(kept, x0) * self.path.find_noise(x_t, x0, self.t)

    def deviation(self) -> torch.Tensor:
        """(B,)."""
        return self.eta * self.path.signal_and_spread(self.t_next)[1]

    def slope(self) -> torch.Tensor:
        """(B,) the derivative of the mean in x0."""
        signal, spread = self.path.signal_and_spread(self.t_next)
        signal_t, spread_t = self.path.signal_and_spread(self.t)
        return signal - math.sqrt(1 - self.eta**2) * spread * signal_t / spread_t


def prompt_order(seed: int, stage: str, start: int, count: int, total: int) -> list[int]:
    """Positions start .. start + count of an endless shuffled reading of `total` prompts, each once an epoch."""
    order: list[int] = []
    for position in range(start, start + count):
        epoch, index = divmod(position, total)
        order.append(int(permute_prompts(seed, stage, epoch, total)[index]))
    return order


@lru_cache(maxsize=2)  # of distribution matching and of RL
def permute_prompts(seed: int, stage: str, epoch: int, total: int) -> torch.Tensor:
    """The order of all prompts in an epoch."""
    return torch.randperm(total, generator=generator_for(seed, stage, "order", epoch))


@torch.no_grad()
def simulate_backward(
    student: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    backbone: Backbone,
    *,
    times: torch.Tensor,
    noises: torch.Tensor,
    eta: float,
) -> States:
    """Run the few-step sampler: predict x0, renoise it to the next time.

    Args:
        student: (x_t (B, C, H, W), t (B,)) -> x0.
        times: (N + 1,), student_timesteps and a final 0.
        noises: (N, B, C, H, W); trajectories start at noises[0], and step i adds noises[i].
        eta: the share of fresh noise in a step, as in `Renoising`.
    """
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    x_t = noises[0]
    for index, t in enumerate(times[:-1]):
        if index > 0:
            step = Renoising(backbone.path, times[index - 1].expand(len(x_t)), t.expand(len(x_t)), eta)
            x_t = step.mean(x_t, outputs[-1])
            if eta > 0:
                x_t = x_t + per_sample(step.deviation(), x_t) * noises[index]
        inputs.append(x_t)
        outputs.append(student(x_t, t.expand(len(x_t))))
    return States(times[:-1], torch.stack(inputs), torch.stack(outputs))


def sample_student(
    backbone: Backbone,
    network: torch.nn.Module,
    c: Conditioning,
    *,
    times: torch.Tensor,
    noises: torch.Tensor,
    eta: float = 1.0,
) -> torch.Tensor:
    """The student's x0 (B, C, H, W) after its N steps, without CFG; times, noises, eta as in `simulate_backward`."""

    def student(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return backbone.predict_x0(network, x_t, t, c)

    return simulate_backward(student, backbone, times=times, noises=noises, eta=eta).x0[-1]


def predict_guided(
    backbone: Backbone,
    network: torch.nn.Module,
    x_t: torch.Tensor,
    t: torch.Tensor,
    c: Conditioning,
    unconditional: Conditioning,
    scale: float | torch.Tensor,
) -> torch.Tensor:
    """Classifier-free guidance: u + scale (c - u) of raw predictions, both halves in one call; scale 1 runs only c.

    scale: of all samples, or (B, 1, 1, 1). A network into which guidance was distilled takes one as an input instead.
    `unconditional` holds one row, the empty prompt, which every sample of the batch uses.
    """
    if not isinstance(scale, torch.Tensor) and scale == 1.0:
        return backbone.predict(network, x_t, t, c)
    if backbone.guidance_is_input:
        assert not isinstance(scale, torch.Tensor), "it has no CFG to weigh"
        return backbone.predict(network, x_t, t, {**c, "guidance": torch.full_like(c["guidance"], scale)})
    both = {key: torch.cat([value, unconditional[key].expand_as(value)]) for key, value in c.items()}
    prediction = backbone.predict(network, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
    with_prompt, without_prompt = prediction.chunk(2)
    return without_prompt + scale * (with_prompt - without_prompt)


@torch.no_grad()
def sample_teacher(
    backbone: Backbone,
    c: Conditioning,
    unconditional: Conditioning,
    *,
    guidance_scale: float,
    times: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """The teacher's x0 (B, C, H, W): Euler steps along `times` (steps + 1,) from `noise`, as its own pipeline does."""
    x_t = noise
    for time, next_time in zip(times[:-1], times[1:], strict=True):
        t, t_next = time.expand(len(x_t)), next_time.expand(len(x_t))
        prediction = predict_guided(backbone, backbone.network, x_t, t, c, unconditional, guidance_scale)
        x_t = backbone.path.step(x_t, prediction, t, t_next)
    return x_t


def note_one_step(backbone: Backbone, few: FewSteps) -> str | None:
    """What a user should know of the level that a 1-step student starts from; None if there is nothing.

    An x0 from the predicted noise multiplies its error by spread / signal, which is 14.6 at SDXL's timestep 999 and 1.5
    at 399. Told 399, twice as many images of the lab's 1-step student were right (ours, `tables/start-level.yaml`).
    """
    if few.steps > 1:
        return None
    start, zero = backbone.student_times(few)[:1], torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    factor = backbone.path.to_x0(zero, zero + 1, start).abs().item()
    if factor < WORTH_A_NOTE:
        return None
    told = f"{backbone.student_timesteps(few)[0].item():.0f}"
    return (
        f"a student of 1 step that is told timestep {told} multiplies each error of its prediction by {factor:.1f}; "
        "consider student.timesteps: [399] (docs/student.md)"
    )
