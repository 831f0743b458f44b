"""`dmdr schema`: the JSON schema of a config. Editors with a YAML language server complete and check a config by it.

1. What the code says about a setting in a comment, above it or behind it, is the description that an editor shows.
2. The file `dmdr/config/schema.json` holds the same, because the first line of a config names a file.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from pathlib import Path

import dmdr.config
from dmdr.config.run import Config
from dmdr.config.section import Section

SCHEMA = Path(dmdr.config.__file__).parent / "schema.json"


def print_schema() -> int:
    """Print the schema; returns 0."""
    print(build_schema(), end="")
    return 0


def build_schema() -> str:
    """The text of the schema."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    modules = {sys.modules[name] for name in list_modules(Section) if name.startswith(f"{dmdr.config.__name__}.")}
    comments = {name: found for each in modules for name, found in read_comments(inspect.getsource(each)).items()}
    for name, section in {**schema["$defs"], Config.__name__: schema}.items():
        for field, comment in comments.get(name, {}).items():
            if field in section["properties"]:
                section["properties"][field]["description"] = comment
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def list_modules(section: type[Section]) -> set[str]:
    """The names of the modules that define a section, and all sections that follow from it."""
    return {section.__module__}.union(*map(list_modules, section.__subclasses__()))


def read_comments(source: str) -> dict[str, dict[str, str]]:
    """Class -> field -> its comment, of the Python source of a module: above the field, or else behind it."""
    lines = source.splitlines()
    return {
        section.name: {
            field.target.id: comment
            for field in section.body
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            if (comment := _read_above(lines, field.lineno) or _read_behind(lines, field))
        }
        for section in ast.parse(source).body
        if isinstance(section, ast.ClassDef)
    }


def _read_above(lines: list[str], number: int) -> str:
    """The comment lines right above a line. number: of the line, from 1 on."""
    found: list[str] = []
    for line in reversed(lines[: number - 1]):
        if not line.strip().startswith("#"):
            break
        found.insert(0, line.strip().lstrip("# "))
    return " ".join(found)


def _read_behind(lines: list[str], field: ast.AnnAssign) -> str:
    """The comment behind a field. The rest of the line after its code has nothing else."""
    assert field.end_lineno is not None and field.end_col_offset is not None
    rest = lines[field.end_lineno - 1].encode()[field.end_col_offset :].decode()
    return rest.strip().lstrip("# ")
