"""The time convention: t = 0 is data, t = 1 is noise. Every x0, x_t and noise is (B, C, H, W); every t is (B,).

Both paths are Gaussian: x_t = signal(t) x0 + spread(t) noise. They differ in these functions and in what the network
predicts:
1. Flow (SD3, rectified flow): signal 1 - t, spread t. The network predicts the velocity, noise - x0.
2. Variance preserving (SDXL, DDPM): signal sqrt(alpha_bar), spread sqrt(1 - alpha_bar). The network predicts the noise,
   or v = signal noise - spread x0 (Salimans and Ho 2022).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch

Predicts = Literal["epsilon", "v_prediction"]


def per_sample(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape t (B,) so that it broadcasts over `like` (B, ...), and cast it to the dtype of `like`."""
    return t.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


class Path(ABC):
    """A path from data to noise, and back with the network's predictions.

    lowest: the lowest level t at which a network predicts.
    """

    lowest = 0.0

    @abstractmethod
    def signal_and_spread(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both (B,). Given x0, x_t is a Gaussian with mean signal x0 and standard deviation spread."""

    @abstractmethod
    def to_x0(self, x_t: torch.Tensor, prediction: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x0 from the network's prediction at x_t."""

    @abstractmethod
    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the network learns to predict at x_t."""

    @abstractmethod
    def step(self, x_t: torch.Tensor, prediction: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor) -> torch.Tensor:
        """One deterministic step of the teacher's sampler."""

    def renoise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = signal x0 + spread noise."""
        signal, spread = self.signal_and_spread(t)
        return per_sample(signal, x0) * x0 + per_sample(spread, x0) * noise

    def find_noise(self, x_t: torch.Tensor, x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The noise that makes x_t of x0: the inverse of `renoise`, for t above 0."""
        signal, spread = self.signal_and_spread(t)
        return (x_t - per_sample(signal, x0) * x0) / per_sample(spread, x0)


class FlowPath(Path):
    """Straight lines from data to noise."""

    def signal_and_spread(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 1 - t, t

    def to_x0(self, x_t: torch.Tensor, prediction: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x0 = x_t - t v."""
        return x_t - per_sample(t, x_t) * prediction

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """v = noise - x0."""
        return noise - x0

    def step(self, x_t: torch.Tensor, prediction: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor) -> torch.Tensor:
        """An Euler step of the probability flow ODE, dx = v dt."""
        return x_t + per_sample(t_next - t, x_t) * prediction


class VPPath(Path):
    """The diffusion of DDPM (Ho et al. 2020) under its discrete schedule: t = (k + 1) / K for timestep k of K.

    A level between two timesteps is rounded to the nearest, so that the network only sees timesteps of its training.
    alphas_cumprod: (K,), descending. predicts: what the network predicts.
    """

    def __init__(self, alphas_cumprod: torch.Tensor, predicts: Predicts = "epsilon") -> None:
        self.predicts = predicts
        self.timesteps = len(alphas_cumprod)
        self.lowest = 1 / self.timesteps  # timestep 0; below it there is only data
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.double()])  # t = 0 is data
        self._tables = {torch.device("cpu"): torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()])}  # by device

    def timestep(self, t: torch.Tensor) -> torch.Tensor:
        """The timestep k (B,) int64, as the network takes it; -1 at t = 0."""
        return (t.double() * self.timesteps).round().long() - 1

    def signal_and_spread(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if t.is_meta:  # a meta tensor has no values to look up
            return 1 - t, t.clone()
        if t.device not in self._tables:
            self._tables[t.device] = self._tables[torch.device("cpu")].to(t.device)
        signal, spread = self._tables[t.device][:, self.timestep(t) + 1].to(t.dtype)
        return signal, spread

    def to_x0(self, x_t: torch.Tensor, prediction: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x0 = (x_t - spread noise) / signal, or signal x_t - spread v."""
        signal, spread = (per_sample(each, x_t) for each in self.signal_and_spread(t))
        if self.predicts == "v_prediction":
            return signal * x_t - spread * prediction
        return (x_t - spread * prediction) / signal

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The noise itself, or v = signal noise - spread x0."""
        if self.predicts == "epsilon":
            return noise
        signal, spread = (per_sample(each, x0) for each in self.signal_and_spread(t))
        return signal * noise - spread * x0

    def step(self, x_t: torch.Tensor, prediction: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor) -> torch.Tensor:
        """A step of DDIM (Song et al. 2021), which is an Euler step in spread / signal."""
        noise = prediction
        if self.predicts == "v_prediction":
            signal, spread = (per_sample(each, x_t) for each in self.signal_and_spread(t))
            noise = signal * prediction + spread * x_t
        return self.renoise(self.to_x0(x_t, prediction, t), noise, t_next)
