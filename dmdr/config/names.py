"""Names of runs, teachers and promoted results. No pydantic: the command line needs this file quickly."""

from __future__ import annotations

import re

NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"  # of a run; it becomes part of paths and of Kubernetes labels
RULE = "small letters, digits, '.', '_' and '-', at most 63 of them, the first a letter or a digit"


def is_name(text: str) -> bool:
    return re.fullmatch(NAME, text) is not None


def describe_rule(text: str) -> str:
    """What a name may consist of, and a name like `text` that is allowed, if one can be made of it."""
    near = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("._-")[:63]
    return f"must be {RULE}" + (f", for example {near}" if near else "")
