"""What trains student and fake score: AdamW, plain, fused or with 8-bit moments; gradient sums, clipping, matching."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from dmdr import distributed
from dmdr.config.training import Optimizer, Training
from dmdr.errors import ConfigError


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
        gradients = [each.grad for each in self.parameters.values() if each.grad is not None]
        distributed.all_reduce_in_place(gradients)
        norm = distributed.full_tensor(torch.nn.utils.get_total_norm(gradients))
        torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip, norm)
        self.optimizer.step()
        return norm


class GradientSum:
    """The gradient of a loss, summed over the parts of a batch and kept apart from the parameters' own."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.sums: list[torch.Tensor | None] = [None] * len(parameters)

    def add(self, loss: torch.Tensor) -> None:
        """Add the gradient of one part's loss; its graph is kept."""
        gradients = _differentiate(loss, self.parameters)
        for index, gradient in enumerate(gradients):
            total = self.sums[index]
            self.sums[index] = gradient if total is None else total if gradient is None else total + gradient

    def norm(self) -> torch.Tensor:
        """The norm of the sum over all ranks."""
        copies = [each.clone() for each in self.sums if each is not None]
        distributed.all_reduce_in_place(copies)
        return distributed.full_tensor(torch.nn.utils.get_total_norm(copies))


def _differentiate(loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor | None]:
    """The gradient of a loss, whose graph is kept. The parameters hold no gradient before, and none after."""
    if not distributed.is_sharded(parameters[0]):
        return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
    loss.backward(retain_graph=True)  # FSDP2's graph holds the gathered weights and writes the rows' gradients itself
    gradients = [each.grad for each in parameters]
    for each in parameters:
        each.grad = None
    return gradients


def match_gradients(dm: GradientSum, rl: GradientSum, weight: float) -> dict[str, torch.Tensor]:
    """Give the parameters the gradient dm + w rl, w = weight |dm| / |rl|, or 0 where rl is 0; return w and norms."""
    grad_dm, grad_rl = dm.norm(), rl.norm()
    rl_weight = weight * torch.where(grad_rl > 0, grad_dm / grad_rl, torch.zeros_like(grad_rl))
    for parameter, of_dm, of_rl in zip(dm.parameters, dm.sums, rl.sums, strict=True):
        if of_rl is None:
            parameter.grad = of_dm
        else:
            parameter.grad = rl_weight * of_rl + (0 if of_dm is None else of_dm)
    return {"rl_weight": rl_weight, "grad_dm": grad_dm, "grad_rl": grad_rl}


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
