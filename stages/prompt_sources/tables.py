"""The rows of CSV and TSV files, and of their likes from spreadsheets: other separators, spaces, a line `sep=;`."""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dmdr.config.plain_text import quote, to_line
from dmdr.errors import ConfigError
from stages.prompt_sources.lines import LONGEST, LONGEST_ROW, ByteReader, Lines, iterate_lines

Rows = Iterator[tuple[int, object, dict[str, object]]]  # line number, value of the prompt column, other columns
Fields = Iterator[tuple[int, list[str]]]  # line number, fields of a row

SEPARATORS = (",", ";", "\t", "|")  # the first whose header has the prompt column
STATED = re.compile(r"sep=(.)")  # the first line of a CSV file that Excel wrote
LONGEST_FIELD = 4 * LONGEST  # bytes; as many may be lost to a quote that never closes
QUOTED = re.compile(r'"((?:[^"]|"")*)"')


def read_csv(file: ByteReader, column: str, lines: Lines) -> Rows:
    texts = iterate_lines(file, lines, longest=LONGEST_ROW)
    return _read_table(_iterate_csv(texts, column, lines), column, lines)


def read_tsv(file: ByteReader, column: str, lines: Lines) -> Rows:
    """Read a table whose fields are separated by tabs, even inside quotes.

    A field is quoted if it begins and ends with a quote and every quote inside it is doubled.
    """
    texts = iterate_lines(file, lines, longest=LONGEST_ROW)
    rows = ((number, [_unquote(field) for field in text.split("\t")]) for number, text in texts if text)
    return _read_table(rows, column, lines)


def _unquote(field: str) -> str:
    quoted = QUOTED.fullmatch(field)
    return field if quoted is None else quoted[1].replace('""', '"')


@dataclass(frozen=True)
class Layout:
    """How the fields of a CSV file are separated. is_spaced: by the separator and a space."""

    separator: str
    is_spaced: bool


def _iterate_csv(texts: Iterator[tuple[int, str]], column: str, lines: Lines) -> Fields:
    """Yield the rows of a CSV file (RFC 4180), each with the number of its last line.

    A quoted field may hold line ends. If a quote never closes, the lines up to the longest allowed field are skipped.
    """
    texts = itertools.dropwhile(lambda each: not each[1], texts)
    first = next(texts, None)
    if first is None:
        return
    stated = STATED.fullmatch(first[1])
    if stated is not None:
        layout = Layout(stated[1], is_spaced=False)
    else:
        layout = _find_layout(first[1], column)
        texts = itertools.chain([first], texts)
    last_line = 0

    def follow() -> Iterator[str]:
        nonlocal last_line
        for number, text in texts:
            last_line = number
            yield f"{text}\n"

    csv.field_size_limit(LONGEST_FIELD)
    rows = csv.reader(follow(), strict=True, delimiter=layout.separator, skipinitialspace=layout.is_spaced)
    while True:
        before = rows.line_num
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            lines.skip(last_line, f"is not CSV ({error})", rows.line_num - before)
            continue
        if row:  # a blank line has no field
            yield last_line, row


def _find_layout(header: str, column: str) -> Layout:
    """The layout in which the header names the column; commas, if there is none."""
    for separator in SEPARATORS:
        names = header.split(separator)
        if column in (_unquote(name.strip()) for name in names):
            return Layout(separator, any(name.startswith(" ") for name in names[1:]))
    return Layout(SEPARATORS[0], is_spaced=False)


def _read_table(rows: Fields, column: str, lines: Lines) -> Rows:
    """Take the first row as the header, and yield the rows below it. Empty fields are left out.

    Raises:
        ConfigError: the header does not have the column, or has it twice.
    """
    _, header = next(rows, (0, []))
    header = [name.strip() for name in header]
    if header:
        check_columns(header, column, lines.source)
    names = [name if header.count(name) == 1 else "" for name in header]
    for name, count in Counter(header).items():
        if name and count > 1:
            lines.say(f"{lines.source} has the column {quote(name)} {count} times; it is left out")
    place = header.index(column) if header else 0
    for number, row in rows:
        if len(row) != len(header):
            lines.skip(number, f"has {len(row)} fields instead of {len(header)}")
            continue
        others = ((name, value) for name, value in zip(names, row, strict=True) if name != column)
        yield number, row[place], {name: value for name, value in others if name and value}


def check_columns(names: Sequence[str], column: str, source: str) -> None:
    """Raises ConfigError if a table does not have exactly one column of that name."""
    if column not in names:
        raise ConfigError(
            f"{source} has no column {column!r}, it has {to_line(', '.join(map(quote, names)), 300)}; correct "
            "prompts.column"
        )
    if names.count(column) > 1:
        raise ConfigError(f"{source} has the column {column!r} {names.count(column)} times; rename all but one")
