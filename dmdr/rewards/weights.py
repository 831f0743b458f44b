"""Where the weights of a reward lie: pinned on a model hub, or where the config says. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dmdr.config.reward_weights import OF, PINNED
from dmdr.errors import InputMissing
from dmdr.teacher import hub
from dmdr.teacher.digests import digest

MISSING = "missing"
FILES = ("*.json", "*.txt", "model.safetensors", "open_clip_model.safetensors")  # of a whole repository


def address_of(name: str, addresses: Mapping[str, str]) -> str:
    """Of a set of weights: the config's, or the pinned one.

    Raises:
        InputMissing: there is neither.
    """
    if name not in addresses and name not in PINNED:
        raise InputMissing(
            f"weights.{name} is not set and has no pinned address; set it to a folder, a file or "
            "hub:OWNER/NAME@COMMIT (README, Metrics, says which)"
        )
    return addresses.get(name) or PINNED[name]


def find_weights(name: str, addresses: Mapping[str, str]) -> Path:
    """The file or folder of a set of weights; what a hub has is fetched into its library's cache once.

    Raises:
        ConfigError: an address on a hub that names no commit.
        InputMissing: nothing is there.
    """
    found = address_of(name, addresses)
    if hub.is_hub(found):
        return hub.fetch(f"weights.{name}", found, files=FILES)
    path = Path(found)
    if not path.exists():
        other = f", or leave it out and DMDR fetches {PINNED[name]}" if name in PINNED else ""
        raise InputMissing(f"weights.{name} {found} does not exist; give the file or folder{other}")
    return path


def digest_weights(rewards: set[str], addresses: Mapping[str, str]) -> dict[str, str]:
    """The digest of each set of weights that these rewards and judges read, for a stage's inputs.

    Raises:
        InputMissing: a set is not there.
    """
    needed = sorted({name for reward in rewards for name in OF[reward]})
    return {f"weights:{name}": digest(find_weights(name, addresses)) for name in needed}


def digest_weights_or_missing(rewards: set[str], addresses: Mapping[str, str]) -> dict[str, str]:
    """The same where a set may be missing, and its rewards are left out: MISSING in the place of its digest."""
    found = {}
    for reward in sorted(rewards):
        for name in OF[reward]:
            try:
                found |= {f"weights:{name}": digest(find_weights(name, addresses))}
            except InputMissing:
                found |= {f"weights:{name}": MISSING}
    return found
