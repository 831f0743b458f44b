"""S3's errors: which of them pass, so that the request is repeated, and what to tell the user about the others.

An error that passes after a while is a StoreError, and the flow runs the stage again. A missing bucket is a missing
input, and refused credentials are wrong settings: neither gets better by itself.

Failed requests are repeated only here: the S3 client repeats none by itself. Errors are known by the names of their
classes, because their libraries are slow to import and a store that is a folder needs none of them.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypedDict, TypeVar, runtime_checkable

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, stop_after_delay

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
PERMISSION = {  # the name of an operation's permission, where it is not the operation's own
    "GetObject": "GetObject and s3:ListBucket",
    "HeadObject": "GetObject and s3:ListBucket",
    "ListObjectsV2": "ListBucket",
    "CreateMultipartUpload": "PutObject",
    "UploadPart": "PutObject",
    "CompleteMultipartUpload": "PutObject",
}


class Refused(ConfigError):
    """The store refuses, and would again: credentials, permissions, a clock, conditional writes."""


@dataclass(frozen=True)
class Answer:
    """S3's answer to a failed request. code: its word for the error, empty if the error does not come from S3."""

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
    """The result of `request`. After an error that passes it is sent again, after growing random pauses."""
    policy = Retrying(
        retry=retry_if_exception(is_transient),
        stop=stop_after_attempt(TRIES) | stop_after_delay(PATIENCE),
        wait=_draw_pause,
        reraise=True,
    )
    return policy(request, *values, **named)


def _draw_pause(state: RetryCallState) -> float:
    """Seconds. tenacity's own random pauses would draw from the global generator."""
    return JITTER.uniform(0, min(LONGEST, SHORTEST * 2 ** (state.attempt_number - 1)))


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed in a moment: no answer, half an answer, or a server in trouble."""
    answer = _read_answer(error)
    if answer.code:
        server_error = answer.status >= 500 and answer.status != 501
        return answer.code in PASSING_CODES or answer.status == 429 or server_error
    return bool(_error_names(error) & PASSING) and not _error_names(error) & LASTING


def is_expired(error: BaseException) -> bool:
    """Whether new credentials may help, which an identity or a file may have by now."""
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
    """S3's own word for the error, such as NoSuchBucket; empty if it does not come from S3."""
    return _read_answer(error).code


def is_taken(error: BaseException) -> bool:
    """Whether a conditional write was refused because there is an object; some servers do not say which condition."""
    return isinstance(error, FileExistsError) or error_code(error) == "PreconditionFailed"


def explain(error: BaseException, url: str) -> str:
    """What happened and what to do, in one line."""
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
            f"the credentials of this identity cannot be obtained ({error}); see that it may be assumed, then repeat "
            "the command"
        )
    text = " ".join(f"{error}".split()) or type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{text}; free some space on the local disk, then repeat the command"
    return f"{text}; see that the store can be reached and written to, then repeat the command"


def _read_answer(error: BaseException) -> Answer:
    """S3's answer, which s3fs keeps as the cause of its error."""
    cause = error.__cause__
    if cause is None or "ClientError" not in _error_names(cause):
        return Answer()
    assert isinstance(cause, _ClientError)
    status = cause.response["ResponseMetadata"]["HTTPStatusCode"]
    return Answer(cause.response["Error"].get("Code", "?"), status, cause.operation_name)


def _error_names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}
