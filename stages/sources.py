"""Prompt sources: text, JSONL, CSV, TSV, Parquet and the lab's own lists, as a stream of records in bounded memory.

A record is {"prompt": text, ...}: normalised text, and beside it what the source says about it (GenEval's tag, include
and exclude, and any other plain value). A line that cannot be a prompt is named, counted and skipped.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dmdr.errors import ConfigError, DataError, InputMissing
from dmdr.identity import fingerprint
from dmdr.lab.fashion.prompts import fashion_prompts
from dmdr.lab.prompts import lab_prompts

LONGEST = 4096  # bytes of a line, without its end
MOST_BAD = 0.01  # of the lines; more, and the file is not what the config says it is
NAMED = 10  # bad lines that are told one by one
WORLDS = {"lab": lab_prompts, "fashion": fashion_prompts}  # WORLD:train and WORLD:held-out
GENEVAL = ("include", "exclude")  # its lists of objects; everything else that is kept is a plain value
DIRECTIONS = re.compile("[\u202a-\u202e\u2066-\u2069\ufeff]")  # bidirectional overrides and byte order marks
QUOTED = re.compile(r'"((?:[^"]|"")*)"')


@dataclass
class Lines:
    """What became of a source's lines. `say` is told the first bad ones."""

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


Rows = Iterator[tuple[int, object, dict]]  # line number, what should be the prompt, the rest


def read(source: str, column: str, lines: Lines) -> Iterator[dict]:
    """The records of a source; `lines` counts along.

    Raises:
        InputMissing: no such file.
        ConfigError: a kind of file that is not read here, or one without `column`.
        DataError: the file is empty, or more than 1 % of it is bad.
    """
    if _is_list(source):
        yield from _records(((number, each["prompt"], each) for number, each in enumerate(_list(source), 1)), lines)
    else:
        path = _path(source)
        with path.open("rb") as file:
            yield from _records(READERS[path.suffix.lower()](file, column, lines), lines)
    lines.check()


def digest(source: str) -> str:
    """sha256 of a source's content."""
    if _is_list(source):
        return fingerprint(_list(source))
    with _path(source).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def normalise(text: str) -> str:
    """NFC text without control characters, in one line, white space collapsed. Doing it twice changes nothing."""
    kept = (letter for letter in DIRECTIONS.sub("", text) if letter.isspace() or unicodedata.category(letter) != "Cc")
    return unicodedata.normalize("NFC", " ".join("".join(kept).split()))


def _is_list(source: str) -> bool:
    return source.partition(":")[0] in WORLDS and ":" in source


def _list(source: str) -> tuple[dict, ...]:
    world, _, name = source.partition(":")
    try:
        return WORLDS[world](name)
    except ValueError as error:
        raise ConfigError(f"prompt source {source}: {error}") from error


def _path(source: str) -> Path:
    path = Path(source)
    if path.suffix.lower() not in READERS:
        lists = ", ".join(f"{world}:{name}" for world in WORLDS for name in ("train", "held-out"))
        raise ConfigError(f"prompt source {source} must be {lists} or end in {', '.join(READERS)}")
    if not path.is_file():
        raise InputMissing(f"prompt source {source} is not a file; correct prompts.sources or prompts.evaluation")
    return path


def _records(rows: Rows, lines: Lines) -> Iterator[dict]:
    """Check each row and make a record of it."""
    for number, prompt, rest in rows:
        try:
            record = _record(prompt, rest)
        except ValueError as error:
            lines.skip(number, str(error))
            continue
        lines.read += 1
        yield record


def _record(prompt: object, rest: dict) -> dict:
    """Raises ValueError with what is wrong, as a clause."""
    if not isinstance(prompt, str):
        raise ValueError("has no text in the prompt's place")
    if "\0" in prompt:
        raise ValueError("has a NUL character")
    if not (text := normalise(prompt)):
        raise ValueError("has no prompt")
    plain = {k: v for k, v in rest.items() if k in GENEVAL or v is None or isinstance(v, (str, int, float))}
    record = {**plain, "prompt": text}
    try:
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("has half a surrogate pair, which is not text") from error
    except ValueError as error:
        raise ValueError("has a number that is not finite") from error
    return record


def _lines(file: BinaryIO, lines: Lines) -> Iterator[tuple[int, str]]:
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


def _text(file: BinaryIO, column: str, lines: Lines) -> Rows:
    return ((number, text, {}) for number, text in _lines(file, lines))


def _jsonl(file: BinaryIO, column: str, lines: Lines) -> Rows:
    for number, text in _lines(file, lines):
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            lines.skip(number, "is not JSON")
            continue
        if not isinstance(data, dict) or column not in data:
            lines.skip(number, f"has no {column!r}")
            continue
        yield number, data.pop(column), data


def _tsv(file: BinaryIO, column: str, lines: Lines) -> Rows:
    """A tab always separates; a field is quoted if the quotes are its first and last character and doubled inside."""
    rows = ((number, text.split("\t")) for number, text in _lines(file, lines))
    unquoted = ((number, [QUOTED.sub(_inside, f) if QUOTED.fullmatch(f) else f for f in row]) for number, row in rows)
    return _table(unquoted, column, lines)


def _inside(quoted: re.Match) -> str:
    return quoted[1].replace('""', '"')


def _csv(file: BinaryIO, column: str, lines: Lines) -> Rows:
    return _table(_csv_rows(file, lines), column, lines)


def _csv_rows(file: BinaryIO, lines: Lines) -> Iterator[tuple[int, list[str]]]:
    """RFC 4180: a quoted field may hold line ends. A quote that never closes costs the lines of one field's length."""
    at = 0

    def texts() -> Iterator[str]:
        nonlocal at
        for at, text in _lines(file, lines):  # noqa: B007, the row's last line, for the caller
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


def _table(rows: Iterator[tuple[int, list[str]]], column: str, lines: Lines) -> Rows:
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


def _parquet(file: BinaryIO, column: str, lines: Lines) -> Rows:
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


READERS = {".txt": _text, ".jsonl": _jsonl, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}
