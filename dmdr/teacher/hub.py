"""Fetch files from a model hub, pinned to a commit: the same files for ever. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from dmdr.errors import ConfigError, InputMissing

ADDRESS = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})(?:/(?P<file>\S+))?")


def is_hub(address: str) -> bool:
    return address.startswith("hub:")


def fetch(key: str, address: str, *, files: tuple[str, ...], exclude: tuple[str, ...] = ()) -> Path:
    """Fetch hub:OWNER/NAME@COMMIT, or one file of it, hub:OWNER/NAME@COMMIT/FILE, into the library's cache.

    Args:
        key: of the config, for messages.
        files: patterns of the files to fetch if `address` is a whole repository.
        exclude: patterns of those to leave out.

    Returns: the folder of the repository, or the file, in the cache.

    Raises:
        ConfigError: no commit is pinned.
        InputMissing: the hub does not give it.
    """
    pinned = ADDRESS.fullmatch(address)
    if not pinned:
        raise ConfigError(
            f"{key} {address} is not hub:OWNER/NAME@COMMIT; pin the commit, 40 hex digits, so that it stays the same"
        )
    from huggingface_hub import hf_hub_download, snapshot_download

    repo, commit, file = pinned["repo"], pinned["commit"], pinned["file"]
    try:
        if file is not None:
            return Path(hf_hub_download(repo, file, revision=commit))
        return Path(snapshot_download(repo, revision=commit, allow_patterns=list(files), ignore_patterns=list(exclude)))
    except (OSError, ValueError) as error:  # no network, no such commit or file, no permission, no space
        message = " ".join(str(error).split())[:200]
        raise InputMissing(
            f"{key} {address} cannot be fetched ({type(error).__name__}: {message}); check the name and the network, "
            "accept its licence and set HF_TOKEN if it is gated, or fetch it elsewhere and give the path"
        ) from error
