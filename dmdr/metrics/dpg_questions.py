"""Read DPG-Bench's questions about the image of each prompt. A yes counts only if all parents have a yes.

The file is dpg_bench.csv of the ELLA repository (Apache-2.0), which DMDR does not ship.
"""

from __future__ import annotations

import csv
import graphlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dmdr.errors import DataError

COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
NO_PARENT = 0  # what the file writes where a question has no parent


@dataclass(frozen=True)
class Question:
    """A question about an image.

    number: its place among the prompt's questions. parents: the numbers of the prompt's questions whose answer must be
    yes for this one to count. category: such as "entity - whole".
    """

    number: int
    parents: tuple[int, ...]
    category: str
    text: str


class QuestionKey(NamedTuple):
    """Identifies a question: its prompt, and its number there."""

    item_id: str
    number: int


@dataclass(frozen=True)
class QuestionTable:
    """The file of questions. questions: item_id -> questions in the file's order. first: that of row 1."""

    questions: dict[str, list[Question]]
    first: QuestionKey


def read_questions(path: Path) -> QuestionTable:
    """Read the file of questions.

    Raises:
        DataError: a column is missing, a row does not parse, a question appears twice, a parent is no question of the
            same prompt, questions depend on each other in a circle, or there are no questions.
    """
    try:
        table = _read_rows(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:  # a folder, another encoding, a quote that never closes
        raise DataError(f"{path} cannot be read as CSV ({error}); give DPG-Bench's dpg_bench.csv") from error
    _check(path, table)
    return table


def _read_rows(path: Path) -> QuestionTable:
    questions: dict[str, list[Question]] = {}
    first = None
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        absent = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
        if absent:
            raise DataError(f"{path} lacks the column {', '.join(absent)}; give DPG-Bench's dpg_bench.csv")
        for row in rows:
            lost = [name for name in COLUMNS if row[name] is None]
            if lost:
                raise DataError(f"{path}, line {rows.line_num}: ends before {lost[0]}; fetch the file again")
            try:
                parents = tuple(int(each) for each in row["dependency"].split(",") if int(each) != NO_PARENT)
                number = int(row["proposition_id"])
            except ValueError as error:
                raise DataError(f"{path}, line {rows.line_num}: {error}; fetch the file again") from error
            category = row["tuple"].split("(")[0].strip()
            question = Question(number, parents, category, row["question_natural_language"])
            questions.setdefault(row["item_id"], []).append(question)
            first = first or QuestionKey(row["item_id"], number)
    if first is None:
        raise DataError(f"{path} has no questions; give DPG-Bench's dpg_bench.csv")
    return QuestionTable(questions, first)


def _check(path: Path, table: QuestionTable) -> None:
    for item, questions in table.questions.items():
        known = {each.number for each in questions}
        if len(known) < len(questions):
            raise DataError(f"{path}: {item} has a question twice; fetch the file again")
        for each in questions:
            unknown = set(each.parents) - known
            if unknown:
                raise DataError(
                    f"{path}: question {each.number} of {item} depends on {min(unknown)}, which is no question of that "
                    "prompt; fetch the file again"
                )
        try:
            graphlib.TopologicalSorter({each.number: each.parents for each in questions}).prepare()
        except graphlib.CycleError as error:
            circle = ", ".join(map(str, sorted(set(error.args[1]))))
            raise DataError(f"{path}: questions {circle} of {item} depend on each other; fetch it again") from error
