"""The formats of prompt files: text, JSONL, JSON, CSV, TSV and Parquet as numbered rows.

All but JSON are read in bounded memory, however long the file or one of its lines is.
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
MOST_BAD = 0.01  # of the lines; more, and the file is not what the config says it is
NAMED = 10  # bad lines that are reported one by one
QUOTED = re.compile(r'"((?:[^"]|"")*)"')


@dataclass
class Lines:
    """Counts of a source's lines. The first bad ones are reported by `say`."""

    source: str
    say: Callable[[str], None]
    read: int = 0
    bad: int = 0

    def skip(self, number: int, why: str, lines: int = 1) -> None:
        self.read += lines
        self.bad += lines
        if self.bad <= NAMED:
            self.say(f"{self.source}, line {number:,}, {why}; skipped")

    def check(self) -> None:
        """Raises DataError if the source was empty or had too many bad lines."""
        if self.bad > NAMED:
            self.say(f"{self.source}: {self.bad:,} bad lines in all")
        if self.read == 0:
            raise DataError(f"{self.source} is empty; give a file with a prompt on each line")
        if self.bad > self.read * MOST_BAD:
            raise DataError(
                f"{self.source}: {self.bad:,} of {self.read:,} lines are bad, more than {MOST_BAD:.0%}; mend the file, "
                "or correct prompts.sources, prompts.evaluation or prompts.column"
            )


Rows = Iterator[tuple[int, object, dict[str, object]]]  # line number, what should be the prompt, the rest


def _iterate_lines(file: BinaryIO, lines: Lines) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that are text; no more than LONGEST bytes are held, however long a line is."""
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
    """A tab always separates; a field is quoted if the quotes are its first and last character and doubled inside."""
    rows = ((number, text.split("\t")) for number, text in _iterate_lines(file, lines))
    unquoted = ((number, [QUOTED.sub(_unquote, f) if QUOTED.fullmatch(f) else f for f in row]) for number, row in rows)
    return _read_table(unquoted, column, lines)


def _unquote(quoted: re.Match) -> str:
    return quoted[1].replace('""', '"')


def _read_csv(file: BinaryIO, column: str, lines: Lines) -> Rows:
    return _read_table(_iterate_csv(file, lines), column, lines)


def _iterate_csv(file: BinaryIO, lines: Lines) -> Iterator[tuple[int, list[str]]]:
    """RFC 4180: a quoted field may hold line ends. A quote that never closes costs the lines of one field's length."""
    at = 0

    def texts() -> Iterator[str]:
        nonlocal at
        for at, text in _iterate_lines(file, lines):  # noqa: B007, the row's last line, for the caller
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
            lines.skip(at, f"is not CSV ({error})", rows.line_num - before)
            continue
        yield at, row


def _read_table(rows: Iterator[tuple[int, list[str]]], column: str, lines: Lines) -> Rows:
    """Rows under a header."""
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
        raise ConfigError(f"{lines.source} needs pyarrow to be read: pip install pyarrow") from error
    try:
        table = parquet.ParquetFile(file)
        schema = table.schema_arrow
        if column not in schema.names:
            raise ConfigError(
                f"{lines.source} has no column {column!r}, it has {', '.join(schema.names)}; correct prompts.column"
            )
        plain = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
        names = [f.name for f in schema if f.name == column or any(is_kind(f.type) for is_kind in plain)]
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=names):
            for row in batch.to_pylist():
                number += 1
                yield number, row.pop(column), row
    except (pyarrow.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{lines.source} is not whole Parquet: {error}; fetch it again") from error


def _read_json(file: BinaryIO, column: str, lines: Lines) -> Rows:
    """A list of prompts, or of objects that have them. A bare prompt gets its place in the list as `index`."""
    try:
        data = json.load(file)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{lines.source} is not JSON ({error}); fetch it again") from error
    if not isinstance(data, list):
        raise DataError(f"{lines.source} is not a list but {type(data).__name__}; give a list of prompts")
    for number, each in enumerate(data, 1):
        if isinstance(each, dict) and column in each:
            yield number, each.pop(column), each
        else:
            yield number, each, {"index": number - 1}


READERS = {".txt": _read_text, ".jsonl": _read_jsonl, ".csv": _read_csv, ".tsv": _read_tsv, ".parquet": _read_parquet}
READERS_OF_SETS = READERS | {".json": _read_json}
