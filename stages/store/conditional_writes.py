"""Whether a store refuses to replace an object when it is told not to: what claims and seals rest on.

S3 does (If-None-Match: *), but some servers ignore the condition, so that two live copies of a stage could replace each
other's files. Such a store is refused, unless DMDR_STORE_CONDITIONAL=ignored says that it is known. Then objects are
looked for before they are written and read again afterwards, and files get names that hold their digest; it is up to
the user that no stage runs twice at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from dmdr.errors import ConfigError
from stages.store.s3_errors import Refused, error_code, is_taken, retry

VARIABLE = "DMDR_STORE_CONDITIONAL"
HONOURED, IGNORED = "honoured", "ignored"
_found: set[str] = set()  # stores that were asked already, once in a process


def is_ignored() -> bool:
    """Whether the environment says that the store ignores conditions."""
    value = os.environ.get(VARIABLE, HONOURED)
    if value not in (HONOURED, IGNORED):
        raise ConfigError(f"{VARIABLE} is {value!r}; leave it unset, or set it to {IGNORED}")
    return value == IGNORED


def ensure_honoured(store: str, writes: Iterable[Callable[[], object]], clean: Callable[[], object]) -> None:
    """Find out once whether the store honours conditions.

    writes: each creates one and the same object, so that all but the first have to be refused.

    Raises:
        Refused: one of them was not.
    """
    if store in _found:
        return
    try:
        if not all([_is_refused(write) for write in writes][1:]):
            raise Refused(
                f"store {store} replaces an object although it is told not to (If-None-Match), so that two live copies "
                f"of a stage could spoil each other's files; choose another store, or set {VARIABLE}={IGNORED} and see "
                "to it that no stage runs twice at once"
            )
    finally:
        clean()
    _found.add(store)


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
