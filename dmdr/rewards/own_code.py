"""Find and import the code of a user's reward: a class in a file, or an entry point of an installed package. No torch.

Importing runs the code. That happens only for what the config or the command line names, in the process that needs it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path

from dmdr.config.own_rewards import OwnReward
from dmdr.config.plain_text import to_line
from dmdr.errors import USER_ERRORS, ConfigError, DataError, InputMissing

GROUP = "dmdr.rewards"  # of entry points


def digest_code(name: str, reward: OwnReward) -> str:
    """The sha256 of the file with the reward's class; of an entry point, with the version of its package. Imports
    nothing but the packages that an entry point lies in.

    Raises:
        InputMissing: the file or the entry point is not there.
    """
    if reward.file is not None:
        return _hash_file(find_file(name, reward))
    assert reward.entry_point is not None, "a service tells its own digest"
    point = find_entry_point(name, reward.entry_point)
    try:
        spec = importlib.util.find_spec(point.module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise InputMissing(f"rewards.{name}: {point.value} of the entry point {point.name} is not installed here")
    assert point.dist is not None, "it comes from an installed package"
    package = point.dist.name, point.dist.version
    return hashlib.sha256(f"{package} {_hash_file(Path(spec.origin))}".encode()).hexdigest()


def find_file(name: str, reward: OwnReward) -> Path:
    """The file of a reward.

    Raises:
        InputMissing: there is none.
    """
    path, _ = reward.split_file()
    if not Path(path).is_file():
        raise InputMissing(
            f"rewards.{name}.file: {path} is not a file here ({Path.cwd()}); name one, or begin with dmdr init reward"
        )
    return Path(path)


def find_entry_point(name: str, entry_point: str) -> EntryPoint:
    """The entry point of that name.

    Raises:
        InputMissing: no package that is installed here has it.
        ConfigError: several packages have it.
    """
    points = importlib.metadata.entry_points(group=GROUP)
    found = [point for point in points if point.name == entry_point]
    if not found:
        known = ", ".join(sorted({point.name for point in points})) or "none"
        raise InputMissing(
            f"rewards.{name}.entry_point {entry_point}: no installed package has it in the group {GROUP}, which has "
            f"{known}; install the package"
        )
    if len(found) > 1:
        raise ConfigError(f"rewards.{name}.entry_point {entry_point} stands in several packages; uninstall all but one")
    return found[0]


def _hash_file(path: Path) -> str:
    """sha256 of a file as it is now: a user changes his code more often than weights, and it is small."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def list_entry_points() -> list[str]:
    """The names that installed packages have in the group."""
    return sorted({point.name for point in importlib.metadata.entry_points(group=GROUP)})


def import_code(name: str, reward: OwnReward) -> object:
    """The class of a reward. This runs the code of its file, or imports its package.

    Raises:
        InputMissing: the file or the entry point is not there.
        DataError: the code raises, or has no such class.
    """
    if reward.file is None:
        assert reward.entry_point is not None, "a service has no code here"
        point = find_entry_point(name, reward.entry_point)
        with blame_code(name, point.value):
            return point.load()
    file, (_, attribute) = find_file(name, reward), reward.split_file()
    module_name = f"dmdr_own_reward_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    with blame_code(name, str(file)):
        spec.loader.exec_module(module)
    found: object = vars(module).get(attribute)
    if found is None:
        raise DataError(f"rewards.{name}.file: {file} has no {attribute}; name a class that stands in it")
    return found


@contextmanager
def blame_code(name: str, place: str) -> Iterator[None]:
    """Turn what a user's code raises into one line that names the code and its line.

    Raises:
        DataError: the code raised. An error of ours, and too little memory, stay what they are.
    """
    try:
        yield
    except USER_ERRORS:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # of torch
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}, line {last.lineno}"
        raise DataError(
            f"the reward {name} ({place}) raised {type(error).__name__}: {to_line(error, 300)} ({where}); mend it, "
            "then try dmdr check-reward"
        ) from error
