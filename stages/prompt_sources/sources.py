"""Read prompt sources as a stream of records: files, public sets by name and the lab's own lists.

A record is {"prompt": text, ...}: the normalised text of a prompt and its metadata, which are GenEval's tag, include
and exclude, and any other plain value of the source. A line that cannot be a prompt is reported, counted and skipped.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from dmdr.config.identity import fingerprint
from dmdr.config.prompt_record import PromptRecord
from dmdr.config.run import Prompts
from dmdr.errors import ConfigError, DataError, InputMissing
from dmdr.lab.fashion.prompts import fashion_prompts
from dmdr.lab.prompts import lab_prompts
from stages.prompt_sources import public_set_files
from stages.prompt_sources.formats import READERS, READERS_OF_SETS, Lines, Rows
from stages.prompt_sources.public_set_files import FETCHED, Sets
from stages.prompt_sources.public_sets import NamedSet, is_named

WORLDS = {"lab": lab_prompts, "fashion": fashion_prompts}  # WORLD:train and WORLD:held-out
GENEVAL = ("include", "exclude")  # keys that may hold lists of objects; all others hold plain values
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
    elif _is_list(source):
        yield from _iterate_records(
            ((number, each["prompt"], dict(each)) for number, each in enumerate(_lab_list(source), 1)), lines
        )
    else:
        path = _find_file(source)
        with path.open("rb") as file:
            yield from _iterate_records(READERS[path.suffix.lower()](file, column, lines), lines)
    lines.check()


def digest_source(source: str, sets: Sets = FETCHED) -> str:
    """sha256 of a source's content. Raises what `read_source` does, and InputMissing if a file cannot be read."""
    if is_named(source):
        return public_set_files.digest_files(sets.find_files(source))
    if _is_list(source):
        return fingerprint(_lab_list(source))
    return public_set_files.sha256(_find_file(source))


def normalise(text: str) -> str:
    """Text in NFC, on one line, without control characters, with single spaces. A second call changes nothing."""
    kept = (letter for letter in DIRECTIONS.sub("", text) if letter.isspace() or unicodedata.category(letter) != "Cc")
    return unicodedata.normalize("NFC", " ".join("".join(kept).split()))


def _is_list(source: str) -> bool:
    return source.partition(":")[0] in WORLDS and ":" in source


def _lab_list(source: str) -> tuple[PromptRecord, ...]:
    world, _, name = source.partition(":")
    try:
        return WORLDS[world](name)
    except ValueError as error:
        raise ConfigError(f"prompt source {source}: {error}") from error


def _find_file(source: str) -> Path:
    path = Path(source)
    if path.suffix.lower() not in READERS:
        lists = ", ".join(f"{world}:{name}" for world in WORLDS for name in ("train", "held-out"))
        raise ConfigError(
            f"prompt source {source} has an unknown format; give {lists}, set:NAME or a file that ends in "
            f"{', '.join(READERS)}"
        )
    if not os.path.isfile(path):
        raise InputMissing(
            f"prompt source {source} is not a file, or this user may not open its folder; correct prompts.sources or "
            "prompts.evaluation"
        )
    return path


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
    plain = {k: v for k, v in rest.items() if k in GENEVAL or v is None or isinstance(v, (str, int, float))}
    record = {**plain, "prompt": text, **metadata}
    try:
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("has half a surrogate pair, which is not text") from error
    except ValueError as error:
        raise ValueError("has a number that is not finite") from error
    return cast("PromptRecord", record)  # it also has the keys of the source, which no type can name
