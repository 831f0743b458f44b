"""Load a reward by its name, with the weights that it reads."""

from __future__ import annotations

from dmdr.config.reward_weights import FASHION, LAB, OF_REWARD
from dmdr.errors import ConfigError
from dmdr.rewards.aesthetic import load_aesthetic
from dmdr.rewards.imagereward import load_imagereward
from dmdr.rewards.lab import load_lab_reward
from dmdr.rewards.open_clip import load_open_clip
from dmdr.rewards.own import UserReward
from dmdr.rewards.pickscore import load_pickscore
from dmdr.rewards.protocol import Reward
from dmdr.rewards.service import ServiceReward
from dmdr.rewards.sources import RewardSources
from dmdr.rewards.uncounted import Uncounted
from dmdr.rewards.weights import find_weights


def load_reward(name: str, device: str = "cpu", sources: RewardSources | None = None) -> Reward:
    """Load a reward by name, frozen. On the device "meta" no weights are needed or read, and no code of a user runs.

    sources: of the config; a set of weights that is not in it lies at its pinned address.

    Raises:
        ConfigError: no reward has that name.
        InputMissing: the weights, or a user's file, are not at their address.
        DataError: the weights are damaged, or belong to another model; a user's code raises.
        RewardUnavailable: a service does not answer.
    """
    sources = sources or RewardSources()
    if (own := sources.own.get(name)) is not None:
        if device == "meta":
            return Uncounted(name)
        return UserReward(name, own, device) if own.url is None else ServiceReward(name, own, sources)
    if name in (*LAB, *FASHION):
        return load_lab_reward(name, device)
    if name not in OF_REWARD:
        raise ConfigError(f"unknown reward {name!r}; DMDR has {', '.join(OF_REWARD)}")
    on_meta = device == "meta"
    paths = {each: None if on_meta else find_weights(each, sources.weights) for each in OF_REWARD[name]}
    match name:
        case "pickscore":
            return load_pickscore(paths["pickscore"], device)
        case "aesthetic":
            return load_aesthetic(paths["aesthetic"], paths["clip-vit-large-patch14"], device)
        case "imagereward":
            return load_imagereward(paths["imagereward"], paths["bert-vocabulary"], device)
    (path,) = paths.values()
    return load_open_clip(name, path, device)
