"""Handle errors of S3: repeat the request after a transient error, and explain every other error to the user.

A transient error that lasts too long becomes a StoreError, and the flow runs the stage again. A missing bucket is a
missing input, and refused credentials are wrong settings: repeating the request would not help.

Failed requests are repeated only here; the S3 client itself repeats none. Errors are recognised by the names of their
classes, because their libraries are slow to import and a store that is a folder needs none of them.
"""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypedDict, TypeVar, runtime_checkable

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay

from dmdr.errors import ConfigError, InputMissing, StoreError

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE = 90.0  # seconds, then no new try: a store that stops to answer is given up within two minutes
FIRST_PATIENCE = 20.0  # seconds, as long as no store has answered to this process: its address may be wrong
SHORTEST, LONGEST = 0.2, 4.0  # seconds; upper limits of the pause after the first failure and after any later one
JITTER = random.SystemRandom()  # the pauses must not move the generator that a stage may have seeded

PASSING = {
    "HTTPClientError",
    "ConnectionError",
    "TimeoutError",
    "FSTimeoutError",
    "ClientPayloadError",
    "IncompleteReadError",
    "ResponseParserError",
    "FlexibleChecksumError",  # the body is not that of the checksum that came with it
}
LASTING = {"SSLError", "ProxyConnectionError"}  # not transient, although they are subclasses of the ones above
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
UNOBTAINED = {"CredentialRetrievalError", "TokenRetrievalError"}  # an identity that may answer later
PERMISSION = {  # operation -> its permission, if that has another name
    "GetObject": "GetObject and s3:ListBucket",
    "HeadObject": "GetObject and s3:ListBucket",
    "ListObjectsV2": "ListBucket",
    "CreateMultipartUpload": "PutObject",
    "UploadPart": "PutObject",
    "CompleteMultipartUpload": "PutObject",
}


_answering = threading.Event()  # whether some store has answered to this process


class Refused(ConfigError):
    """The store refuses a request and would refuse it again: credentials, permissions, clock, conditional writes."""


@dataclass(frozen=True)
class Answer:
    """S3's answer to a failed request. code: S3's name of the error, empty if the error does not come from S3."""

    code: str = ""
    status: int = 0  # of HTTP
    operation: str = ""


class _Metadata(TypedDict):
    HTTPStatusCode: int


class _Response(TypedDict):
    Error: dict[str, str]
    ResponseMetadata: _Metadata


@runtime_checkable
class _ClientError(Protocol):
    """botocore's error for an answer of S3."""

    response: _Response
    operation_name: str


def retry(request: Callable[P, T], *values: P.args, **named: P.kwargs) -> T:
    """The result of `request`. After a transient error it is repeated, with growing random pauses in between."""
    policy = Retrying(retry=retry_if_exception(is_transient), stop=_is_hopeless, wait=_draw_pause, reraise=True)
    result = policy(request, *values, **named)
    _answering.set()
    return result


def _is_hopeless(state: RetryCallState) -> bool:
    """Whether a request has been repeated for long enough."""
    error = state.outcome.exception() if state.outcome is not None else None
    if error is not None and error_code(error):
        _answering.set()
    return stop_after_delay(PATIENCE if _answering.is_set() else FIRST_PATIENCE)(state)


def _draw_pause(state: RetryCallState) -> float:
    """Draw a pause in seconds. tenacity's own random pauses would use the global generator."""
    return JITTER.uniform(0, min(LONGEST, SHORTEST * 2 ** (state.attempt_number - 1)))


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed if repeated: no answer, an incomplete one, or an error of the server."""
    answer = _read_answer(error)
    if answer.code:
        server_error = answer.status >= 500 and answer.status != 501
        return answer.code in PASSING_CODES or answer.status == 429 or server_error
    return bool(_error_names(error) & PASSING) and not _error_names(error) & LASTING


def is_expired(error: BaseException) -> bool:
    """Whether the credentials have expired. An identity or a file may have new ones by now."""
    return error_code(error) in EXPIRED


def build_error(error: BaseException, action: str, url: str) -> StoreError | Refused | InputMissing:
    """The error to raise instead of a library's, in one line. action: what the store does not do. url: with what."""
    message = f"cannot {action} {url}: {explain(error, url)}"
    if error_code(error) == NO_BUCKET:
        return InputMissing(message)
    if error_code(error) in {*EXPIRED, *UNKNOWN, *DENIED, SKEWED} or _error_names(error) & ABSENT:
        return Refused(message)
    return StoreError(message)


def error_code(error: BaseException) -> str:
    """S3's name of the error, such as NoSuchBucket; empty if the error does not come from S3."""
    return _read_answer(error).code


def is_taken(error: BaseException) -> bool:
    """Whether a conditional write was refused because the object exists already."""
    return isinstance(error, FileExistsError) or error_code(error) == "PreconditionFailed"


def explain(error: BaseException, url: str) -> str:
    """Say on one line what happened and what to do."""
    answer = _read_answer(error)
    if answer.code == NO_BUCKET:
        return f"the bucket {url.split('/')[2]} does not exist; create it, or correct the address"
    if answer.code in EXPIRED:
        return "the credentials have expired; renew them, then repeat the command"
    if answer.code in UNKNOWN:
        return f"the store does not accept these credentials ({answer.code}); correct AWS_ACCESS_KEY_ID and its secret"
    if answer.code == SKEWED:
        return "this machine's clock is too far from the store's; set the clock, then repeat the command"
    if answer.code in DENIED:
        permission = PERMISSION.get(answer.operation, answer.operation)
        return f"access denied ({answer.operation}); allow s3:{permission} there, or give other credentials"
    if _error_names(error) & ABSENT:
        return "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run under an identity"
    if _error_names(error) & UNOBTAINED:
        return (
            f"the credentials of this identity cannot be obtained ({error}); check that it may be assumed, then "
            "repeat the command"
        )
    text = " ".join(f"{error}".split()) or type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{text}; free some space on the local disk, then repeat the command"
    return f"{text}; check that the store can be reached and written to, then repeat the command"


def _read_answer(error: BaseException) -> Answer:
    """S3's answer, which s3fs attaches to its own error as the cause."""
    cause = error.__cause__
    if cause is None or "ClientError" not in _error_names(cause):
        return Answer()
    assert isinstance(cause, _ClientError)
    status = cause.response["ResponseMetadata"]["HTTPStatusCode"]
    return Answer(cause.response["Error"].get("Code", "?"), status, cause.operation_name)


def _error_names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}
