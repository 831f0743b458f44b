"""Fetch files from a model hub, pinned to a commit: the same files for ever. No torch."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from dmdr.errors import ConfigError, InputMissing

REMEDY = (
    "check the name and the network, accept its licence and set HF_TOKEN if it is gated, or fetch it elsewhere and "
    "give the path"
)
ADDRESS = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})(?:/(?P<file>\S+))?")


REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
TIMEOUT = 10  # seconds for an answer, when we only ask whether something is there


def is_hub(address: str) -> bool:
    return address.startswith("hub:")


def suggest_address(text: str) -> str | None:
    """What to do about a text that looks like a hub's model without its prefix or commit; None if it does not."""
    repo, _, commit = text.removeprefix("hub:").partition("@")
    if not REPOSITORY.fullmatch(repo):
        return None
    if re.fullmatch("[0-9a-f]{40}", commit):
        return f"if you mean the model on the hub, write hub:{repo}@{commit}"
    return f"if you mean the model on the hub, dmdr teachers resolve {repo} prints its address with the newest commit"


def resolve(repo: str) -> str:
    """The address of a model on the hub with its newest commit. repo: OWNER/NAME, with or without "hub:".

    Raises:
        ConfigError: it is not OWNER/NAME.
        InputMissing: the hub does not answer, or has no such model.
    """
    repo = repo.removeprefix("hub:").partition("@")[0]
    if not REPOSITORY.fullmatch(repo):
        raise ConfigError(f"{repo!r} is not OWNER/NAME; give a model of the hub, as its page is called")
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repo, timeout=TIMEOUT)
    except Exception as error:  # of the hub, of its HTTP library, of the network
        raise InputMissing(f"the hub does not say what {repo} is ({shorten(error)}); {REMEDY}") from error
    if info.sha is None:
        raise InputMissing(f"{repo} has no commit on the hub; check its name")
    return f"hub:{repo}@{info.sha}"


def shorten(error: BaseException) -> str:
    """The class and the message of a library's error, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@functools.cache
def find_problem(repo: str, commit: str, file: str | None) -> str | None:
    """Why a repository, or one file of it, cannot be fetched now; None if it can. Asks once, and fetches nothing."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    try:
        if file is None:
            HfApi().model_info(repo, revision=commit, timeout=TIMEOUT)
        else:
            get_hf_file_metadata(hf_hub_url(repo, file, revision=commit), timeout=TIMEOUT)
    except Exception as error:  # of the hub, of its HTTP library, of the network
        return shorten(error)
    return None


def is_cached(repo: str, commit: str, file: str | None) -> bool:
    """Whether the library's cache has the file, or some of the repository, at this commit."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    if file is not None:
        return isinstance(try_to_load_from_cache(repo, file, revision=commit), str)
    try:
        snapshot_download(repo, revision=commit, local_files_only=True)
    except (OSError, ValueError):
        return False
    return True


def is_available(address: str) -> bool:
    """Whether hub:OWNER/NAME@COMMIT[/FILE] is in the cache, or can be fetched now."""
    pinned = ADDRESS.fullmatch(address)
    if pinned is None:
        return False
    parts = pinned["repo"], pinned["commit"], pinned["file"]
    return is_cached(*parts) or find_problem(*parts) is None


def pin(key: str, address: str) -> re.Match[str]:
    """The parts of hub:OWNER/NAME@COMMIT[/FILE].

    Raises:
        ConfigError: no commit is pinned. key: of the config, for the message.
    """
    pinned = ADDRESS.fullmatch(address)
    if not pinned:
        hint = suggest_address(address)
        raise ConfigError(
            f"{key} {address} is not hub:OWNER/NAME@COMMIT; pin the commit, 40 hex digits, so that it stays the same"
            + (f": {hint}" if hint else "")
        )
    return pinned


def require(key: str, address: str) -> None:
    """Check that an address is in the cache or can be fetched now, and fetch nothing.

    Raises:
        ConfigError: no commit is pinned. key: of the config, for the message.
        InputMissing: it is neither.
    """
    pinned = pin(key, address)
    parts = pinned["repo"], pinned["commit"], pinned["file"]
    if not is_cached(*parts) and (problem := find_problem(*parts)) is not None:
        raise InputMissing(f"{key} {address} cannot be fetched ({problem}); {REMEDY}")


def fetch(key: str, address: str, *, files: tuple[str, ...], exclude: tuple[str, ...] = ()) -> Path:
    """Fetch hub:OWNER/NAME@COMMIT, or one file of it, hub:OWNER/NAME@COMMIT/FILE, into the library's cache.

    Where the hub does not answer, only the cache is read: the library would try again and again for half a minute.

    Args:
        key: of the config, for messages.
        files: patterns of the files to fetch if `address` is a whole repository.
        exclude: patterns of those to leave out.

    Returns: the folder of the repository, or the file, in the cache.

    Raises:
        ConfigError: no commit is pinned.
        InputMissing: the hub does not give it.
    """
    pinned = pin(key, address)
    from huggingface_hub import hf_hub_download, snapshot_download

    repo, commit, file = pinned["repo"], pinned["commit"], pinned["file"]
    offline = file is not None and is_cached(repo, commit, file)
    problem = None if offline else find_problem(repo, commit, file)
    offline = offline or problem is not None
    try:
        if file is not None:
            return Path(hf_hub_download(repo, file, revision=commit, local_files_only=offline))
        folder = snapshot_download(
            repo,
            revision=commit,
            allow_patterns=list(files),
            ignore_patterns=list(exclude),
            local_files_only=offline,
        )
        return Path(folder)
    except Exception as error:  # no network, no such commit or file, no permission, no space
        raise InputMissing(f"{key} {address} cannot be fetched ({problem or shorten(error)}); {REMEDY}") from error
