"""What trains student and fake score: AdamW, plain, fused or with 8-bit moments; RL's gradient beside another."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch

from dmdr import distributed
from dmdr.config.training import Optimizer, Training
from dmdr.errors import ConfigError
from dmdr.transfer import send


def check_optimizers(training: Training, stage: str, *, split: bool) -> None:
    """Refuse an optimizer that cannot run here.

    split: whether the weights of a full student are sharded over several ranks.

    Raises:
        ConfigError: an optimizer is not installed, or cannot train sharded weights.
    """
    for network, config in {"student": training.student, "fake_score": training.fake_score}.items():
        if config.kind == "8bit" and find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"{stage}.{network}.kind 8bit needs bitsandbytes, which is not installed; pip install bitsandbytes, or "
                "set kind: fused"
            )
    if split and training.student.kind == "8bit":
        raise ConfigError(
            f"{stage}.student.kind 8bit cannot have a full student that execution.sharding fsdp splits; set kind: "
            "fused, sharding: none, or student.form: lora"
        )


def build_optimizer(parameters: dict[str, torch.nn.Parameter], config: Optimizer) -> torch.optim.Optimizer:
    """AdamW for these parameters, in the form that the config names."""
    rate, decay, eps = config.learning_rate, config.weight_decay, config.eps
    if config.kind == "8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters.values(), lr=rate, betas=config.betas, eps=eps, weight_decay=decay)
    fused = True if config.kind == "fused" else None  # None leaves the choice to torch
    return torch.optim.AdamW(parameters.values(), lr=rate, betas=config.betas, eps=eps, weight_decay=decay, fused=fused)


@dataclass(frozen=True)
class Trainable:
    """A network that an update trains: its parameters by name, their optimizer, and the norm that clips the gradient.

    Of a sharded network a rank holds its rows of each parameter.
    """

    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    clip: float

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def step(self) -> torch.Tensor:
        """Sum the gradients over the ranks, clip them, take the optimizer's step; return their norm before clipping."""
        norm = self._sum_and_clip()
        self.optimizer.step()
        return norm

    def step_beside(
        self, rl: GradientSum, balance: Balance, trust: float | torch.Tensor = 1.0
    ) -> dict[str, torch.Tensor]:
        """The same with RL's gradient beside the one that the parameters have, each clipped apart; return the norms."""
        grad_dm, grad_rl = self._sum_and_clip(), rl.norm()
        share = balance.weigh(grad_dm, grad_rl, clip=self.clip, trust=trust)
        if balance.weight > 0:
            rl.add_to_gradients(share.factor)
        self.optimizer.step()
        norms = {"grad_student": grad_dm, "grad_dm": grad_dm, "grad_rl": grad_rl}
        return norms | {"rl_weight": share.weight, "rl_clipped": share.clipped}

    def _sum_and_clip(self) -> torch.Tensor:
        gradients = [each.grad for each in self.parameters.values() if each.grad is not None]
        distributed.all_reduce_in_place(gradients)
        norm = distributed.full_tensor(torch.nn.utils.get_total_norm(gradients))
        torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip, norm)
        return norm


@dataclass(frozen=True)
class Share:
    """How much of RL's gradient an update takes: `factor` times it. All are float64 scalars on the gradient's device.

    weight: the factor before clipping. clipped: 1.0 if the clip acted, 0.0 if not.
    """

    factor: torch.Tensor
    weight: torch.Tensor
    clipped: torch.Tensor


@dataclass
class Balance:
    """How hard RL pulls beside distribution matching. It changes while training, so checkpoints hold its lists.

    fixed: RL's gradient g has the configured weight, and weight |g| is clipped at the student's own clip.
    matched: the weight is multiplied by the median of |dm| / |g| over the first `matching` updates, of those that are
    done in the meantime. dm is distribution matching's gradient as clipped. weight |g| is clipped at the configured
    weight times the median |dm| of the last `matching` updates: a rare large g is not to drown distillation.

    The norms stay on their device, where the CPU need not wait for them, until `settle` reads those of an update.

    matching: None: fixed. ratios: |dm| / |g| of the first updates. lengths: |dm| of the last ones.
    """

    weight: float = 0.0
    matching: int | None = None
    ratios: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    _new: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # ratio, nan if none, and length

    def weigh(self, grad_dm: torch.Tensor, grad_rl: torch.Tensor, *, clip: float, trust: float | torch.Tensor) -> Share:
        """The share of an update by the norms of its gradients, both before clipping.

        clip: the student's. trust: the weight of this update is multiplied by it; one of 0 is not matched.
        """
        dm, rl = grad_dm.double().clamp(max=clip), grad_rl.double()
        weight = torch.ones_like(dm) * self.weight * trust
        limit = torch.full_like(dm, clip)
        if self.matching is not None:
            counts = (rl > 0) & (torch.ones_like(dm) * trust > 0)
            self._new.append((torch.where(counts, dm / rl, torch.nan), dm))
            limit = weight * _join(self.lengths, [each for _, each in self._new])[-self.matching :].quantile(0.5)
            weight = weight * self._match()
        clipped = weight * rl > limit
        return Share(torch.where(clipped, limit / rl, weight), weight, clipped.double())

    def _match(self) -> torch.Tensor:
        """The median of the first `matching` ratios that there are; 0 if there is none."""
        ratios = _join(self.ratios, [each for each, _ in self._new])
        is_early = (~ratios.isnan()).cumsum(0) <= (self.matching or 0)
        return torch.where(is_early, ratios, torch.nan).nanquantile(0.5).nan_to_num(0.0)

    def settle(self) -> None:
        """Take the norms of the last update into the lists, as numbers."""
        for ratio, length in self._new:
            assert self.matching is not None, "only a matched weight has norms"
            self.lengths = [*self.lengths, float(length)][-self.matching :]
            if len(self.ratios) < self.matching and not math.isnan(float(ratio)):
                self.ratios = [*self.ratios, float(ratio)]
        self._new = []


def _join(known: list[float], new: list[torch.Tensor]) -> torch.Tensor:
    """Numbers, and others that are on their device, as one tensor there."""
    return torch.cat([send(torch.tensor(known, dtype=torch.float64), new[0]), torch.stack(new)])


class GradientSum:
    """The gradient of a loss, summed over the parts of a batch and kept apart from the parameters' own."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.sums: list[torch.Tensor | None] = [None] * len(parameters)

    def add(self, loss: torch.Tensor, *, keep_graph: bool = False) -> None:
        """Add the gradient of one part's loss."""
        gradients = _differentiate(loss, self.parameters, keep_graph)
        for index, gradient in enumerate(gradients):
            total = self.sums[index]
            self.sums[index] = gradient if total is None else total if gradient is None else total + gradient

    def norm(self) -> torch.Tensor:
        """Sum it over all ranks, and return its norm."""
        found = [each for each in self.sums if each is not None]
        distributed.all_reduce_in_place(found)
        return distributed.full_tensor(torch.nn.utils.get_total_norm(found))

    def dot(self, other: GradientSum) -> torch.Tensor:
        """The scalar product of two of them, after `norm` has summed both over all ranks."""
        pairs = zip(self.sums, other.sums, strict=True)
        products = [(one * another).sum() for one, another in pairs if one is not None and another is not None]
        return distributed.full_tensor(sum(products[1:], start=products[0]))

    def add_to_gradients(self, factor: torch.Tensor) -> None:
        """Add `factor`, a scalar, times it to the parameters' own gradients."""
        for parameter, own in zip(self.parameters, self.sums, strict=True):
            if own is not None:
                scaled = own * factor.to(own.dtype)
                parameter.grad = scaled if parameter.grad is None else parameter.grad.add_(scaled)


def _differentiate(
    loss: torch.Tensor, parameters: list[torch.nn.Parameter], keep_graph: bool
) -> list[torch.Tensor | None]:
    """The gradient of a loss. The parameters' own gradients stay as they are."""
    if not distributed.is_sharded(parameters[0]):
        return list(torch.autograd.grad(loss, parameters, retain_graph=keep_graph, allow_unused=True))
    own = [each.grad for each in parameters]
    for each in parameters:
        each.grad = None
    loss.backward(retain_graph=keep_graph)  # FSDP2 gathers weights and writes the rows' gradients itself
    gradients = [each.grad for each in parameters]
    for each, kept in zip(parameters, own, strict=True):
        each.grad = kept
    return gradients


def learning_rate(config: Optimizer, update: int, updates: int) -> float:
    """The learning rate of an update, counted from 0. It depends on the place in the stage only: a resume keeps it.

    It rises over the `warmup` first updates, and falls linearly to the final rate, if there is one.
    """
    rate = config.learning_rate
    if config.final_learning_rate is not None:
        rate += (config.final_learning_rate - config.learning_rate) * update / max(1, updates - 1)
    return rate * (update + 1) / config.warmup if update < config.warmup else rate


def read_state(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """The moments and the step count of a parameter; empty before the first step. No two tensors share memory."""
    state = {key: torch.as_tensor(value) for key, value in optimizer.state[parameter].items()}
    # bitsandbytes shares one table of its 8-bit values among all parameters
    return {key: value.clone() if key.startswith("qmap") else value for key, value in state.items()}


def restore_state(
    optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, saved: dict[str, torch.Tensor], kind: str
) -> None:
    """The reverse of `read_state`, from whole tensors."""
    state: dict[str, torch.Tensor | int] = {}
    for key, value in saved.items():
        if key == "step":  # a number for bitsandbytes, a tensor on the device only for the fused AdamW
            on_device = value.to(parameter.device if kind == "fused" else "cpu", copy=True)
            state[key] = int(value) if kind == "8bit" else on_device
        elif value.shape == parameter.shape:
            moment = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            distributed.copy_shard(moment, value)
            state[key] = moment
        else:
            state[key] = value.to(parameter.device, copy=True)
    optimizer.state[parameter] = state
