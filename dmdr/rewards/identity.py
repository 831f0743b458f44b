"""What names a reward in a result: its name, its version and a digest of what makes its scores. No torch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

from dmdr.config.identity import fingerprint
from dmdr.config.reward_weights import FASHION, LAB, OF
from dmdr.errors import ConfigError
from dmdr.rewards.client import RewardClient
from dmdr.rewards.ocr_package import digest_ocr
from dmdr.rewards.own_code import digest_code
from dmdr.rewards.sources import RewardSources
from dmdr.rewards.weights import digest_weights
from dmdr.rewards.wire import About
from dmdr.teacher.digests import digest

LAB_FILES = Path(__file__).parents[1] / "lab" / "rewards"


def identify_reward(name: str, sources: RewardSources) -> About:
    """What names a reward that is computed here. The version of a user's code is known when it runs: here it is empty.

    Raises:
        ConfigError: no reward has that name.
        InputMissing: its weights, its file or its package are not here.
    """
    if name in sources.own:
        return About(name=name, version="own", digest=digest_code(name, sources.own[name]))
    if name not in OF:
        raise ConfigError(f"unknown reward {name!r}; DMDR has {', '.join(OF)}")
    files = {file.name: digest(file) for file in sorted(LAB_FILES.glob(f"{name}.*"))} if name in LAB + FASHION else {}
    parts = {**digest_weights({name}, sources.weights), **files}
    if name == "ocr":
        parts["ocr"] = digest_ocr()
    version = importlib.metadata.version("dmdr")
    return About(name=name, version=version, digest=fingerprint({"reward": name, **parts}))


def digest_rewards(names: Iterable[str], sources: RewardSources, *, waits: bool) -> dict[str, str]:
    """reward:NAME -> the digest of each of these rewards whose scores do not come from weights that the config names: a
    user's code, a service, a package that reads text.

    waits: whether a service that is away is waited for.

    Raises:
        InputMissing: a file or a package is not there.
        RewardUnavailable, ConfigError, DataError: a service does not answer as one.
    """
    digests = {}
    for name in sorted(names):
        own = sources.own.get(name)
        if own is not None and own.url is not None:
            digests[f"reward:{name}"] = RewardClient(name, own, sources, waits=waits).fetch_about().digest
        elif own is not None:
            digests[f"reward:{name}"] = digest_code(name, own)
        elif name == "ocr":
            digests["reward:ocr"] = digest_ocr()
    return digests
