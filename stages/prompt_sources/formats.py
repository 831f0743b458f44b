"""Read prompt files as numbered rows: text, JSONL, JSON, CSV, TSV and Parquet.

All formats but JSON are read in bounded memory, however long the file or a line of it is.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from dmdr.errors import ConfigError, DataError

LONGEST = 4096  # bytes of a line, without its end
MOST_BAD = 0.01  # share of the lines; with more, the file is probably not a file of prompts
MOST_REPORTED = 10  # bad lines that are reported one by one
QUOTED = re.compile(r'"((?:[^"]|"")*)"')


@dataclass
class Lines:
    """Counts the lines of a source, and reports the first bad ones by `say`."""

    source: str
    say: Callable[[str], None]
    read: int = 0
    bad: int = 0

    def skip(self, number: int, why: str, lines: int = 1) -> None:
        """Count bad lines and report them. number: of the last one; why: a clause that says what is wrong with it."""
        self.read += lines
        self.bad += lines
        if self.bad <= MOST_REPORTED:
            self.say(f"{self.source}, line {number:,}, {why}; skipped")

    def check(self) -> None:
        """Raises DataError if the source is empty or has too many bad lines."""
        if self.bad > MOST_REPORTED:
            self.say(f"{self.source}: {self.bad:,} bad lines in all")
        if self.read == 0:
            raise DataError(f"{self.source} is empty; give a file with a prompt on each line")
        if self.bad > self.read * MOST_BAD:
            raise DataError(
                f"{self.source}: {self.bad:,} of {self.read:,} lines are bad, more than {MOST_BAD:.0%}; mend the file, "
                "or correct prompts.sources, prompts.evaluation or prompts.column"
            )


Rows = Iterator[tuple[int, object, dict[str, object]]]  # line number, value of the prompt column, other columns


def _iterate_lines(file: BinaryIO, lines: Lines) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of each line. Lines that are too long or not UTF-8 are skipped and counted.

    At most LONGEST + 1 bytes are held in memory, however long a line is.
    """
    number = 0
    while raw := file.readline(LONGEST + 1):
        number += 1
        if len(raw) > LONGEST and not raw.endswith(b"\n"):
            while (more := file.readline(LONGEST)) and not more.endswith(b"\n"):
                pass
            lines.skip(number, f"is longer than {LONGEST:,} bytes")
            continue
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            lines.skip(number, "is not UTF-8")
            continue
        yield number, text.rstrip("\r\n")


def _read_text(file: BinaryIO, column: str, lines: Lines) -> Rows:
    return ((number, text, {}) for number, text in _iterate_lines(file, lines))


def _read_jsonl(file: BinaryIO, column: str, lines: Lines) -> Rows:
    for number, text in _iterate_lines(file, lines):
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            lines.skip(number, "is not JSON")
            continue
        if not isinstance(data, dict) or column not in data:
            lines.skip(number, f"has no {column!r}")
            continue
        yield number, data.pop(column), data


def _read_tsv(file: BinaryIO, column: str, lines: Lines) -> Rows:
    """Read a table whose fields are separated by tabs, even inside quotes.

    A field is quoted if it begins and ends with a quote and every quote inside it is doubled.
    """
    rows = ((number, text.split("\t")) for number, text in _iterate_lines(file, lines))
    unquoted = ((number, [_unquote(field) for field in row]) for number, row in rows)
    return _read_table(unquoted, column, lines)


def _unquote(field: str) -> str:
    quoted = QUOTED.fullmatch(field)
    return field if quoted is None else quoted[1].replace('""', '"')


def _read_csv(file: BinaryIO, column: str, lines: Lines) -> Rows:
    return _read_table(_iterate_csv(file, lines), column, lines)


def _iterate_csv(file: BinaryIO, lines: Lines) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a CSV file (RFC 4180), each with the number of its last line.

    A quoted field may hold line ends. If a quote never closes, the lines up to the longest allowed field are skipped.
    """
    last_line = 0

    def texts() -> Iterator[str]:
        nonlocal last_line
        for number, text in _iterate_lines(file, lines):
            last_line = number
            yield f"{text}\n"

    csv.field_size_limit(LONGEST)
    rows = csv.reader(texts(), strict=True)
    while True:
        before = rows.line_num
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            lines.skip(last_line, f"is not CSV ({error})", rows.line_num - before)
            continue
        yield last_line, row


def _read_table(rows: Iterator[tuple[int, list[str]]], column: str, lines: Lines) -> Rows:
    """Take the first row as the header, and yield the rows below it. Empty fields are left out."""
    _, header = next(rows, (0, []))
    if header and column not in header:
        raise ConfigError(
            f"{lines.source} has no column {column!r}, it has {', '.join(map(repr, header))}; correct prompts.column"
        )
    for number, row in rows:
        if len(row) != len(header):
            lines.skip(number, f"has {len(row)} fields instead of {len(header)}")
            continue
        fields = dict(zip(header, row, strict=True))
        yield number, fields.pop(column), {name: value for name, value in fields.items() if name and value}


def _read_parquet(file: BinaryIO, column: str, lines: Lines) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet, types
    except ImportError as error:
        raise ConfigError(f"{lines.source} is Parquet, which needs the package pyarrow; pip install pyarrow") from error
    try:
        table = parquet.ParquetFile(file)
        schema = table.schema_arrow
        if column not in schema.names:
            raise ConfigError(
                f"{lines.source} has no column {column!r}, it has {', '.join(schema.names)}; correct prompts.column"
            )
        plain_types = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
        names = [
            each.name for each in schema if each.name == column or any(matches(each.type) for matches in plain_types)
        ]
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=names):
            for row in batch.to_pylist():
                number += 1
                yield number, row.pop(column), row
    except (pyarrow.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{lines.source} is not a complete Parquet file: {error}; fetch it again") from error


def _read_json(file: BinaryIO, column: str, lines: Lines) -> Rows:
    """Read a list of prompts, or of objects with the prompt under `column`.

    A prompt without an object gets its place in the list as `index`.
    """
    try:
        data = json.load(file)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{lines.source} is not JSON ({error}); fetch it again") from error
    if not isinstance(data, list):
        raise DataError(f"{lines.source} is {type(data).__name__}, not a list; give a list of prompts")
    for number, each in enumerate(data, 1):
        if isinstance(each, dict) and column in each:
            yield number, each.pop(column), each
        else:
            yield number, each, {"index": number - 1}


READERS = {".txt": _read_text, ".jsonl": _read_jsonl, ".csv": _read_csv, ".tsv": _read_tsv, ".parquet": _read_parquet}
READERS_OF_SETS = READERS | {".json": _read_json}
