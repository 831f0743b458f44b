"""Read a config file strictly and check it as a whole: each complaint is one line that names the key and the remedy."""

from __future__ import annotations

import difflib
import re
import warnings
from pathlib import Path
from typing import TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MantissaNoDotYAML1_1Warning, YAMLError

from dmdr.config.run import DPO, GRPO, Config, ReFL
from dmdr.config.section import Section
from dmdr.errors import ConfigError, InputMissing

S = TypeVar("S", bound=Section)
Mapping = dict[str, object]
ALGORITHMS: dict[str, type[BaseModel]] = {"refl": ReFL, "dpo": DPO, "grpo": GRPO}  # joint.rl is one of them, by its tag


def load_config(path: str | Path) -> Config:
    """Read and check a config file.

    Raises:
        InputMissing: there is no such file.
        ConfigError: it is not YAML, has an unknown key, a value out of range or an impossible combination.
    """
    data = read_mapping(path, "config", "the ones that come with DMDR are in configs/")
    return validate(data, Config, f"config {path}")


def read_mapping(path: str | Path, what: str, where: str) -> Mapping:
    """The mapping in a YAML file.

    what, where: for complaints, what the file is and where to find others.

    Raises:
        InputMissing: there is no such file.
        ConfigError: it is not YAML, holds no mapping, or gives a key twice.
    """
    path = Path(path)
    if not path.is_file():
        raise InputMissing(f"{what} {path} does not exist; {where}")
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", MantissaNoDotYAML1_1Warning
            )  # 1e-4 is a number here, whatever YAML 1.1 says
            data = yaml.load(path.read_text(encoding="utf-8"))
    except DuplicateKeyError as error:
        raise ConfigError(f"{what} {path}: {_explain_duplicate(error)}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{what} {path} must be a mapping of sections, found {type(data).__name__}")
    return data


def validate(data: Mapping, kind: type[S], name: str) -> S:
    """Turn a mapping into a section; every complaint begins with `name`.

    Raises:
        ConfigError: the mapping is no such section.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{name}: {'; '.join(_explain_error(each, kind) for each in error.errors())}") from error


def _explain_duplicate(error: DuplicateKeyError) -> str:
    """A key that a YAML file gives twice, as one clause."""
    key = re.search(r'found duplicate key "(.*?)"', str(error.problem))
    line = "" if error.problem_mark is None else f", again on line {error.problem_mark.line + 1}"
    return f"key {key[1] if key else ''!r} is given twice{line}; keep one"


def _explain_error(error: ErrorDetails, root: type[BaseModel]) -> str:
    """One pydantic error as one clause; an unknown key names the nearest known one."""
    loc = [part for part in error["loc"] if part not in ALGORITHMS]
    where = ".".join(map(str, loc))
    match error["type"]:
        case "extra_forbidden":
            known = _find_section(error["loc"][:-1], root).model_fields
            near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
            return f"unknown key {where}; {hint}"
        case "union_tag_not_found":
            return f"{where}.algorithm is missing; one of {', '.join(ALGORITHMS)}"
        case "union_tag_invalid":
            return f"{where}.algorithm is {error['ctx']['tag']}; one of {', '.join(ALGORITHMS)}"
        case "missing":
            return f"{where} is missing"
        case "value_error":
            return str(error["ctx"]["error"])
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _find_section(keys: tuple[str | int, ...], root: type[BaseModel]) -> type[BaseModel]:
    """The section that a path of keys leads to; the last one known on the way where it leads nowhere."""
    section = root
    for key in map(str, keys):
        if key in ALGORITHMS:
            section = ALGORITHMS[key]
        elif key in section.model_fields:
            annotation = section.model_fields[key].annotation
            candidates = [each for each in (annotation, *get_args(annotation)) if isinstance(each, type)]
            section = next((each for each in candidates if issubclass(each, BaseModel)), section)
    return section
