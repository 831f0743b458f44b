"""What a store's error means: whether it passes, so that the same is tried again, and what to tell if it does not.

Trouble that passes in a while is a StoreError, which the flow tries again. A bucket that is not there is an input that
is missing, and credentials that are refused are wrong settings: neither gets better by itself.

Only here are failed requests repeated: the S3 client repeats none by itself. Errors are known by the names of their
classes, because their libraries are slow to import and a store that is a folder needs none of them.
"""

from __future__ import annotations

import errno
import itertools
import random
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from dmdr.errors import ConfigError, InputMissing, StoreError

P = ParamSpec("P")
T = TypeVar("T")

TRIES = 12  # with three requests in ten refused, one in two million is given up
PATIENCE = 90.0  # seconds, then nothing is tried again: a store that does not answer is given up within two minutes
SHORTEST, LONGEST = 0.2, 4.0  # seconds; the longest pauses after the first failure and after any
JITTER = random.SystemRandom()  # the pauses must not move the generator that a stage may have seeded

PASSING = {
    "HTTPClientError",
    "ConnectionError",
    "TimeoutError",
    "FSTimeoutError",
    "ClientPayloadError",
    "IncompleteReadError",
    "ResponseParserError",
}
LASTING = {"SSLError", "ProxyConnectionError"}  # though they are among the ones above
PASSING_CODES = {
    "SlowDown",
    "RequestTimeout",
    "InternalError",
    "ServiceUnavailable",
    "Throttling",
    "ThrottlingException",
    "OperationAborted",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
}
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
UNKNOWN = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidSecurity", "InvalidClientTokenId"}
DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "403"}
SKEWED, NO_BUCKET = "RequestTimeTooSkewed", "NoSuchBucket"
ABSENT = {"NoCredentialsError", "PartialCredentialsError"}
UNOBTAINED = {"CredentialRetrievalError", "TokenRetrievalError"}  # of an identity that may answer in a while
PERMISSION = {  # what it is called where permissions are given, if not like the operation
    "GetObject": "GetObject and s3:ListBucket",
    "HeadObject": "GetObject and s3:ListBucket",
    "ListObjectsV2": "ListBucket",
    "CreateMultipartUpload": "PutObject",
    "UploadPart": "PutObject",
    "CompleteMultipartUpload": "PutObject",
}


class Refused(ConfigError):
    """The store will not do it, however often it is asked: credentials, permissions, a clock, conditional writes."""


def retry(ask: Callable[P, T], *values: P.args, **named: P.kwargs) -> T:
    """What `ask` returns; after an error that passes it is asked again, with growing random pauses in between."""
    began = time.monotonic()
    for tried in itertools.count(1):
        try:
            return ask(*values, **named)
        except Exception as error:
            if tried == TRIES or time.monotonic() - began > PATIENCE or not is_transient(error):
                raise
        time.sleep(JITTER.uniform(0, min(LONGEST, SHORTEST * 2 ** (tried - 1))))
    raise AssertionError("the loop has no end")


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed in a moment: no answer, half an answer, or a server in trouble."""
    found, status, _ = _parse_answer(error)
    if found:
        return found in PASSING_CODES or status == 429 or (status >= 500 and status != 501)
    return bool(_error_names(error) & PASSING) and not _error_names(error) & LASTING


def is_expired(error: BaseException) -> bool:
    """Whether new credentials may help, which an identity or a file may have by now."""
    return error_code(error) in EXPIRED


def build_error(error: BaseException, action: str, url: str) -> StoreError | Refused | InputMissing:
    """What to raise for an error of a store, in one line. action: what it would not do. url: to what."""
    told = f"cannot {action} {url}: {explain(error, url)}"
    if error_code(error) == NO_BUCKET:
        return InputMissing(told)
    if error_code(error) in {*EXPIRED, *UNKNOWN, *DENIED, SKEWED} or _error_names(error) & ABSENT:
        return Refused(told)
    return StoreError(told)


def error_code(error: BaseException) -> str:
    """S3's own word for the error, such as NoSuchBucket; empty if it does not come from S3."""
    return _parse_answer(error)[0]


def is_taken(error: BaseException) -> bool:
    """Whether a conditional write was refused because there is an object; some servers do not say which condition."""
    return isinstance(error, FileExistsError) or error_code(error) == "PreconditionFailed"


def explain(error: BaseException, url: str) -> str:
    """What happened and what to do, in one line."""
    found, _, operation = _parse_answer(error)
    permission = f"s3:{PERMISSION.get(operation, operation)}"
    if found == NO_BUCKET:
        return f"the bucket {url.split('/')[2]} does not exist; create it, or correct the address"
    if found in EXPIRED:
        return "the credentials have expired; renew them, then repeat the command"
    if found in UNKNOWN:
        return f"the store does not accept these credentials ({found}); correct AWS_ACCESS_KEY_ID and its secret"
    if found == SKEWED:
        return "this machine's clock is too far from the store's; set the clock, then repeat the command"
    if found in DENIED:
        return f"access denied ({operation}); allow {permission} there, or give other credentials"
    if _error_names(error) & ABSENT:
        return "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run under an identity"
    if _error_names(error) & UNOBTAINED:
        return f"the credentials of this identity cannot be had ({error}); see that it may be assumed, then repeat"
    said = " ".join(f"{error}".split()) or type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{said}; free some space on the local disk, then repeat the command"
    return f"{said}; see that the store can be reached and written to, then repeat the command"


def _parse_answer(error: BaseException) -> tuple[str, int, str]:
    """(code, HTTP status, operation) of what S3 said, which s3fs keeps as the cause; ("", 0, "") if it said nothing."""
    cause = error.__cause__
    if cause is None or "ClientError" not in _error_names(cause):
        return "", 0, ""
    about = cause.response
    return about["Error"].get("Code", "?"), about["ResponseMetadata"]["HTTPStatusCode"], cause.operation_name


def _error_names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}
