"""Whether a store honours conditional writes, which refuse to replace an object: claims and seals rest on them.

S3 does (If-None-Match: *), but some servers ignore the condition. There two processes of one stage could replace each
other's files. Such a store is refused, unless DMDR_STORE_CONDITIONAL=ignored says that the user knows it. Then an
object is looked for before it is written and read again afterwards, and files get names that hold their digest. The
user has to see to it that no stage runs twice at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from dmdr.errors import ConfigError
from stages.store.s3_errors import Refused, error_code, is_taken, retry

VARIABLE = "DMDR_STORE_CONDITIONAL"
HONOURED, IGNORED = "honoured", "ignored"
_honouring: set[str] = set()  # stores that were tested by this process


def is_ignored() -> bool:
    """Whether the environment says that the store ignores conditions."""
    value = os.environ.get(VARIABLE, HONOURED)
    if value not in (HONOURED, IGNORED):
        raise ConfigError(f"{VARIABLE} is {value!r}; leave it unset, or set it to {IGNORED}")
    return value == IGNORED


def ensure_honoured(store: str, writes: Iterable[Callable[[], object]], clean: Callable[[], object]) -> None:
    """Test once in a process whether the store honours conditions.

    writes: each creates the same object, so all but the first have to be refused. clean: deletes it.

    Raises:
        Refused: the store accepted another one.
    """
    if store in _honouring:
        return
    try:
        if not all([_is_refused(write) for write in writes][1:]):
            raise Refused(
                f"store {store} replaces an object although the request forbids it (If-None-Match), so two processes "
                f"of one stage could spoil each other's files; choose another store, or set {VARIABLE}={IGNORED} and "
                "see to it that no stage runs twice at once"
            )
    finally:
        clean()
    _honouring.add(store)


def _is_refused(write: Callable[[], object]) -> bool:
    try:
        retry(write)
    except Exception as error:
        if error_code(error) == "NotImplemented":
            return False
        if not is_taken(error):
            raise
        return True
    return False
