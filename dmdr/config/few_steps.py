"""How a few-step student samples. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FewSteps:
    """The settings of a student's sampler.

    eta: the share of fresh noise in each renoising step, from 0, the deterministic step of an ODE, to 1, fresh noise.
    timesteps: the `steps` times at which the network is called, descending, as the network is told them: 1000 is noise.
    shift: of a flow model's times, in the place of the teacher's. timesteps and shift None: the family's own times.
    """

    steps: int
    eta: float = 1.0
    timesteps: tuple[float, ...] | None = None
    shift: float | None = None

    @property
    def is_stochastic(self) -> bool:
        """Whether the finished student renoises with fresh noise.

        No scheduler of diffusers mixes the two. With an eta between 0 and 1 only the rollouts of training mix; the
        finished student is deterministic.
        """
        return self.eta == 1.0

    @property
    def drawn_eta(self) -> float:
        """The eta of the finished student: 0 or 1."""
        return float(self.is_stochastic)
