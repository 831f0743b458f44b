"""All that a resume needs, as tensors and JSON: both networks, both optimizers, the EMA, the step and the metrics.

There is no random state: noise, prompts and order are functions of (seed, stage, update).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from dmdr import distributed, optimizers
from dmdr.config.run import Training
from dmdr.errors import DataError
from dmdr.shared_base import SharedBase

Named = dict[str, torch.Tensor]


class TrainState:
    """What changes while training. `update` student updates are done; `rows` holds one metrics row for each, and at the
    end of a watched stage one more. `best_ema` is empty unless the watch keeps it."""

    def __init__(self, base: SharedBase, training: Training, *, ema: float) -> None:
        self.update, self.rows, self.ema_decay = 0, [], ema
        self.rl_weight = 0.0  # of the last update; what a matched weight came to
        self.networks = {"student": base.student_parameters, "fake_score": base.fake_parameters}
        self.kinds = {"student": training.student.kind, "fake_score": training.fake_score.kind}
        self.optimizers = {
            "student": optimizers.build_optimizer(base.student_parameters, training.student),
            "fake_score": optimizers.build_optimizer(base.fake_parameters, training.fake_score),
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
        student = [distributed.local_shard(self.networks["student"][name]) for name in self.ema]
        torch._foreach_lerp_([distributed.local_shard(average) for average in self.ema.values()], student, 1 - decay)
        self.rows.append(row)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the student is its EMA: they exchange their numbers, one tensor after another, and no bit changes."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, average in self.ema.items():
            ours, theirs = distributed.local_shard(self.networks["student"][name]), distributed.local_shard(average)
            kept = ours.clone()
            ours.copy_(theirs)
            theirs.copy_(kept)

    def keep_best(self) -> None:
        """Remember the EMA as it is now."""
        if not self.best_ema:
            self.best_ema = {name: torch.empty_like(average) for name, average in self.ema.items()}
        for name, average in self.ema.items():
            distributed.local_shard(self.best_ema[name]).copy_(distributed.local_shard(average))

    def tensors(self) -> Named:
        """Everything as one flat dict: role/param/name, role/exp_avg/name, ..., ema/name, best_ema/name.

        Of what is split over the ranks these are this rank's rows; what is not, the first rank alone has.
        """
        flat = {f"ema/{name}": value for name, value in self.ema.items()}
        flat |= {f"best_ema/{name}": value for name, value in self.best_ema.items()}
        for role, parameters in self.networks.items():
            for name, parameter in parameters.items():
                flat[f"{role}/param/{name}"] = parameter.detach()
                for key, value in optimizers.read_state(self.optimizers[role], parameter).items():
                    flat[f"{role}/{key}/{name}"] = value
        return {name: distributed.local_shard(value) for name, value in flat.items() if distributed.has_rows(value)}

    def info(self) -> dict:
        return {"update": self.update, "rl_weight": self.rl_weight, "rows": self.rows}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, torch.Tensor], info: dict) -> None:
        """Become the state that was saved; the next update continues from it.

        Raises:
            DataError: the tensors are of another model.
        """
        self.update, self.rl_weight, self.rows = info["update"], info["rl_weight"], list(info["rows"])
        names = {tuple(name.split("/", 2)) for name in tensors if name.count("/") > 1}
        fill_parameters(self.ema, Below("ema/", tensors), "checkpoint's EMA")
        if best := Below("best_ema/", tensors):
            self.keep_best()
            fill_parameters(self.best_ema, best, "checkpoint's best EMA")
        for role, parameters in self.networks.items():
            fill_parameters(parameters, Below(f"{role}/param/", tensors), f"checkpoint's {role}")
            keys = sorted({key for of, key, _ in names if of == role} - {"param"})
            for name, parameter in parameters.items():
                saved = {key: tensors[f"{role}/{key}/{name}"] for key in keys if (role, key, name) in names}
                if saved:
                    optimizers.restore_state(self.optimizers[role], parameter, saved, self.kinds[role])


class Below(Mapping):
    """The tensors whose names begin with `prefix`, under the rest of their names."""

    def __init__(self, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.prefix, self.tensors = prefix, tensors
        self.names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@torch.no_grad()
def fill_parameters(parameters: Named, saved: Mapping[str, torch.Tensor], what: str) -> None:
    """Copy whole tensors into parameters of the same names and shapes, of which this rank may hold some rows.

    Raises:
        DataError: a name or a shape differs; `what` names the source.
    """
    missing, unknown = sorted(parameters.keys() - saved.keys()), sorted(saved.keys() - parameters.keys())
    if missing or unknown:
        found = f"missing {missing[:3]}" if missing else f"unknown {unknown[:3]}"
        raise DataError(f"{what} does not fit this model: {found}; was it made with another teacher, form or rank?")
    for name, parameter in parameters.items():
        found = saved[name]
        if parameter.shape != found.shape:
            shapes = f"{tuple(found.shape)}, the model has {tuple(parameter.shape)}"
            raise DataError(f"{what} does not fit this model: {name} is {shapes}; another teacher, form or rank?")
        distributed.copy_shard(parameter, found)
