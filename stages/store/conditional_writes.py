"""Test whether a store honours conditional writes, which refuse to replace an object.

Claims and seals rely on them. S3 honours them (If-None-Match: *), but some servers ignore the condition. There, two
processes of one stage could replace each other's files. Such a store is refused, unless the user sets
DMDR_STORE_CONDITIONAL=ignored. Then DMDR looks for an object before writing it and reads it afterwards, and file names
contain the files' digests. The user must make sure that no stage runs twice at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from dmdr.errors import ConfigError
from stages.store.s3_errors import Refused, error_code, is_taken, retry

VARIABLE = "DMDR_STORE_CONDITIONAL"
HONOURED, IGNORED = "honoured", "ignored"
_honouring: set[str] = set()  # stores that passed the test in this process


def is_ignored() -> bool:
    """Whether the environment says that the store ignores conditions."""
    value = os.environ.get(VARIABLE, HONOURED)
    if value not in (HONOURED, IGNORED):
        raise ConfigError(f"{VARIABLE} is {value!r}; leave it unset, or set it to {IGNORED}")
    return value == IGNORED


def ensure_honoured(store: str, writes: Iterable[Callable[[], object]], clean: Callable[[], object]) -> None:
    """Test whether the store honours conditions, once in each process.

    writes: each creates the same object, so the store must refuse all but the first. clean: deletes the object.

    Raises:
        Refused: the store accepted a second write.
    """
    if store in _honouring:
        return
    try:
        refused = [_is_refused(write) for write in writes]
        if not all(refused[1:]):
            raise Refused(
                f"store {store} replaces an object although the request forbids it (If-None-Match), so two processes "
                f"of one stage could replace each other's files; choose another store, or set {VARIABLE}={IGNORED} and "
                "make sure that no stage runs twice at once"
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
