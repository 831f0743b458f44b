"""Read a config file and check all of it. An error message is one line that names the key and says what to do."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from dmdr.config.names import NAME, describe_rule
from dmdr.config.run import Config
from dmdr.config.section import Section
from dmdr.config.training import DPO, GRPO, ReFL
from dmdr.errors import ConfigError, InputMissing

SectionType = TypeVar("SectionType", bound=Section)
Mapping = dict[str, object]
SHIPPED = Path(__file__).parent / "shipped"  # the configs that come with DMDR
WHERE = f"dmdr init writes one, and the ones that come with DMDR are in {SHIPPED}"
ALGORITHMS: dict[str, type[BaseModel]] = {"refl": ReFL, "dpo": DPO, "grpo": GRPO}  # the types of joint.rl


def load_config(path: str | Path) -> Config:
    """Read and check a config file.

    Raises:
        InputMissing: there is no such file.
        ConfigError: it is not YAML, has an unknown key, a value out of range or settings that contradict each other.
    """
    data = read_mapping(path, "config", WHERE)
    return validate(data, Config, f"config {path}")


def read_mapping(path: str | Path, what: str, where: str) -> Mapping:
    """Read the mapping in a YAML file.

    what, where: for error messages: what the file is, and where such files are.

    Raises:
        InputMissing: there is no such file.
        ConfigError: it is not YAML, is not a mapping, or has a key twice.
    """
    path = Path(path)
    if not path.is_file():
        raise InputMissing(f"{what} {path} does not exist; {where}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path} is not YAML: {error}") from error
    return parse_mapping(text, f"{what} {path}")


def parse_mapping(text: str, what: str) -> Mapping:
    """The mapping that a YAML text is. Raises as `parse_yaml`, and ConfigError if it is something else."""
    data = parse_yaml(text, what)
    if not isinstance(data, dict):
        raise ConfigError(f"{what} must be a mapping of sections, found {type(data).__name__}")
    return data


def parse_yaml(text: str, what: str) -> object:
    """The value of a YAML text, by YAML 1.2: 2e-4 is a number, and off is a word.

    what: for error messages.

    Raises:
        ConfigError: it is not YAML, or has a key twice.
    """
    try:
        return YAML(typ="safe", pure=True).load(text)
    except DuplicateKeyError as error:
        raise ConfigError(f"{what}: {_explain_duplicate(error)}") from error
    except YAMLError as error:
        raise ConfigError(f"{what} is not YAML: {' '.join(str(error).split())}") from error


def validate(data: Mapping, kind: type[SectionType], name: str) -> SectionType:
    """Turn a mapping into a section. `name` is the beginning of the error message.

    Raises:
        ConfigError: the mapping is not a valid section of this kind.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{name}: {'; '.join(_explain_error(each, kind) for each in error.errors())}") from error


def _explain_duplicate(error: DuplicateKeyError) -> str:
    """Say in one clause which key a YAML file has twice."""
    key = re.search(r'found duplicate key "(.*?)"', str(error.problem))
    line = "" if error.problem_mark is None else f", again on line {error.problem_mark.line + 1}"
    return f"key {key[1] if key else ''!r} is given twice{line}; keep one of them"


def _explain_error(error: ErrorDetails, root: type[BaseModel]) -> str:
    """Say in one clause what pydantic found wrong. For an unknown key, suggest the most similar known key."""
    loc = [part for part in error["loc"] if part not in ALGORITHMS]
    where = ".".join(map(str, loc))
    match error["type"]:
        case "extra_forbidden":
            known = _find_section(error["loc"][:-1], root).model_fields
            near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
            return f"unknown key {where}; {hint}"
        case "union_tag_not_found":
            return f"{where}.algorithm is missing; set one of {', '.join(ALGORITHMS)}"
        case "union_tag_invalid":
            return f"{where}.algorithm is {error['ctx']['tag']}; set one of {', '.join(ALGORITHMS)}"
        case "missing":
            return f"{where} is missing"
        case "bool_type":
            return f"{where} is {error['input']!r}; write true or false"
        case "string_pattern_mismatch" if error["ctx"]["pattern"] == NAME:
            return f"{where} {error['input']!r} {describe_rule(str(error['input']))}"
        case "value_error":
            return str(error["ctx"]["error"])
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _find_section(keys: tuple[str | int, ...], root: type[BaseModel]) -> type[BaseModel]:
    """The section that a path of keys leads to. Where the path leads nowhere, the last section on its way."""
    section = root
    for key in map(str, keys):
        if key in ALGORITHMS:
            section = ALGORITHMS[key]
        elif key in section.model_fields:
            annotation = section.model_fields[key].annotation
            candidates = [each for each in (annotation, *get_args(annotation)) if isinstance(each, type)]
            section = next((each for each in candidates if issubclass(each, BaseModel)), section)
    return section
