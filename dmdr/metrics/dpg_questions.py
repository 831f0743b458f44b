"""DPG-Bench's questions: what is asked about each prompt's image, and which answers need another one to be yes first.

The file is dpg_bench.csv of the ELLA repository (Apache-2.0), which DMDR does not ship.
"""

from __future__ import annotations

import csv
import graphlib
from dataclasses import dataclass
from pathlib import Path

from dmdr.errors import DataError

COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
OVERALL = 0  # a dependency that is none


@dataclass(frozen=True)
class Question:
    """parents: numbers of the prompt's questions that have to be answered with yes. category: as "entity - whole"."""

    number: int
    parents: tuple[int, ...]
    category: str
    text: str


def read_questions(path: Path) -> tuple[dict[str, list[Question]], tuple[str, int]]:
    """item_id -> its questions, in the file's order; and (item, question) of the file's first row.

    Raises:
        DataError: a column is missing, a row does not parse, a question stands twice, a parent is no question of its
            prompt, questions depend on each other in a circle, or it is empty.
    """
    try:
        found, first = _read_rows(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:  # a folder, another encoding, a quote that never closes
        raise DataError(f"{path} does not read as CSV ({error}); give DPG-Bench's dpg_bench.csv") from error
    _check(path, found)
    return found, first


def _read_rows(path: Path) -> tuple[dict[str, list[Question]], tuple[str, int]]:
    found: dict[str, list[Question]] = {}
    first = None
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        if absent := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
            raise DataError(f"{path} lacks the column {', '.join(absent)}; give DPG-Bench's dpg_bench.csv")
        for row in rows:
            if lost := [name for name in COLUMNS if row[name] is None]:
                raise DataError(f"{path}, line {rows.line_num}: ends before {lost[0]}; fetch the file again")
            try:
                parents = tuple(int(each) for each in row["dependency"].split(",") if int(each) != OVERALL)
                number = int(row["proposition_id"])
            except ValueError as error:
                raise DataError(f"{path}, line {rows.line_num}: {error}; fetch the file again") from error
            category = row["tuple"].split("(")[0].strip()
            found.setdefault(row["item_id"], []).append(
                Question(number, parents, category, row["question_natural_language"])
            )
            first = first or (row["item_id"], number)
    if first is None:
        raise DataError(f"{path} has no questions; give DPG-Bench's dpg_bench.csv")
    return found, first


def _check(path: Path, found: dict[str, list[Question]]) -> None:
    for item, questions in found.items():
        known = {each.number for each in questions}
        if len(known) < len(questions):
            raise DataError(f"{path}: {item} has a question twice; fetch the file again")
        for each in questions:
            if strangers := set(each.parents) - known:
                raise DataError(
                    f"{path}: question {each.number} of {item} depends on {min(strangers)}, which is none of that "
                    "prompt's; fetch the file again"
                )
        try:
            graphlib.TopologicalSorter({each.number: each.parents for each in questions}).prepare()
        except graphlib.CycleError as error:
            circle = ", ".join(map(str, sorted(set(error.args[1]))))
            raise DataError(f"{path}: questions {circle} of {item} depend on each other; fetch it again") from error
