"""Read a config file and check all of it. An error message is one line that names the key and says what to do."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dmdr.config.names import NAME, describe_rule
from dmdr.config.plain_text import LONGEST_VALUE, quote, to_line
from dmdr.config.rl import DPO, GRPO, EvolutionStrategies, ReFL, Surrogate, Weighting
from dmdr.config.run import Config
from dmdr.config.section import Section
from dmdr.config.yaml_text import parse_yaml, read_text
from dmdr.errors import ConfigError

SectionType = TypeVar("SectionType", bound=Section)
Mapping = dict[str, object]
SHIPPED = Path(__file__).parent / "shipped"  # the configs that come with DMDR
WHERE = f"dmdr init writes one, and the ones that come with DMDR are in {SHIPPED}"
MOST_TOLD, LONGEST_CLAUSE = 8, 500  # faults of a config in one message, and characters of each
ALGORITHMS: dict[str, type[BaseModel]] = {
    "refl": ReFL,
    "dpo": DPO,
    "grpo": GRPO,
    "surrogate": Surrogate,
    "es": EvolutionStrategies,
    "weighting": Weighting,
}  # the types of rl, by its algorithm


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
        ConfigError: it is not YAML, is not a mapping, has a key twice, or is larger than any such file.
    """
    return parse_mapping(read_text(path, what, where), f"{what} {path}")


def parse_mapping(text: str, what: str) -> Mapping:
    """The mapping that a YAML text is. Raises as `parse_yaml`, and ConfigError if it is something else."""
    data = parse_yaml(text, what)
    if data is None:
        raise ConfigError(f"{what} is empty; it must be a mapping of sections")
    if not isinstance(data, dict):
        raise ConfigError(f"{what} must be a mapping of sections, found {type(data).__name__}")
    return data


def validate(data: Mapping, kind: type[SectionType], name: str) -> SectionType:
    """Turn a mapping into a section. `name` is the beginning of the error message.

    Raises:
        ConfigError: the mapping is not a valid section of this kind.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        told = [to_line(_explain_error(each, kind), LONGEST_CLAUSE) for each in errors[:MOST_TOLD]]
        rest = [f"and {len(errors) - MOST_TOLD:,} more"] if len(errors) > MOST_TOLD else []
        raise ConfigError(f"{name}: {'; '.join([*told, *rest])}") from None  # pydantic's own text repeats the values


def _explain_error(error: ErrorDetails, root: type[BaseModel]) -> str:
    """Say in one clause what pydantic found wrong. For an unknown key, suggest the most similar known key."""
    loc = [part for part in error["loc"] if part not in ALGORITHMS]
    where = to_line(".".join(map(str, loc)), LONGEST_VALUE)
    match error["type"]:
        case "extra_forbidden":
            known = _find_section(error["loc"][:-1], root).model_fields
            near = difflib.get_close_matches(str(loc[-1])[:LONGEST_VALUE], known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
            return f"unknown key {where}; {hint}"
        case "union_tag_not_found":
            return f"{where}.algorithm is missing; set one of {', '.join(ALGORITHMS)}"
        case "union_tag_invalid":
            tag = to_line(error["ctx"]["tag"], LONGEST_VALUE)
            return f"{where}.algorithm is {tag}; set one of {', '.join(ALGORITHMS)}"
        case "missing":
            return f"{where} is missing"
        case "bool_type":
            return f"{where} is {quote(error['input'])}; write true or false"
        case "string_pattern_mismatch" if error["ctx"]["pattern"] == NAME:
            return f"{where} {quote(error['input'])} {describe_rule(str(error['input'])[:LONGEST_CLAUSE])}"
        case "value_error" if isinstance(error["input"], str):  # of one value, which the message leaves out
            return f"{where}: {error['ctx']['error']}"
        case "value_error":
            told = str(error["ctx"]["error"])  # what the two training stages share names the settings of joint
            return told.replace("joint.", "cold_start.") if loc[:1] == ["cold_start"] else told
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, got {quote(error['input'])}"


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
