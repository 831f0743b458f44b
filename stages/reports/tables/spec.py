"""What a table is: one YAML file under configs/tables, read as strictly as a config.

A row is a run of the base config with changes; every seed runs every row. A variant is a second set of changes that
every row is run with, such as another number of updates; its columns stand beside each other.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dmdr.config.load import read_mapping, validate
from dmdr.config.section import Section
from dmdr.config.stages import ModelName, StageName, list_needed

PART = r"^[a-z0-9][a-z0-9-]{0,19}$"  # of a run's name
Text = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Text, ...], Field(strict=False)]
Changes = dict[str, object]  # dotted key of a config -> what takes the place of what stands there


class Column(Section):
    """A figure of evaluate under the name that scorecard.json has. label: what it is, in words."""

    metric: Text
    label: str = ""


class Row(Section):
    """One line. model: whose images it shows; none is a line that the paper has and DMDR does not run."""

    name: str = Field(pattern=PART)
    label: Text
    model: ModelName | Literal["none"]
    changes: Changes = {}
    paper: dict[str, float | dict[str, float]] = {}  # column -> number; with variants, variant -> column -> number

    @property
    def stages(self) -> tuple[StageName, ...]:
        """The stages that have to be sealed for it, in data order."""
        return () if self.model == "none" else (*list_needed("evaluate", [self.model]), "evaluate")


class Variant(Section):
    """A second set of changes. paper: how the paper heads these columns."""

    name: str = Field(pattern=PART)
    label: Text
    paper: str = ""
    changes: Changes = {}


class Claim(Section):
    """The paper says that `higher` is above `lower`. figures: each judges it; paper: columns that show it there.

    of: `scores` of evaluate, prompt by prompt; or the mean of a `curve`, which is a column of metrics.jsonl.
    """

    claim: Text
    higher: str
    lower: str
    figures: Names = Field(min_length=1)
    of: Literal["scores", "curve"] = "scores"
    paper: Names = ()


class Curves(Section):
    """Columns of a training stage's metrics.jsonl that are drawn, the rows over each other."""

    stage: Literal["cold_start", "joint"]
    columns: Names = Field(min_length=1)


class Spec(Section):
    """A whole table. runs: how the names of its runs begin; tables with the same rows share their runs by it."""

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

    @model_validator(mode="after")
    def _names_are_unique_and_known(self) -> Spec:
        named = {"row": [row.name for row in self.rows], "variant": [each.name for each in self.variants]}
        for what, names in {**named, "seed": self.seeds}.items():
            if len(set(names)) < len(names):
                raise ValueError(f"a {what} is there twice: {', '.join(map(str, names))}")
        for row in self.rows:
            for variant in self.variants or (None,):
                _known(paper_numbers(row, variant), self.paper_columns, f"paper of row {row.name}", "paper_columns")
            if self.variants:
                _known(row.paper, named["variant"], f"paper of row {row.name}", "variants")
        running = [row.name for row in self.rows if row.stages]
        told = {
            "scores": ([column.metric for column in self.columns], "columns"),
            "curve": (self.curves.columns if self.curves else (), "curves.columns"),
        }
        for claim in self.claims:
            _known((claim.higher, claim.lower), running, f"claim {claim.claim!r}", "rows that run")
            known, where = told[claim.of]
            _known(claim.figures, known, f"claim {claim.claim!r}", where)
            _known(claim.paper, self.paper_columns, f"claim {claim.claim!r}", "paper_columns")
        return self


def _known(names: Iterable[str], known: Iterable[str], who: str, where: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known) or 'none'}"
            raise ValueError(f"{who} names {name}, which is not among the {where}; {hint}")


def paper_numbers(row: Row, variant: Variant | None) -> dict[str, float]:
    """The paper's numbers of a row by column.

    Raises:
        ValueError: they are not by variant, or they are where there are none.
    """
    found = row.paper if variant is None else row.paper.get(variant.name, {})
    if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
        shape = "column: number" if variant is None else "variant: {column: number}"
        raise ValueError(f"paper of row {row.name} must be {shape}")
    return {column: value for column, value in found.items() if not isinstance(value, dict)}


def load_spec(path: str | Path) -> Spec:
    """Read and check a table's file.

    Raises:
        InputMissing: there is no such file.
        ConfigError: it is not YAML, has an unknown key, or names a row or a column that it does not have.
    """
    return validate(
        read_mapping(path, "table", "the ones that come with DMDR are in configs/tables/"), Spec, f"table {path}"
    )
