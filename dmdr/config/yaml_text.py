"""Read YAML that a user gives. What would cost much to read is refused before it costs anything.

1. YAML 1.2: 2e-4 is a number, and off is a word. A date is a word too: no setting is one.
2. Size, keys, depth and digits are bounded. An alias counts as what it stands for, so that a few lines cannot stand for
   a million.
3. Of tags, only those of JSON's kinds mean anything here.
"""

from __future__ import annotations

import codecs
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    Event,
    ScalarEvent,
)

from dmdr.config.plain_text import to_line
from dmdr.errors import ConfigError, InputMissing

LARGEST = 100_000  # bytes; the largest config of DMDR has 5,000
MOST_VALUES, DEEPEST, MOST_DIGITS = 3000, 32, 100
DEEP = re.compile(rf"([\[{{]\s*){{{DEEPEST + 1}}}")  # brackets that open in a row, which the library reads slowly
PREFIX = "tag:yaml.org,2002:"
TAGS = {f"{PREFIX}{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq")}
NUMBER = re.compile(r"[-+]?(0x[0-9a-f_]+|0o[0-7_]+|[0-9_.]+(e[-+]?[0-9]+)?)", re.IGNORECASE)
SURROGATE = re.compile("[\ud800-\udfff]")  # which YAML can write as \ud800, and UTF-8 cannot
# the longer marks first, because that of UTF-32 begins with that of UTF-16
OTHER_ENCODINGS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"))


class Constructor(SafeConstructor):
    """Builds values as the safe one does, and leaves dates as they are written."""


Constructor.add_constructor(f"{PREFIX}timestamp", SafeConstructor.construct_yaml_str)


def read_text(path: str | Path, what: str, where: str) -> str:
    """The text of a file in UTF-8.

    what, where: for error messages: what the file is, and where such files are.

    Raises:
        InputMissing: there is no such file, or it cannot be read.
        ConfigError: it is no regular file, larger than LARGEST, or not UTF-8.
    """
    try:
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer, and a device may never end
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise ConfigError(f"{what} {path} is {kind}; name a file, {where}")
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise InputMissing(f"{what} {path} does not exist; {where}") from error
    except OSError as error:
        raise InputMissing(f"{what} {path} cannot be read: {error.strerror}; {where}") from error
    if len(data) > LARGEST:
        raise ConfigError(
            f"{what} {path} has more than {LARGEST:,} bytes, which no such file needs; is it another file?"
        )
    for mark, encoding in OTHER_ENCODINGS:
        if data.startswith(mark):
            raise ConfigError(f"{what} {path} is in {encoding}; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{what} {path} is not UTF-8: line {line} has the byte 0x{data[error.start]:02x}; save it as UTF-8"
        ) from error


def parse_yaml(text: str, what: str) -> object:
    """The value of a YAML text.

    what: for error messages.

    Raises:
        ConfigError: it is not YAML, has a key twice, a tag of no use here, or is too large in one of the ways above.
    """
    if len(text) > LARGEST:
        raise ConfigError(f"{what} has more than {LARGEST:,} characters; no value needs as many")
    if DEEP.search(text):
        raise ConfigError(f"{what} is more than {DEEPEST} levels deep; no setting is")
    parser = YAML(typ="safe", pure=True)
    parser.Constructor = Constructor
    try:
        if problem := _find_excess(YAML(typ="safe", pure=True).parse(text)):
            raise ConfigError(f"{what}: {problem}")
        return parser.load(text)
    except DuplicateKeyError as error:
        raise ConfigError(f"{what}: {_explain_duplicate(error)}") from error
    except YAMLError as error:
        raise ConfigError(f"{what} is not YAML: {_explain(error)}") from error
    except ConfigError:
        raise
    except Exception as error:  # the library builds !!bool maybe and !!int x without a check
        raise ConfigError(
            f"{what} has a value that does not fit its tag ({to_line(error, 200)}); correct it"
        ) from error


def _find_excess(events: Iterable[Event]) -> str | None:
    """What makes a text too costly to read; None if nothing does. Stops at the first."""
    sizes: dict[str, int] = {}  # anchor -> the number of values that its aliases stand for
    open_anchors: list[tuple[str | None, int]] = []  # of each open collection; the count where it began
    values = 0
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, CollectionEndEvent):
            anchor, before = open_anchors.pop()
            if anchor is not None:
                sizes[anchor] = values - before
        elif isinstance(event, AliasEvent):
            if event.anchor not in sizes:
                return (
                    f"line {line} has the alias *{to_line(event.anchor, 40)} inside of what it stands for, or before it"
                )
            values += sizes[event.anchor]
        elif isinstance(event, ScalarEvent | CollectionStartEvent):
            values += 1
            if isinstance(event, CollectionStartEvent):
                open_anchors.append((event.anchor, values - 1))
            elif event.anchor is not None:
                sizes[event.anchor] = 1
            if problem := _find_problem(event):
                return f"line {line} has {problem}"
        if len(open_anchors) > DEEPEST:
            return f"line {line} is more than {DEEPEST} levels deep; no setting is"
        if values > MOST_VALUES:
            return (
                f"more than {MOST_VALUES:,} values by line {line}, aliases counted in full; no such file needs as many"
            )
    return None


def _find_problem(event: ScalarEvent | CollectionStartEvent) -> str | None:
    """What is wrong with one value of a text; None if nothing is."""
    tag = None if event.tag is None else str(event.tag)
    if tag is not None and tag not in TAGS and tag != "!":
        return f"the tag {to_line(tag.replace(PREFIX, '!!'), 60)}, which means nothing here; leave it out"
    if (
        isinstance(event, ScalarEvent)
        and not event.style
        and len(event.value) > MOST_DIGITS
        and NUMBER.fullmatch(event.value)
    ):
        return f"a number of {len(event.value):,} digits; {MOST_DIGITS} are the most"
    if isinstance(event, ScalarEvent) and SURROGATE.search(event.value):
        return "half a surrogate pair, which is not text; correct it"
    return None


def _explain_duplicate(error: DuplicateKeyError) -> str:
    """Say in one clause which key a YAML file has twice."""
    key = re.search(r'found duplicate key "(.*?)"', str(error.problem))
    line = "" if error.problem_mark is None else f", again on line {error.problem_mark.line + 1}"
    return f"key {to_line(key[1] if key else '', 80)!r} is given twice{line}; keep one of them"


def _explain(error: YAMLError) -> str:
    """What the library found wrong and where, without the piece of the file that it shows."""
    return to_line(error, 400)
