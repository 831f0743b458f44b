"""A reward as a command line names it: one of ours, FILE.py:CLASS, an entry point, or the address of a service."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from dmdr.config.own_rewards import FILE, OwnReward
from dmdr.config.reward_weights import OF_REWARD, VERIFIERS
from dmdr.errors import ConfigError
from dmdr.rewards.own_code import list_entry_points
from dmdr.rewards.sources import RewardSources


def find_named(text: str, weights: Mapping[str, str]) -> tuple[str, RewardSources]:
    """The name of a reward and its sources. weights: set of weights -> its address, where it is not the pinned one.

    Raises:
        ConfigError: it names none.
    """
    if text in OF_REWARD or text in VERIFIERS:
        return text, RewardSources(weights)
    match = FILE.fullmatch(text)
    place = {"url": text} if "://" in text else {"file": text} if match else {"entry_point": text}
    if "entry_point" in place and text not in list_entry_points():
        known = ", ".join((*OF_REWARD, *VERIFIERS, *list_entry_points()))
        raise ConfigError(f"unknown reward {text}; name one of {known}, a FILE.py:CLASS, or the address of a service")
    try:
        own = OwnReward.model_validate(place)
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"reward {text}: {message}") from None
    name = match["name"].lower() if match else "service" if "url" in place else text
    return name, RewardSources(weights, {name: own})


def parse_weights(texts: list[str]) -> dict[str, str]:
    """Weights from texts such as "pickscore=/models/pickscore".

    Raises:
        ConfigError: a text has no "=".
    """
    pairs = [text.partition("=") for text in texts]
    if wrong := next((text for text, (name, _, address) in zip(texts, pairs, strict=True) if not address), None):
        raise ConfigError(f"--weights {wrong} is not NAME=ADDRESS; give, for example, pickscore=/models/pickscore")
    return {name: address for name, _, address in pairs}
