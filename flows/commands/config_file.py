"""The config file that a command reads: a path, or the name of a config of DMDR, with or without changes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dmdr.config.changes import apply_changes, parse_changes
from dmdr.config.load import SHIPPED, WHERE, read_mapping, validate
from dmdr.config.run import Config


def find_config(text: str) -> str:
    """The path of a config file. A name without a folder and an ending may be that of a config that comes with DMDR."""
    shipped = SHIPPED / f"{text}.yaml"
    return str(shipped) if not Path(text).exists() and "/" not in text and shipped.is_file() else text


@contextmanager
def change_config(path: str, changes: Sequence[str]) -> Iterator[str]:
    """The path of a config file with changes, as long as the context lasts; `path` itself if there are none.

    changes: "key=value", where key is dotted and value is YAML.

    Raises:
        InputMissing, ConfigError: there is no such file, or with the changes it is no valid config.
    """
    if not changes:
        yield path
        return
    data = apply_changes(read_mapping(path, "config", WHERE), parse_changes(changes), "--set")
    validate(data, Config, f"config {path} with --set")
    with tempfile.TemporaryDirectory(prefix="dmdr-") as folder:
        changed = Path(folder) / Path(path).name
        changed.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")  # JSON is YAML
        yield str(changed)
