"""Plans the runs of a table: one for every seed, row and variant, each with a config of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from dmdr.config.changes import ConfigData, apply_changes
from dmdr.config.load import read_mapping, validate
from dmdr.config.run import Config
from dmdr.config.stages import StageName
from dmdr.errors import ConfigError
from stages.reports.tables.spec import Changes, Row, Spec, Variant

FIGURES = {
    "lab-checker": ("strict", "soft"),
    "fashion-judge": ("strict", "color", "class"),
    "geneval": ("geneval",),
    "dpg-bench": ("dpg-bench",),
    "lpips": ("diversity/lpips-vgg16",),
}  # metric -> its figures; a reward is a figure of its own name
OWN_KEYS = {"run", "seed", "evaluate.models"}  # the table sets them in each config


@dataclass(frozen=True)
class Run:
    """One run of a table. path: of its config file, which `dmdr run` reads as well."""

    name: str
    row: Row
    variant: Variant | None
    seed: int
    config: Config
    path: Path

    @property
    def stages(self) -> tuple[StageName, ...]:
        """The stages that have to be sealed for its row, in data order."""
        return tuple(stage for stage in self.row.stages if stage in self.config.stages)


def plan_runs(spec: Spec, folder: Path, *, seeds: Iterable[int] | None = None, base: str | None = None) -> list[Run]:
    """Plan all runs, seed by seed, and write their configs into `folder`.

    seeds, base: replace the table's own. The names of the runs then hold the name of the other base's run.

    Raises:
        InputMissing: there is no base config.
        ConfigError: a row is not a valid config, or does not measure the figures that the table shows.
    """
    data = read_mapping(base or spec.base, "config", "correct the table's base, or --base")
    validate(data, Config, f"config {base or spec.base}")
    beginning = f"{spec.runs}-{data['run']}" if base else spec.runs
    runs = []
    for seed in dict.fromkeys(spec.seeds if seeds is None else seeds):
        for row in (row for row in spec.rows if row.stages):
            for variant in spec.all_variants:
                names = [beginning, row.name, *([variant.name] if variant else []), f"seed{seed}"]
                own = {"run": "-".join(names), "seed": seed, "evaluate.models": [row.model]}
                changes = {**_collect_changes(spec, row, variant), **own}
                runs.append(_build_run(spec, folder, row, variant, apply_changes(data, changes, f"row {row.name}")))
    return runs


def _collect_changes(spec: Spec, row: Row, variant: Variant | None) -> Changes:
    """The table's, the row's and the variant's; the later ones win."""
    changes = {**spec.changes, **row.changes, **(variant.changes if variant else {})}
    for key in OWN_KEYS & changes.keys():
        raise ConfigError(f"row {row.name} of {spec.table} changes {key}, which the table sets itself")
    return changes


def _build_run(spec: Spec, folder: Path, row: Row, variant: Variant | None, data: ConfigData) -> Run:
    """Check one run's config and write it into `folder`."""
    config = validate(data, Config, f"row {row.name} of {spec.table}")
    measured = list_figures(config)
    for column in spec.columns:
        if column.metric not in measured:
            raise ConfigError(
                f"{spec.table} shows {column.metric}, which row {row.name} does not measure; it has "
                f"{', '.join(measured)}: correct columns, or evaluate in changes"
            )
    path = folder / f"{config.run}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f"# Row {row.name} of {spec.table}, seed {config.seed}; written by dmdr tables. Alone: dmdr run {path}\n"
    path.write_text(head + yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return Run(config.run, row, variant, config.seed, config, path)


def list_figures(config: Config) -> list[str]:
    """The figures that evaluate will measure."""
    metrics = config.evaluate.metrics
    figures = [figure for metric in metrics for figure in FIGURES.get(metric, (metric,))]
    if config.evaluate.seeds > 1:
        trained_on = config.trained_rewards if "student" in config.evaluate.models else {}
        held_out = [metric for metric in metrics if metric not in FIGURES and metric not in trained_on]
        figures += ["diversity/pixels", *(f"diversity/{metric}" for metric in held_out)]
    return figures
