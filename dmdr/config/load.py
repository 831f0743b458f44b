"""A config file, read strictly and checked as a whole: each complaint is one line that names the key and the remedy."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from dmdr.config.run import DPO, GRPO, Config, ReFL
from dmdr.config.section import Section
from dmdr.errors import ConfigError, InputMissing

S = TypeVar("S", bound=Section)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice."""


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"key {key!r} is given twice, again on line {node.start_mark.line + 1}; keep one")
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def load_config(path: str | Path) -> Config:
    """Read and check a config file.

    Raises:
        InputMissing: there is no such file.
        ConfigError: it is not YAML, has an unknown key, a value out of range or an impossible combination.
    """
    return validate(
        read_mapping(path, "config", "the ones that come with DMDR are in configs/"), Config, f"config {path}"
    )


def read_mapping(path: str | Path, what: str, where: str) -> dict:
    """The mapping in a YAML file. For complaints, `what` it is and `where` to look for others."""
    path = Path(path)
    if not path.is_file():
        raise InputMissing(f"{what} {path} does not exist; {where}")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} {path} is not YAML: {' '.join(str(error).split())}") from error
    except ConfigError as error:
        raise ConfigError(f"{what} {path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{what} {path} must be a mapping of sections, found {type(data).__name__}")
    return data


def validate(data: dict, kind: type[S], name: str) -> S:
    """A mapping as what it is to be; every complaint begins with `name`."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{name}: {'; '.join(_explain_error(each, kind) for each in error.errors())}") from error


ALGORITHMS = {"refl": ReFL, "dpo": DPO, "grpo": GRPO}


def _explain_error(error: dict, root: type[BaseModel]) -> str:
    """One pydantic error as one clause; an unknown key names the nearest known one."""
    loc = [part for part in error["loc"] if part not in ALGORITHMS]
    where = ".".join(map(str, loc))
    if error["type"] == "extra_forbidden":
        section = root
        for part in error["loc"][:-1]:
            if part in ALGORITHMS:
                section = ALGORITHMS[part]
            elif str(part) in section.model_fields:
                annotation = section.model_fields[str(part)].annotation
                nested = [a for a in (annotation, *getattr(annotation, "__args__", ())) if isinstance(a, type)]
                section = next((a for a in nested if issubclass(a, BaseModel)), section)
        near = difflib.get_close_matches(str(loc[-1]), section.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(section.model_fields)}"
        return f"unknown key {where}; {hint}"
    if error["type"] == "union_tag_not_found":
        return f"{where}.algorithm is missing; one of {', '.join(ALGORITHMS)}"
    if error["type"] == "union_tag_invalid":
        return f"{where}.algorithm is {error['ctx']['tag']}; one of {', '.join(ALGORITHMS)}"
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"
