"""Configs as they should not be: one or a few changes to a config that comes with DMDR, from a seed."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

from ruamel.yaml import YAML

SHIPPED = Path(__file__).parents[2] / "configs"
VALUES: list[object] = [
    None, True, False, 0, 1, -1, 3, 10**30, -(10**99), 0.0, 0.5, 1e-320, 1e308, -2.5, "", " ", "x", "none", "auto",
    "lab:flow", "lab:train", "hub:a/b@main", "hub:a", "set:geneval", "set:no", "refl", "dpo", "grpo", "lora",
    "full", "../../..", "/", "~", "s3://bucket/x", "file:///x", "http://h/x?token=abcdef", "s3://KEY:SECRET@b",
    "\x1b[31mred", "a\nb", "\u202egnp", "\ud800", "é" * 300, "x" * 5000, [], {}, [[]], [None], ["x"] * 50,
    {"a": 1}, {"": ""}, {"path": "lab:flow"}, [1, "a", {}],
]  # fmt: skip
TEXTS = [
    "<<: 1", "<<: [*a]", "? [a, b]\n: c", "key: *nowhere", "a: &a [*a]", "!!bool maybe", "seed: !!int x",
    "run: !!binary '%%%'", "when: 2026-02-31", "run: 2026-11-29", "run: 12:30:45", "seed: 0x7f", "seed: 0o17",
    "seed: .nan", "seed: .inf", "seed: 1_000", "seed: " + "9" * 5000, "seed: 1e999", "---", "...",
    "%YAML 1.1\n---", "\t- x", "}", "]", ": :", "- a", "'", '"', "a: |", "#", "\x00", "\x07", "\ufeff", "\u2028",
    "\x85", "null: 1", "1: 2", "true: x", "~: x", "[]: x", "{}: x", "a: b: c", "key: [", "run:",
]  # fmt: skip


_read: dict[Path, dict] = {}


def mutate(generator: random.Random) -> bytes:
    """The bytes of a config file."""
    path = generator.choice(sorted(SHIPPED.glob("*.yaml")))
    text = path.read_text(encoding="utf-8")
    if generator.random() < 0.6:
        data = YAML(typ="safe", pure=True).load(text) if path not in _read else _read[path]
        _read[path] = data
        data = copy.deepcopy(data)
        for _ in range(generator.choice((1, 1, 1, 2, 5))):
            _change_value(generator, data)
        return json.dumps(data, allow_nan=True, ensure_ascii=generator.random() < 0.5).encode("utf-8", "surrogatepass")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for _ in range(generator.choice((1, 1, 2, 4))):
        _change_lines(generator, lines)
    ending = generator.choice(("\n", "\n", "\n", "\r\n", "\r"))
    data = ending.join(lines).encode()
    if generator.random() < 0.1:
        place = generator.randrange(len(data))
        data = data[:place] + bytes([generator.randrange(256)]) + data[place + generator.randrange(2) :]
    return data


def _change_value(generator: random.Random, data: dict) -> None:
    """Drop, rename or replace a value somewhere in the data."""
    places = list(_list_places(data))
    if not places:
        return
    holder, key = generator.choice(places)
    match generator.randrange(5):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[generator.choice((f"{key}s", key[:-1], key.upper(), "", "x" * 300))] = holder.pop(key)
        case 2:
            other, name = generator.choice(places)
            if name in other if isinstance(other, dict) else name < len(other):
                holder[key] = copy.deepcopy(other[name])
        case _:
            holder[key] = copy.deepcopy(generator.choice(VALUES))


def _list_places(value: object) -> list[tuple[dict | list, object]]:
    """Every place in nested data: what holds it, and the key or index there."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *_list_places(value[key])]]


def _change_lines(generator: random.Random, lines: list[str]) -> None:
    """Drop, double, indent, cut or add a line."""
    if not lines:
        return
    at = generator.randrange(len(lines))
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    match generator.randrange(7):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[at])
        case 2:
            lines[at] = generator.choice((" ", "  ", "\t")) + lines[at]
        case 3:
            lines[at] = lines[at][: generator.randrange(len(lines[at]) + 1)]
        case 4:
            lines[at] = lines[at].partition(":")[0] + ": " + generator.choice(TEXTS)
        case _:
            lines.insert(at, indent + generator.choice(TEXTS))
