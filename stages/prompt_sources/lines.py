"""The lines of a text file, in bounded memory, and the count of those that are bad."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from dmdr.errors import DataError

LONGEST = 4096  # bytes of a prompt, and of any other value that is kept
LONGEST_ROW = 2**20  # bytes of a line that holds other fields beside the prompt
MOST_BAD = 0.01  # share of the lines; with more, the file is probably not a file of prompts
MOST_REPORTED = 10  # bad lines that are reported one by one
UTF16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks


class ByteReader(Protocol):
    """What is used of an open file: an io.BufferedReader has it."""

    def peek(self, size: int, /) -> bytes: ...

    def read(self, size: int, /) -> bytes: ...

    def readline(self, size: int, /) -> bytes: ...


@dataclass
class Lines:
    """Counts the lines of a source, and reports the first bad ones by `say`."""

    source: str
    say: Callable[[str], None]
    read: int = 0
    bad: int = 0
    _reasons: Counter[str] = field(default_factory=Counter)

    def skip(self, number: int, why: str, lines: int = 1) -> None:
        """Count bad lines and report them. number: of the last one; why: a clause that says what is wrong with it."""
        self.read += lines
        self.bad += lines
        if self.bad <= MOST_REPORTED:
            self.say(f"{self.source}, line {number:,}, {why}; skipped")
        if why in self._reasons or len(self._reasons) < MOST_REPORTED:
            self._reasons[why] += lines

    def check(self) -> None:
        """Raises DataError if the source is empty or has too many bad lines."""
        if self.bad > MOST_REPORTED:
            self.say(f"{self.source}: {self.bad:,} bad lines in all")
        if self.read == 0:
            raise DataError(f"{self.source} is empty; give a file with a prompt on each line")
        if self.bad > self.read * MOST_BAD:
            [(reason, _)] = self._reasons.most_common(1)
            raise DataError(
                f"{self.source}: {self.bad:,} of {self.read:,} lines are bad, more than {MOST_BAD:.0%} (most often, "
                f"one {reason}); mend the file, or correct prompts.sources, prompts.evaluation or prompts.column"
            )


def iterate_lines(file: ByteReader, lines: Lines, *, longest: int = LONGEST) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of each line; "" for a blank one. One that is too long or not UTF-8 is skipped and counted.

    A line ends with LF, CRLF or, in a file that has only those, CR. At most `longest` + 1 bytes of it are in memory.

    Raises:
        DataError: the file is UTF-16.
    """
    beginning = file.peek(2**16)
    if beginning.startswith(UTF16) and b"\0" in beginning:
        raise DataError(f"{lines.source} is UTF-16, and prompts are read as UTF-8; save it as UTF-8")
    is_old_mac = b"\r" in beginning and b"\n" not in beginning

    def read(size: int) -> bytes:
        return _read_to_cr(file, size) if is_old_mac else file.readline(size)

    number = 0
    while raw := read(longest + 1):
        number += 1
        ends = raw[-1:] in (b"\n", b"\r")
        if len(raw) > longest and not ends:
            while (more := read(longest)) and more[-1:] not in (b"\n", b"\r"):
                pass
            lines.skip(number, f"is longer than {longest:,} bytes")
            continue
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            lines.skip(number, "is not UTF-8")
            continue
        yield number, "" if text.isspace() else text


def _read_to_cr(file: ByteReader, size: int) -> bytes:
    """`readline(size)` where a line ends with CR."""
    found = bytearray()
    while len(found) < size and (ahead := file.peek(1)):
        end = ahead.find(b"\r") + 1
        found += file.read(min(end or len(ahead), size - len(found)))
        if found.endswith(b"\r"):
            break
    return bytes(found)
