"""docs/reference/config.md: every key of a config, from its pydantic model and the comments beside its fields."""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import tokenize
import types
from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dmdr.config.run import Config
from dmdr.config.section import Section

HEAD = """\
# Config

<!-- Written by `make reference` from the code of the config. Do not edit. -->

A config is one YAML file. DMDR refuses unknown keys and impossible combinations before anything starts, and names the
key to change. Paths are relative to the folder where the command is run.
"""


def build_config_page() -> str:
    """The whole page as Markdown."""
    places: dict[type[Section], list[str]] = {}
    for place, section in collect_sections(Config, ""):
        if place not in places.setdefault(section, []):
            places[section].append(place)
    return "\n".join([HEAD, *(_describe_section(section, at, places) for section, at in places.items())])


def collect_sections(section: type[Section], place: str) -> Iterator[tuple[str, type[Section]]]:
    """Every section with the dotted keys where it stands, outer ones first."""
    yield place, section
    for name, field in section.model_fields.items():
        for inner, suffix in _list_sections(field.annotation, ""):
            yield from collect_sections(inner, f"{place}.{name}{suffix}".removeprefix("."))


def _list_sections(annotation: object, suffix: str) -> Iterator[tuple[type[Section], str]]:
    """The sections that a type holds; the entries of a mapping have names of their own."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, Section):
            yield annotation, suffix
        return
    is_mapping = getattr(annotation, "__origin__", None) is dict
    for each in get_args(annotation):
        yield from _list_sections(each, f"{suffix}.NAME" if is_mapping else suffix)


def _describe_section(section: type[Section], at: list[str], places: dict[type[Section], list[str]]) -> str:
    bases = [base for base in section.__mro__[1:] if base in places]
    inherited = {name for base in bases for name in base.model_fields}
    text = "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(section) or "").split("\n\n"))
    parts = [f"## {_name_section(section, at)}\n", f"{text}\n"]
    if inherited:
        parts.append(f"All keys of {', '.join(_link(base, places, places[base][0]) for base in bases)}, and:\n")
    shapes, comments = section.model_json_schema()["properties"], read_comments(section)
    rows = []
    for name, field in section.model_fields.items():
        if name not in inherited:
            inner = [_link(each, places, name) for each, _ in _list_sections(field.annotation, "")]
            values = f"see {' or '.join(inner)}" if inner else _name_type(shapes[name])
            rows.append([f"`{name}`", values, _name_default(field), comments[name].replace("None:", "`null`:")])
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([*parts, "| key | value | default | meaning |", "|---|---|---|---|", *lines, ""])


def _name_section(section: type[Section], at: list[str]) -> str:
    """The heading of a section."""
    if at == [""]:
        return "The top of the file"
    names = [f"`{place}`" for place in at]
    if algorithm := section.model_fields.get("algorithm"):
        names.append(f"`algorithm: {get_args(algorithm.annotation)[0]}`")
    return ", ".join(names)


def _link(section: type[Section], places: dict[type[Section], list[str]], words: str) -> str:
    """A link to a section; to an algorithm, in its own name."""
    heading, algorithm = _name_section(section, places[section]), section.model_fields.get("algorithm")
    anchor = re.sub(r"[^\w\s-]", "", heading).lower().replace(" ", "-")
    return f"[{get_args(algorithm.annotation)[0] if algorithm else words}](#{anchor})"


def read_comments(section: type[Section]) -> dict[str, str]:
    """What the source says above or beside each field, of the section's bases too."""
    found: dict[str, str] = {}
    for each in reversed(section.__mro__):
        if issubclass(each, Section) and each is not Section:
            found |= _read_own_comments(inspect.getsource(each))
    return found


def _read_own_comments(source: str) -> dict[str, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    alone = {number for number in comments if source.splitlines()[number - 1].lstrip().startswith("#")}
    found = {}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            lines = [comments[number] for number in range(first, (node.end_lineno or first) + 1) if number in comments]
            found[node.target.id] = " ".join(lines)
    return found


def _name_type(shape: dict[str, object]) -> str:
    """The values that a key takes, in words."""
    if "anyOf" in shape:
        kinds = [_name_type(each) for each in shape["anyOf"] if each.get("type") != "null"]  # type: ignore[attr-defined]
        return " or ".join(dict.fromkeys(kinds))
    if "const" in shape:
        return f"`{shape['const']}`"
    if "enum" in shape:
        return ", ".join(f"`{value}`" for value in shape["enum"])  # type: ignore[attr-defined]
    if shape["type"] == "array":
        inner = shape.get("items") or shape.get("prefixItems", [{"type": "string"}])[0]  # type: ignore[index]
        return f"list: {_name_type(inner)}"  # type: ignore[arg-type]
    if shape["type"] == "object":
        return f"names with: {_name_type(shape.get('additionalProperties', {'type': 'string'}))}"  # type: ignore[arg-type]
    kind = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`", "string": "text"}[
        str(shape["type"])
    ]
    return f"{kind}{_name_limits(shape)}"


def _name_limits(shape: dict[str, object]) -> str:
    words = {
        "minimum": "from {} on",
        "exclusiveMinimum": "above {}",
        "maximum": "up to {}",
        "exclusiveMaximum": "below {}",
    }
    limits = [text.format(f"{shape[name]:g}") for name, text in words.items() if name in shape]
    return f" {', '.join(limits)}" if limits else ""


def _name_default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel) or value in (None, {}, ()):
        return ""
    if isinstance(value, str):
        return f"`{value}`"
    return f"`{json.dumps(value, default=lambda each: each.model_dump(exclude_none=True))}`"
