"""Changes to the data of a config: a dotted key and its new value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dmdr.config.reward_weights import OF
from dmdr.config.yaml_text import parse_yaml
from dmdr.errors import ConfigError

ConfigData = dict[str, object]  # a config as its YAML file says it
WITH_DOTS = [name for name in OF if "." in name]  # names of rewards, which a dotted key may have


def parse_changes(texts: Iterable[str]) -> dict[str, object]:
    """Changes from texts such as "joint.updates=500". A value is read as YAML.

    Raises:
        ConfigError: a text has no "=", or its value is not YAML.
    """
    changes: dict[str, object] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"--set {text} is not KEY=VALUE; give a dotted key, for example joint.updates=500")
        changes[key] = parse_yaml(value, f"--set {key}")
    return changes


def apply_changes(data: ConfigData, changes: Mapping[str, object], who: str) -> ConfigData:
    """A copy of a config's data with changes. A value replaces all that stands at its dotted key.

    Raises:
        ConfigError: a key leads into something that has no keys.
    """
    changed = {name: _copy(value) for name, value in data.items()}
    for key, value in changes.items():
        *sections, last = split_key(key)
        mapping = changed
        for depth, section in enumerate(sections, start=1):
            if mapping.get(section) is None:
                mapping[section] = {}
            inner = mapping[section]
            if not isinstance(inner, dict):
                raise ConfigError(f"{who} changes {key}, but {'.'.join(sections[:depth])} is {inner!r} in the base")
            mapping = inner
        mapping[last] = _copy(value)
    return changed


def _copy(value: object) -> object:
    """A copy in which no part stands twice, as a part with an anchor of YAML does: a change would be seen in both."""
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


def split_key(key: str) -> list[str]:
    """The parts of a dotted key. The name of a reward stays whole: weights.hpsv2.1 has two parts."""
    for name in WITH_DOTS:
        before, found, after = f"{key}.".partition(f".{name}.")
        if found:
            return [*before.split("."), name, *filter(None, after.split("."))]
    return key.split(".")
