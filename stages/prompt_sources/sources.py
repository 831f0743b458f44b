"""Read prompt sources as a stream of records: files, public sets by name and the lab's own lists.

A record is {"prompt": text, ...}: the normalised text of a prompt and its metadata, which are GenEval's tag, include
and exclude, and any other plain value of the source. A line that cannot be a prompt is reported, counted and skipped.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import unicodedata
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from dmdr.config.identity import fingerprint
from dmdr.config.inputs import Prompts
from dmdr.config.prompt_record import PromptRecord, is_file_name
from dmdr.errors import ConfigError, DataError
from dmdr.lab.fashion.prompts import fashion_prompts
from dmdr.lab.prompts import lab_prompts
from stages.prompt_sources import public_set_files
from stages.prompt_sources.files import find_files, find_format, open_file
from stages.prompt_sources.formats import READERS, READERS_OF_SETS
from stages.prompt_sources.lines import LONGEST, Lines
from stages.prompt_sources.public_set_files import FETCHED, Sets
from stages.prompt_sources.public_sets import NamedSet, is_named
from stages.prompt_sources.tables import Rows

WORLDS = {"lab": lab_prompts, "fashion": fashion_prompts}  # WORLD:train and WORLD:held-out
GENEVAL = ("include", "exclude")  # keys that may hold lists of objects; all others hold plain values
FILE_NAMES = ("item_id", "style")  # keys whose values become names of files, in the layout of a benchmark
DIRECTIONS = re.compile("[\u202a-\u202e\u2066-\u2069\ufeff]")  # bidirectional overrides and byte order marks


def list_inputs(prompts: Prompts) -> dict[str, str]:
    """Name of the input -> source, for every source of a config. The evaluation prompts come first."""
    evaluation = {} if prompts.evaluation is None else {"evaluation": prompts.evaluation}
    return evaluation | {f"source:{index}": source for index, source in enumerate(prompts.sources)}


def select_public_sets(prompts: Prompts) -> Sets:
    """The public sets, from the folder that the config names, or else fetched."""
    return FETCHED if prompts.folder is None else Sets(Path(prompts.folder))


def read_source(source: str, column: str, lines: Lines, sets: Sets = FETCHED) -> Iterator[PromptRecord]:
    """Yield the records of a source. `lines` counts what was read.

    Raises:
        InputMissing: the file does not exist, or a set cannot be fetched.
        ConfigError: the file has an unknown format or lacks `column`, or there is no such set.
        DataError: the file is empty, more than 1 % of its lines are bad, or a set differs from the published one.
    """
    if is_named(source):
        yield from _read_set(source, lines, sets)
    elif is_list(source):
        yield from _iterate_records(
            ((number, each["prompt"], dict(each)) for number, each in enumerate(_lab_list(source), 1)), lines
        )
    else:
        files = find_files(source, _name_lists())
        for path in files:
            lines.source = source if len(files) == 1 else f"{source} ({path.name})"
            yield from _read_file(path, column, lines)
        lines.source = source
    lines.check()


def digest_source(source: str, sets: Sets = FETCHED) -> str:
    """sha256 of a source's content. Raises what `read_source` does, and InputMissing if a file cannot be read."""
    if is_named(source):
        return public_set_files.digest_files(sets.find_files(source))
    if is_list(source):
        return fingerprint(_lab_list(source))
    digests = [public_set_files.sha256(path) for path in find_files(source, _name_lists())]
    return digests[0] if len(digests) == 1 else fingerprint(digests)


def normalise(text: str) -> str:
    """Text in NFC, on one line, without control characters, with single spaces. A second call changes nothing."""
    kept = (letter for letter in DIRECTIONS.sub("", text) if letter.isspace() or unicodedata.category(letter) != "Cc")
    return unicodedata.normalize("NFC", " ".join("".join(kept).split()))


def is_list(source: str) -> bool:
    """Whether a source is a list of the lab."""
    return source.partition(":")[0] in WORLDS and ":" in source


def _lab_list(source: str) -> tuple[PromptRecord, ...]:
    world, _, name = source.partition(":")
    try:
        return WORLDS[world](name)
    except ValueError as error:
        raise ConfigError(f"prompt source {source}: {error}") from error


def _name_lists() -> str:
    return ", ".join(f"{world}:{name}" for world in WORLDS for name in ("train", "held-out"))


def _read_file(path: Path, column: str, lines: Lines) -> Iterator[PromptRecord]:
    ending = find_format(path)
    assert ending is not None, "find_files gives no other"
    with open_file(path) as file:
        try:
            yield from _iterate_records(READERS[ending](file, column, lines), lines)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{lines.source} is not a complete gzip file: {error}; fetch it again") from error


def _read_set(source: str, lines: Lines, sets: Sets) -> Iterator[PromptRecord]:
    """Yield the records of set:NAME, file by file. Raises DataError if their number is not the published one."""
    named_set, files = sets.find(source), sets.find_files(source)
    count = 0
    for each in files:
        file, path = each.file, each.path
        lines.source = f"{source} ({file.name})"
        with path.open("rb") as stream:
            rows = READERS_OF_SETS[path.suffix.lower()](stream, named_set.column, lines)
            for record in _iterate_records(_iterate_items(rows, named_set), lines, file.metadata):
                count += 1
                yield record
    lines.source = source
    if named_set.rows is not None and count != named_set.rows:
        raise DataError(
            f"prompt source {source} should have {named_set.rows:,} prompts, but {count:,} were found in "
            f"{', '.join(str(each.path) for each in files)}; replace each file that differs from the published one "
            f"({files[0].file.address})"
        )


def _iterate_items(rows: Rows, named_set: NamedSet) -> Rows:
    """Yield every row. Of a set with several rows an item, yield only the first row of each item."""
    if named_set.item is None:
        yield from rows
        return
    seen = set()
    for number, prompt, rest in rows:
        item = rest.get(named_set.item)
        if item not in seen:
            seen.add(item)
            yield number, prompt, {named_set.item: item}


def _iterate_records(rows: Rows, lines: Lines, metadata: Mapping[str, str] | None = None) -> Iterator[PromptRecord]:
    """Check each row and yield its record. metadata: added to every record."""
    for number, prompt, rest in rows:
        try:
            record = _build_record(prompt, rest, metadata or {})
        except ValueError as error:
            lines.skip(number, str(error))
            continue
        lines.read += 1
        yield record


def _build_record(prompt: object, rest: Mapping[str, object], metadata: Mapping[str, str]) -> PromptRecord:
    """Build the record of one row. Raises ValueError with a clause that says what is wrong with the row."""
    if not isinstance(prompt, str):
        raise ValueError("has no text as its prompt")
    if "\0" in prompt:
        raise ValueError("has a NUL character")
    text = normalise(prompt)
    if not text:
        raise ValueError("has no prompt")
    values = {name: _check_value(name, value) for name, value in rest.items()}
    kept = {name: value for name, value in values.items() if value is not UNUSABLE and name == normalise(name)}
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("has half a surrogate pair, which is not text") from error
    record = {**kept, "prompt": text, **metadata}
    return cast("PromptRecord", record)  # it also has the keys of the source, which no type can name


UNUSABLE = object()  # stands for a value that a record does not keep


def _check_value(name: str, value: object) -> object:
    """A value of a record as it is kept, or UNUSABLE. It costs nothing but itself: the prompt stays.

    Text is normalised, because tables and pages show it. A number is finite. What becomes a file's name can be one.
    """
    if name in FILE_NAMES and not is_file_name(value):
        return UNUSABLE
    if name == "index" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        return UNUSABLE
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else UNUSABLE
    if isinstance(value, str):
        text = normalise(value)
        return text if _is_short(text) else UNUSABLE
    try:
        return value if name in GENEVAL and _is_short(json.dumps(value, allow_nan=False)) else UNUSABLE
    except (ValueError, RecursionError):  # a number inside is not finite
        return UNUSABLE


def _is_short(text: str) -> bool:
    """Whether it is text, without half a surrogate pair, of at most LONGEST bytes."""
    try:
        return len(text.encode()) <= LONGEST
    except UnicodeEncodeError:
        return False
