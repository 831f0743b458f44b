"""Build the RL algorithm that a config names."""

from __future__ import annotations

from dmdr.config import rl as config_of
from dmdr.config.rl import AnyRL
from dmdr.rewards.sources import RewardSources
from dmdr.rl.dpo import DPO
from dmdr.rl.evolution_strategies import EvolutionStrategies
from dmdr.rl.grpo import GRPO
from dmdr.rl.objective import Algorithm
from dmdr.rl.refl import ReFL
from dmdr.rl.surrogate import Surrogate
from dmdr.rl.weighting import Weighting
from dmdr.shared_base import SharedBase


def build_algorithm(
    config: AnyRL,
    base: SharedBase,
    weights: RewardSources | None = None,
    *,
    seed: int = 0,
) -> Algorithm:
    """ReFL, DPO, GRPO, evolution strategies, the surrogate or a weighting over one SharedBase.

    weights: where the rewards of the config lie. seed: of the words that a preference draws.

    Raises:
        ConfigError: a reward is unknown or broken.
        DataError, InputMissing: weights of a reward, or the tiny decoder, are damaged or missing.
    """
    if isinstance(config, config_of.ReFL):
        return ReFL(config, base, weights, seed=seed)
    if isinstance(config, config_of.Surrogate):
        return Surrogate(config, base, weights, seed=seed)
    if isinstance(config, config_of.EvolutionStrategies):
        return EvolutionStrategies(config, base, weights, seed=seed)
    if isinstance(config, config_of.Weighting):
        return Weighting(config, base, weights, seed=seed)
    if isinstance(config, config_of.DPO):
        return DPO(config, base, weights, seed=seed)
    return GRPO(config, base, weights, seed=seed)
