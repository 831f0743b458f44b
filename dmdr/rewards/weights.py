"""Find the weights of rewards: at the address in the config, or else at a pinned one on a hub. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dmdr.config.reward_weights import OF, PINNED
from dmdr.errors import InputMissing
from dmdr.teacher import hub
from dmdr.teacher.digests import digest, digest_files, list_files
from dmdr.teacher.pipeline_files import READ
from dmdr.teacher.weight_files import PICKLES

MISSING = "missing"
FILES = ("*.json", "*.txt", "model.safetensors", "open_clip_model.safetensors")  # read from a whole repository


def find_address(name: str, addresses: Mapping[str, str]) -> str:
    """The address of a set of weights: the config's, or else the pinned one.

    Raises:
        InputMissing: it has neither.
    """
    if name not in addresses and name not in PINNED:
        raise InputMissing(
            f"weights.{name} is not set and has no pinned address; set it to a folder, a file or "
            "hub:OWNER/NAME@COMMIT (docs/evaluation.md says which)"
        )
    return addresses.get(name) or PINNED[name]


def find_weights(name: str, addresses: Mapping[str, str]) -> Path:
    """The file or folder of a set of weights. Weights on a hub are fetched once, into the cache of the hub's library.

    Raises:
        ConfigError: an address on a hub does not pin a commit.
        InputMissing: there is nothing at the address.
    """
    address = find_address(name, addresses)
    if hub.is_hub(address):
        return hub.fetch(f"weights.{name}", address, files=FILES)
    path = Path(address)
    if not path.exists():
        otherwise = f", or leave it out and DMDR fetches {PINNED[name]}" if name in PINNED else ""
        hint = f"; {found}" if (found := hub.suggest_address(address)) else ""
        raise InputMissing(f"weights.{name} {address} does not exist; give the file or folder{otherwise}{hint}")
    return path


def require_weights(name: str, addresses: Mapping[str, str]) -> None:
    """Check that a set of weights is there or can be fetched now, and fetch nothing. Raises as `find_weights` does."""
    address = find_address(name, addresses)
    if hub.is_hub(address):
        hub.require(f"weights.{name}", address)
    else:
        find_weights(name, addresses)


def digest_weights(
    metrics: set[str], addresses: Mapping[str, str], recorded: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The digest of every set of weights that these rewards and judges read, under the name weights:<set>.

    recorded: what the stage recorded when it began. DMDR 0.1 counted every file of a folder.

    Raises:
        InputMissing: a set of weights does not exist.
    """
    needed = sorted({name for metric in metrics for name in OF[metric]})
    return {f"weights:{name}": _digest_named(name, addresses, recorded or {}) for name in needed}


def _digest_named(name: str, addresses: Mapping[str, str], recorded: Mapping[str, str]) -> str:
    path, before = find_weights(name, addresses), recorded.get(f"weights:{name}")
    found = digest_set(path)
    return before if before is not None and before != found and before == digest(path) else found


def digest_set(path: Path) -> str:
    """The digest of a set of weights: of its file, or of the files of its folder that the libraries read.

    Raises:
        InputMissing: some of it cannot be read.
    """
    if path.is_file():
        return digest(path)
    return digest_files(path, [file for file in list_files(path) if file.suffix in (*READ, *PICKLES)])


def digest_weights_or_missing(
    metrics: set[str], addresses: Mapping[str, str], recorded: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Like `digest_weights`, but MISSING stands for a set that does not exist. Its metrics are not on the scorecard."""
    digests = {}
    for metric in sorted(metrics):
        for name in OF[metric]:
            try:
                digests[f"weights:{name}"] = _digest_named(name, addresses, recorded or {})
            except InputMissing:
                digests[f"weights:{name}"] = MISSING
    return digests
