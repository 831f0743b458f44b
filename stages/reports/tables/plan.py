"""From a table to its runs: for every seed a run of each row and variant, each with a config of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from dmdr.config.load import read_mapping, validate
from dmdr.config.run import Config
from dmdr.errors import ConfigError
from stages.reports.tables.spec import Changes, Row, Spec, Variant

FIGURES = {
    "lab-checker": ("strict", "soft"),
    "fashion-judge": ("strict", "color", "class"),
    "geneval": ("geneval",),
    "dpg-bench": ("dpg-bench",),
    "lpips": ("diversity/lpips-vgg16",),
}  # a reward's is its own name
OURS = {"run", "seed", "evaluate.models"}  # what a table sets in each config


@dataclass(frozen=True)
class Run:
    """One run of a table. path: its config, written for `dmdr run` as for us."""

    name: str
    row: Row
    variant: Variant | None
    seed: int
    config: Config
    path: Path


def plan_runs(spec: Spec, folder: Path, *, seeds: Iterable[int] | None = None, base: str | None = None) -> list[Run]:
    """All runs, seed by seed, and their configs in `folder`.

    seeds, base: in the place of the table's own. With another base its name stands in the names of the runs.

    Raises:
        InputMissing: there is no base config.
        ConfigError: a row is no config, or has not the figures that the table shows.
    """
    data = read_mapping(base or spec.base, "config", "correct the table's base, or --base")
    validate(data, Config, f"config {base or spec.base}")
    begin = f"{spec.runs}-{data['run']}" if base else spec.runs
    runs = []
    for seed in dict.fromkeys(spec.seeds if seeds is None else seeds):
        for row in (row for row in spec.rows if row.stages):
            for variant in spec.variants or (None,):
                parts = [begin, row.name, *([variant.name] if variant else []), f"seed{seed}"]
                changes = {**spec.changes, **row.changes, **(variant.changes if variant else {})}
                for key in OURS & changes.keys():
                    raise ConfigError(f"row {row.name} of {spec.table} changes {key}, which the table sets itself")
                own = {"run": "-".join(parts), "seed": seed, "evaluate.models": [row.model]}
                runs.append(
                    _build_run(spec, folder, row, variant, apply_changes(data, {**changes, **own}, f"row {row.name}"))
                )
    return runs


def apply_changes(data: dict, changes: Changes, who: str) -> dict:
    """A copy of a config's data; each value takes the place of all that stands at its dotted key.

    Raises:
        ConfigError: a key leads into something that has no keys.
    """
    data = copy.deepcopy(data)
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = data
        for depth, section in enumerate(sections, start=1):
            if place.get(section) is None:
                place[section] = {}
            place = place[section]
            if not isinstance(place, dict):
                raise ConfigError(f"{who} changes {key}, but {'.'.join(sections[:depth])} is {place!r} in the base")
        place[last] = copy.deepcopy(value)
    return data


def _build_run(spec: Spec, folder: Path, row: Row, variant: Variant | None, data: dict) -> Run:
    config = validate(data, Config, f"row {row.name} of {spec.table}")
    known = list_figures(config)
    for column in spec.columns:
        if column.metric not in known:
            raise ConfigError(
                f"{spec.table} shows {column.metric}, which row {row.name} does not measure; it has "
                f"{', '.join(known)}: correct columns, or evaluate in changes"
            )
    path = folder / f"{config.run}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f"# Row {row.name} of {spec.table}, seed {config.seed}; written by dmdr tables. Alone: dmdr run {path}\n"
    path.write_text(head + yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return Run(config.run, row, variant, config.seed, config, path)


def list_figures(config: Config) -> list[str]:
    """What evaluate will measure."""
    metrics, rl = config.evaluate.metrics, config.joint.rl
    found = [figure for metric in metrics for figure in FIGURES.get(metric, (metric,))]
    if config.evaluate.seeds > 1:
        trained_on = rl.rewards if rl and "student" in config.evaluate.models else {}
        held_out = [metric for metric in metrics if metric not in FIGURES and metric not in trained_on]
        found += ["diversity/pixels", *(f"diversity/{metric}" for metric in held_out)]
    return found
