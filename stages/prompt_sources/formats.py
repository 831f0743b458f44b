"""Read prompt files as numbered rows: text, JSONL, JSON, CSV, TSV and Parquet.

All formats but JSON are read in bounded memory, however long the file or a line of it is.
"""

from __future__ import annotations

import json

from dmdr.config.plain_text import to_line
from dmdr.errors import ConfigError, DataError
from stages.prompt_sources.lines import LONGEST_ROW, ByteReader, Lines, iterate_lines
from stages.prompt_sources.tables import Rows, check_columns, read_csv, read_tsv

LARGEST_JSON = 2**28  # bytes; a JSON file is read as a whole


def read_text(file: ByteReader, column: str, lines: Lines) -> Rows:
    return ((number, text, {}) for number, text in iterate_lines(file, lines) if text)


def read_jsonl(file: ByteReader, column: str, lines: Lines) -> Rows:
    def build_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if sum(name == column for name, _ in pairs) > 1:
            raise KeyError
        return dict(pairs)

    for number, text in iterate_lines(file, lines, longest=LONGEST_ROW):
        if not text:
            continue
        try:
            data = json.loads(text, object_pairs_hook=build_object)
        except KeyError:
            lines.skip(number, f"has {column!r} twice")
            continue
        except (ValueError, RecursionError):
            lines.skip(number, "is not JSON")
            continue
        if not isinstance(data, dict) or column not in data:
            lines.skip(number, f"has no {column!r}")
            continue
        yield number, data.pop(column), data


def read_json(file: ByteReader, column: str, lines: Lines) -> Rows:
    """Read a list of prompts, or of objects with the prompt under `column`.

    Raises:
        DataError: the file is no list, or larger than LARGEST_JSON.
    """
    for number, each in enumerate(_load_list(file, lines.source), 1):
        if isinstance(each, dict):
            if column not in each:
                lines.skip(number, f"has no {column!r}")
                continue
            yield number, each.pop(column), each
        else:
            yield number, each, {}


def read_json_of_set(file: ByteReader, column: str, lines: Lines) -> Rows:
    """As `read_json`. A prompt without an object gets its place in the list as `index`, which HPSv2 asks for."""
    for number, prompt, rest in read_json(file, column, lines):
        yield number, prompt, rest or {"index": number - 1}


def _load_list(file: ByteReader, source: str) -> list[object]:
    content = file.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise DataError(f"{source} is larger than {LARGEST_JSON >> 20} MiB; write it as JSONL, one object on each line")
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source} is not JSON ({error}); mend it, or fetch it again") from error
    if not isinstance(data, list):
        raise DataError(f"{source} is {type(data).__name__}, not a list; give a list of prompts, or JSONL")
    return data


def read_parquet(file: ByteReader, column: str, lines: Lines) -> Rows:
    """Read a column of text, or of bytes that are UTF-8, and beside it the columns of plain values."""
    try:
        import pyarrow
        from pyarrow import parquet, types
    except ImportError as error:
        raise ConfigError(f"{lines.source} is Parquet, which needs the package pyarrow; pip install pyarrow") from error

    def is_text(of: pyarrow.DataType) -> bool:
        return bool(types.is_string(of) or types.is_large_string(of) or types.is_string_view(of))

    def is_bytes(of: pyarrow.DataType) -> bool:
        return bool(types.is_binary(of) or types.is_large_binary(of) or types.is_binary_view(of))

    try:
        table = parquet.ParquetFile(file)
        schema = table.schema_arrow
        check_columns(schema.names, column, lines.source)
        values = {
            each.name: each.type.value_type if types.is_dictionary(each.type) else each.type
            for each in schema
            if schema.names.count(each.name) == 1
        }
        if not is_text(values[column]) and not is_bytes(values[column]):
            raise ConfigError(
                f"{lines.source}: column {column!r} holds {values[column]}, not text; correct prompts.column"
            )
        plain = (is_text, types.is_integer, types.is_floating, types.is_boolean)
        names = [name for name, of in values.items() if name == column or any(matches(of) for matches in plain)]
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=names):
            for row in batch.to_pylist():
                number += 1
                prompt = row.pop(column)
                try:
                    yield number, prompt.decode() if isinstance(prompt, bytes) else prompt, row
                except UnicodeDecodeError:
                    lines.skip(number, "is not UTF-8")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = to_line(error, 200)
        raise DataError(f"{lines.source} is not a complete Parquet file: {reason}; fetch it again") from error


READERS = {
    ".txt": read_text,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}
READERS_OF_SETS = READERS | {".json": read_json_of_set}
