"""Text from files, stores and the environment, made fit for a terminal and for one line of a log. No pydantic.

Control characters move the cursor, colour what follows or turn the direction of reading, so that a line shows something
else than it says. They are shown as Python writes them: "\\x1b", "\\u202e".
"""

from __future__ import annotations

import re

from dmdr.config.secrets import hide_secrets

LONGEST_LINE, LONGEST_VALUE = 2000, 80  # characters
# C0 and C1 without tab and newline; marks and overrides of the reading direction; line separators; lone surrogates
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def escape(text: str) -> str:
    """The text with its control characters made visible; tabs and newlines stay."""
    return CONTROL.sub(lambda found: _name(found[0]), text)


def to_line(text: object, longest: int = LONGEST_LINE) -> str:
    """One line without control characters and secrets, of at most `longest` characters: its end gives way."""
    raw = str(text)
    line = hide_secrets(escape(" ".join(raw[: 4 * longest].split())))
    return line if len(line) <= longest and len(raw) <= 4 * longest else f"{line[: longest - 1]}…"


def quote(value: object) -> str:
    """A value of a config for an error message: a short one as Python writes it, of a longer one its beginning, and of
    a mapping or a list only that it is one, because what it holds may be secret."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple | set):
        return "a list"
    if isinstance(value, int) and value.bit_length() > 1000:
        return "a huge number"
    shown = value[: LONGEST_VALUE + 1] if isinstance(value, str) else value
    return to_line(repr(shown), LONGEST_VALUE)


def _name(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
