"""The config that a flow run is given: the path of a file, an address in a store, or the text of the YAML itself.

A worker sees other files than the person who starts a run. Text and address travel with the run. A path may name a file
of a ConfigMap that was created a moment ago: a node shows it in its pods a minute or two later, so it is waited for.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dmdr.config.load import load_config, parse_mapping, validate
from dmdr.config.run import Config
from dmdr.errors import ConfigError, InputMissing
from stages.store.address import open_place

WAIT = 180.0  # seconds that a file may take to appear; a ConfigMap was seen to take 95
PAUSE = 1.0  # seconds between two looks
LARGEST = 2**18  # bytes; Kubernetes' limit for the annotations of an object, in which a Job carries it


@contextmanager
def open_config(given: str, say: Callable[[str], None], *, wait: float) -> Iterator[str]:
    """The path of a file with the config, checked, as long as the context lasts.

    wait: the seconds that a file may take to appear. say: gets a line if it is waited for.

    Raises:
        InputMissing: there is no such file, or nothing at that address.
        ConfigError: it is no valid config, or too large.
        StoreError: the store of an address does not answer.
    """
    if _is_path(given):
        wait_for_file(Path(given.removeprefix("file://")), say, seconds=wait)
        load_config(given.removeprefix("file://"))
        yield given.removeprefix("file://")
        return
    text = _read_text(given)
    _parse(text, given)
    with tempfile.TemporaryDirectory(prefix="dmdr-") as folder:
        file = Path(folder, "config.yaml")
        file.write_text(text, encoding="utf-8")
        yield str(file)


def read_config(given: str) -> Config:
    """Read and check the config that a flow run is given, without waiting. Raises as `open_config`."""
    if _is_path(given):
        return load_config(given.removeprefix("file://"))
    return _parse(_read_text(given), given)


def wait_for_file(path: Path, say: Callable[[str], None], *, seconds: float) -> None:
    """Return when a file is there, or after `seconds`. Says so once if it is waited for."""
    until = time.monotonic() + seconds
    if path.exists() or not seconds:
        return
    say(f"waiting up to {seconds:g} s for {path}: a new file of a ConfigMap takes a minute or two to show here")
    while not path.exists() and time.monotonic() < until:
        time.sleep(PAUSE)


def _is_path(given: str) -> bool:
    return not _is_text(given) and "://" not in given.removeprefix("file://")


def _is_text(given: str) -> bool:
    return "\n" in given or given.lstrip().startswith("{")


def _describe(given: str) -> str:
    return "the text given as config" if _is_text(given) else f"config {given}"


def _parse(text: str, given: str) -> Config:
    return validate(parse_mapping(text, _describe(given)), Config, _describe(given))


def _read_text(given: str) -> str:
    """The YAML that a text is, or that lies at an address."""
    data = given.encode(errors="replace") if _is_text(given) else _read_address(given)
    if len(data) > LARGEST:
        raise ConfigError(
            f"{_describe(given)} has more than {LARGEST:,} bytes, which no config needs and no Job can carry; is it "
            "another file?"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{_describe(given)} is not YAML: {error}") from error


def _read_address(address: str) -> bytes:
    folder, _, name = address.rpartition("/")
    if not name or folder.endswith(":/"):
        raise ConfigError(f"config {address} is not the address of a file; give s3://BUCKET/PREFIX/my-run.yaml")
    data = open_place(folder).read_range(name, 0, LARGEST + 1)
    if data is None:
        raise InputMissing(f"config {address} does not exist; aws s3 cp my-run.yaml {address}")
    return data
