"""Where the rewards of a run lie: the weights of ours, and the user's own. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dmdr.config.own_rewards import OwnReward
from dmdr.config.run import Config


def _say_nothing(line: str) -> None:
    """Nobody reads the line."""


def _never() -> bool:
    return False


@dataclass(frozen=True)
class RewardSources:
    """The config's `weights` and `rewards`.

    say: gets a line when a service is waited for. stop: whether the process was told to stop, so that the wait ends.
    """

    weights: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[str, OwnReward] = field(default_factory=dict)
    say: Callable[[str], None] = _say_nothing
    stop: Callable[[], bool] = _never


def list_sources(
    config: Config, *, say: Callable[[str], None] = _say_nothing, stop: Callable[[], bool] = _never
) -> RewardSources:
    """The sources of a config. say, stop: as RewardSources has them."""
    return RewardSources(config.weights, config.rewards, say, stop)
