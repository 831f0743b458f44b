"""All that a resume needs, as tensors and JSON: both networks, both optimizers, the EMA, the step and the metrics.

There is no random state: noise, prompts and order are functions of (seed, stage, update).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dmdr.backbones.scores import SharedBase
from dmdr.config import Optimizer, Training
from dmdr.errors import DataError

Named = dict[str, torch.Tensor]


def adamw(parameters: dict[str, torch.nn.Parameter], config: Optimizer) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters.values(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )


class TrainState:
    """What changes while training. `update` student updates are done; `rows` holds one metrics row for each, and at the
    end of a watched stage one more. `best_ema` is empty unless the watch keeps it."""

    def __init__(self, base: SharedBase, training: Training, *, ema: float) -> None:
        self.update, self.rows, self.ema_decay = 0, [], ema
        self.rl_weight = 0.0  # of the last update; what a matched weight came to
        self.networks = {"student": base.student_parameters, "fake_score": base.fake_parameters}
        self.optimizers = {
            "student": adamw(base.student_parameters, training.student),
            "fake_score": adamw(base.fake_parameters, training.fake_score),
        }
        self.ema = {name: parameter.detach().clone() for name, parameter in base.student_parameters.items()}
        self.best_ema: Named = {}

    @torch.no_grad()
    def advance(self, row: dict[str, float]) -> None:
        """Count one finished student update: ema <- d ema + (1 - d) student.

        d = (1 - 1 / u)^3 at the u-th update, up to the configured decay: the power function average of EDM2 (Karras et
        al. 2024, section 3.1, gamma 2). It looks back over the same share of a short stage as of a long one, and soon
        forgets where it began.
        """
        self.update += 1
        decay = min(self.ema_decay, (1 - 1 / self.update) ** 3)
        student = [self.networks["student"][name] for name in self.ema]
        torch._foreach_lerp_(list(self.ema.values()), student, 1 - decay)
        self.rows.append(row)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the student is its EMA: they exchange their memory, so that nothing is copied and no bit changes."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, average in self.ema.items():
            parameter = self.networks["student"][name]
            parameter.data, average.data = average.data, parameter.data

    def keep_best(self) -> None:
        """Remember the EMA as it is now."""
        if not self.best_ema:
            self.best_ema = {name: torch.empty_like(average) for name, average in self.ema.items()}
        torch._foreach_copy_(list(self.best_ema.values()), list(self.ema.values()))

    def tensors(self) -> Named:
        """Everything as one flat dict: role/param/name, role/exp_avg/name, ..., ema/name, best_ema/name."""
        flat = {f"ema/{name}": value for name, value in self.ema.items()}
        flat |= {f"best_ema/{name}": value for name, value in self.best_ema.items()}
        for role, parameters in self.networks.items():
            for name, parameter in parameters.items():
                flat[f"{role}/param/{name}"] = parameter.detach()
                for key, value in self.optimizers[role].state[parameter].items():
                    flat[f"{role}/{key}/{name}"] = value
        return flat

    def info(self) -> dict:
        return {"update": self.update, "rl_weight": self.rl_weight, "rows": self.rows}

    @torch.no_grad()
    def restore(self, tensors: Named, info: dict) -> None:
        """Become the state that was saved; the next update continues from it.

        Raises:
            DataError: the tensors are of another model.
        """
        self.update, self.rl_weight, self.rows = info["update"], info["rl_weight"], list(info["rows"])
        ema = {name: tensors[f"ema/{name}"] for name in self.ema if f"ema/{name}" in tensors}
        fill(self.ema, ema, "checkpoint's EMA")
        best = {name: tensors[f"best_ema/{name}"] for name in self.ema if f"best_ema/{name}" in tensors}
        if best:
            self.keep_best()
            fill(self.best_ema, best, "checkpoint's best EMA")
        for role, parameters in self.networks.items():
            prefix = f"{role}/param/"
            saved = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            fill(parameters, saved, f"checkpoint's {role}")
            for name, parameter in parameters.items():
                keys = {key: f"{role}/{key}/{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
                if keys["step"] in tensors:
                    moments = {key: tensors[path].to(parameter.device).clone() for key, path in keys.items()}
                    self.optimizers[role].state[parameter] = {**moments, "step": tensors[keys["step"]].clone()}


@torch.no_grad()
def fill(parameters: Named, saved: Named, what: str) -> None:
    """Copy tensors into parameters of the same names and shapes.

    Raises:
        DataError: a name or a shape differs; `what` names the source.
    """
    missing, unknown = sorted(parameters.keys() - saved.keys()), sorted(saved.keys() - parameters.keys())
    if missing or unknown:
        found = f"missing {missing[:3]}" if missing else f"unknown {unknown[:3]}"
        raise DataError(f"{what} does not fit this model: {found}; was it made with another teacher, form or rank?")
    for name, parameter in parameters.items():
        if parameter.shape != saved[name].shape:
            shapes = f"{tuple(saved[name].shape)}, the model has {tuple(parameter.shape)}"
            raise DataError(f"{what} does not fit this model: {name} is {shapes}; another teacher, form or rank?")
        parameter.copy_(saved[name])
