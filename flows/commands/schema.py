"""`dmdr schema`: the JSON schema of a config. Editors with a YAML language server complete and check a config by it.

The file `dmdr/config/schema.json` holds the same, because the first line of a config names a file.
"""

from __future__ import annotations

import json
from pathlib import Path

import dmdr.config
from dmdr.config.run import Config

SCHEMA = Path(dmdr.config.__file__).parent / "schema.json"


def print_schema() -> int:
    """Print the schema; returns 0."""
    print(build_schema(), end="")
    return 0


def build_schema() -> str:
    """The text of the schema."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
