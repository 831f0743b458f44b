"""Prompt sources: files, public sets by name and the lab's own lists, as a stream of records.

A record is {"prompt": text, ...}: normalised text, and beside it what the source says about it (GenEval's tag, include
and exclude, and any other plain value). A line that cannot be a prompt is named, counted and skipped.
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
GENEVAL = ("include", "exclude")  # its lists of objects; everything else that is kept is a plain value
DIRECTIONS = re.compile("[\u202a-\u202e\u2066-\u2069\ufeff]")  # bidirectional overrides and byte order marks


def named_inputs(prompts: Prompts) -> dict[str, str]:
    """Every source of a config under its name among the stage's inputs, the evaluation prompts first."""
    evaluation = {} if prompts.evaluation is None else {"evaluation": prompts.evaluation}
    return evaluation | {f"source:{index}": source for index, source in enumerate(prompts.sources)}


def public_sets_of(prompts: Prompts) -> Sets:
    """The public sets, from where the config says."""
    return FETCHED if prompts.folder is None else Sets(Path(prompts.folder))


def read_source(source: str, column: str, lines: Lines, sets: Sets = FETCHED) -> Iterator[PromptRecord]:
    """The records of a source; `lines` counts along.

    Raises:
        InputMissing: no such file, or a set that cannot be fetched.
        ConfigError: a kind of file that is not read here, one without `column`, or no such set.
        DataError: the file is empty, or more than 1 % of it is bad, or a set is not what is promised.
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
    """sha256 of a source's content. Raises, beside what `read` does, InputMissing if a file cannot be read."""
    if is_named(source):
        return public_set_files.digest_files(sets.files(source))
    if _is_list(source):
        return fingerprint(_lab_list(source))
    return public_set_files.sha256(_find_file(source))


def normalise(text: str) -> str:
    """NFC text without control characters, in one line, white space collapsed. Doing it twice changes nothing."""
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
        raise ConfigError(f"prompt source {source} must be {lists} or end in {', '.join(READERS)}, or be set:NAME")
    if not os.path.isfile(path):
        raise InputMissing(
            f"prompt source {source} is not a file, or its folder is closed to this user; correct prompts.sources or "
            "prompts.evaluation"
        )
    return path


def _read_set(source: str, lines: Lines, sets: Sets) -> Iterator[PromptRecord]:
    """The records of set:NAME, file by file. Raises DataError if they are not as many as is promised."""
    promise, found, files = sets.named(source), 0, sets.files(source)
    for each in files:
        file, path = each.file, each.path
        lines.source = f"{source} ({file.name})"
        with path.open("rb") as stream:
            rows = READERS_OF_SETS[path.suffix.lower()](stream, promise.column, lines)
            for record in _iterate_records(_iterate_items(rows, promise), lines, file.says):
                found += 1
                yield record
    lines.source = source
    if promise.rows is not None and found != promise.rows:
        raise DataError(
            f"prompt source {source} promises {promise.rows:,} prompts and {found:,} were found in "
            f"{', '.join(str(each.path) for each in files)}; replace what is not as {files[0].file.address} has it"
        )


def _iterate_items(rows: Rows, promise: NamedSet) -> Rows:
    """The rows as they are, or the first one of each item."""
    if promise.item is None:
        yield from rows
        return
    seen = set()
    for number, prompt, rest in rows:
        if (item := rest.get(promise.item)) not in seen:
            seen.add(item)
            yield number, prompt, {promise.item: item}


def _iterate_records(rows: Rows, lines: Lines, says: Mapping[str, str] | None = None) -> Iterator[PromptRecord]:
    """Check each row and make a record of it. says: what holds for every row, beside what the row says."""
    for number, prompt, rest in rows:
        try:
            record = _build_record(prompt, rest, says or {})
        except ValueError as error:
            lines.skip(number, str(error))
            continue
        lines.read += 1
        yield record


def _build_record(prompt: object, rest: Mapping[str, object], says: Mapping[str, str]) -> PromptRecord:
    """Raises ValueError with what is wrong, as a clause."""
    if not isinstance(prompt, str):
        raise ValueError("has no text in the prompt's place")
    if "\0" in prompt:
        raise ValueError("has a NUL character")
    if not (text := normalise(prompt)):
        raise ValueError("has no prompt")
    plain = {k: v for k, v in rest.items() if k in GENEVAL or v is None or isinstance(v, (str, int, float))}
    record = {**plain, "prompt": text, **says}
    try:
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("has half a surrogate pair, which is not text") from error
    except ValueError as error:
        raise ValueError("has a number that is not finite") from error
    return cast("PromptRecord", record)  # with the source's own keys, whatever they are
