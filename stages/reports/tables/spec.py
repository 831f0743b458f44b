"""The specification of a table: one YAML file under configs/tables, read as strictly as a config.

A row is a run of the base config with changes, and is run once for every seed. A variant is a second set of changes,
such as another number of updates: every row is run with each variant, and their columns stand side by side.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dmdr.config.load import read_mapping, validate
from dmdr.config.section import Section
from dmdr.config.stages import ModelName, StageName, list_needed

PART = r"^[a-z0-9][a-z0-9-]{0,19}$"  # of a run's name
Text = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Text, ...], Field(strict=False)]
Changes = dict[str, object]  # dotted key of a config -> its new value


class Column(Section):
    """A figure of evaluate. metric: its name in scorecard.json; label: what it is, in words."""

    metric: Text
    label: str = ""


class Row(Section):
    """One row. model: the model that is judged, or "none" for a row of the paper that DMDR does not run.

    paper: column -> the number that the paper prints; in a table with variants, variant -> column -> number.
    """

    name: str = Field(pattern=PART)
    label: Text
    model: ModelName | Literal["none"]
    changes: Changes = {}
    paper: dict[str, float | dict[str, float]] = {}

    @property
    def stages(self) -> tuple[StageName, ...]:
        """The stages that have to be sealed for it, in data order."""
        return () if self.model == "none" else (*list_needed("evaluate", [self.model]), "evaluate")


class Variant(Section):
    """A second set of changes. paper: the heading that the paper gives to these columns."""

    name: str = Field(pattern=PART)
    label: Text
    paper: str = ""
    changes: Changes = {}


class Claim(Section):
    """The paper says that the row `higher` is above the row `lower`.

    figures: each of them judges the claim. paper: the paper's columns that show it.
    of: "scores", which evaluate has for each prompt; or "curve", the mean of a column of metrics.jsonl.
    """

    claim: Text
    higher: str
    lower: str
    figures: Names = Field(min_length=1)
    of: Literal["scores", "curve"] = "scores"
    paper: Names = ()


class Curves(Section):
    """Columns of a training stage's metrics.jsonl: each becomes a chart with a curve for every row and seed."""

    stage: Literal["cold_start", "joint"]
    columns: Names = Field(min_length=1)


class Spec(Section):
    """A whole table.

    runs: how the names of its runs begin. Tables with the same rows and the same beginning share their runs.
    """

    table: Text
    title: Text
    note: str = ""
    runs: str = Field(pattern=PART)
    base: Text
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2), min_length=1, strict=False)
    changes: Changes = {}
    columns: tuple[Column, ...] = Field(min_length=1, strict=False)
    paper_columns: Names = ()
    variants: tuple[Variant, ...] = Field((), strict=False)
    rows: tuple[Row, ...] = Field(min_length=1, strict=False)
    claims: tuple[Claim, ...] = Field((), strict=False)
    curves: Curves | None = None

    @property
    def all_variants(self) -> tuple[Variant | None, ...]:
        """The variants; of a table without any, None alone."""
        return self.variants or (None,)

    @model_validator(mode="after")
    def _check_names(self) -> Spec:
        """Raises ValueError where a name is not unique, or refers to nothing."""
        _check_unique("row", [row.name for row in self.rows])
        _check_unique("variant", [variant.name for variant in self.variants])
        _check_unique("seed", [str(seed) for seed in self.seeds])
        for row in self.rows:
            self._check_paper(row)
        for claim in self.claims:
            self._check_claim(claim)
        return self

    def _check_paper(self, row: Row) -> None:
        who = f"paper of row {row.name}"
        for variant in self.all_variants:
            _check_known(paper_numbers(row, variant), self.paper_columns, who, "paper_columns")
        if self.variants:
            _check_known(row.paper, [variant.name for variant in self.variants], who, "variants")

    def _check_claim(self, claim: Claim) -> None:
        who = f"claim {claim.claim!r}"
        _check_known((claim.higher, claim.lower), [row.name for row in self.rows if row.stages], who, "rows that run")
        if claim.of == "scores":
            _check_known(claim.figures, [column.metric for column in self.columns], who, "columns")
        else:
            _check_known(claim.figures, self.curves.columns if self.curves else (), who, "curves.columns")
        _check_known(claim.paper, self.paper_columns, who, "paper_columns")


def _check_unique(what: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"a {what} is there twice: {', '.join(names)}")


def _check_known(names: Iterable[str], known: Collection[str], who: str, where: str) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known) or 'none'}"
            raise ValueError(f"{who} names {name}, which is not among the {where}; {hint}")


def paper_numbers(row: Row, variant: Variant | None) -> dict[str, float]:
    """The numbers that the paper prints for a row: column -> number.

    Raises:
        ValueError: the table has variants and the numbers are not given for each, or the other way round.
    """
    numbers = row.paper if variant is None else row.paper.get(variant.name, {})
    if not isinstance(numbers, dict) or any(isinstance(value, dict) for value in numbers.values()):
        shape = "column: number" if variant is None else "variant: {column: number}"
        raise ValueError(f"paper of row {row.name} must be {shape}")
    return {column: value for column, value in numbers.items() if not isinstance(value, dict)}


def load_spec(path: str | Path) -> Spec:
    """Read and check a table's file.

    Raises:
        InputMissing: there is no such file.
        ConfigError: it is not YAML, has an unknown key, or names a row or a column that it does not have.
    """
    return validate(
        read_mapping(path, "table", "the ones that come with DMDR are in configs/tables/"), Spec, f"table {path}"
    )
