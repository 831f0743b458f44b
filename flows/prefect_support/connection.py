"""The connection to a Prefect server: what its address is and who set it, and its errors in one line.

Prefect may only be imported here after its settings are made, so each function imports what it needs.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from dmdr.config.plain_text import quote, to_line
from dmdr.config.secrets import has_secret
from dmdr.errors import USER_ERRORS, ConfigError, StoreError

SETTING = "PREFECT_API_URL"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LIBRARIES = ("prefect", "httpx", "httpcore", "websockets")  # the client's
EXAMPLE = "http://127.0.0.1:4200/api"


def spare_loopback() -> None:
    """Let no proxy of the environment stand between programs of this machine, such as a flow and its server.

    Programs that this one starts inherit it.
    """
    names = {name.lower() for name, value in os.environ.items() if value}
    if not {"http_proxy", "https_proxy", "all_proxy"} & names:
        return
    spared = [host for host in (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",") if host]
    if "*" not in spared:
        spared += [host for host in LOOPBACK if host not in spared]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(spared)


def find_server() -> str | None:
    """The address of the server that is set; None if there is none.

    Raises:
        ConfigError: Prefect's settings cannot be read, or the address is none or has a password.
    """
    if (given := os.environ.get(SETTING)) is not None:
        _check_address(given)  # of which Prefect would print a page
    try:
        from prefect.settings import PREFECT_API_URL

        address = PREFECT_API_URL.value()
    except Exception as error:  # a profile or a variable that Prefect cannot read
        raise ConfigError(f"Prefect's settings cannot be read: {to_line(error, 400)}; correct them") from None
    if address:
        _check_address(address)
    return address or None


def _check_address(address: str) -> None:
    if has_secret(address):
        raise ConfigError(
            f"{SETTING} {name_source()} holds a password or a token; take it out and set PREFECT_API_AUTH_STRING or "
            "PREFECT_API_KEY"
        )
    try:
        host = urlsplit(address).hostname if address.lower().startswith(("http://", "https://")) else None
    except ValueError:
        host = None
    if address and not host:
        raise ConfigError(f"{SETTING} {name_source()} is {quote(address)}, which is no address; set one: {EXAMPLE}")


def name_source() -> str:
    """Where the address comes from, in words that follow it."""
    if os.environ.get(SETTING):
        return "of the environment"
    from prefect.context import get_settings_context
    from prefect.settings import PREFECT_API_URL

    profile = get_settings_context().profile
    if PREFECT_API_URL in profile.settings:
        return f"of Prefect's profile {profile.name}"
    return "of a file with Prefect's settings (.env, prefect.toml or pyproject.toml)"


def describe_removal() -> str:
    """How to do without the server."""
    if os.environ.get(SETTING):
        return f"unset {SETTING}"
    return f"remove the setting (prefect config unset {SETTING})"


def check_server(address: str) -> None:
    """
    Raises:
        StoreError: the server does not answer, or answers with an error.
        ConfigError: it is no Prefect server, or one of another version.
    """
    from prefect.client.orchestration import get_client

    client = get_client(sync_client=True)
    problem = client.api_healthcheck()
    if problem is not None:
        raise translate_error(problem, address) from problem
    try:
        client.raise_for_api_version_mismatch()
    except Exception as error:
        why = to_line(error, 200) if "incompatible versions" in str(error) else "what answers there is no Prefect API"
        raise ConfigError(
            f"the Prefect server at {address}, {SETTING} {name_source()}, cannot be used: {why}; give the address of "
            f"one of this version, such as {EXAMPLE}, or {describe_removal()} to run without one"
        ) from error


@contextmanager
def translate_errors(address: str | None) -> Iterator[None]:
    """Turn any error of Prefect's client into one line. address: of the server; None: Prefect's embedded one.

    Raises:
        StoreError, ConfigError: as `translate_error`.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, USER_ERRORS) or not comes_from_client(error):
            raise
        raise translate_error(error, address) from error


def is_answer(error: BaseException) -> bool:
    """Whether an error is what came of a request: no answer, or one that says no."""
    return any(kind.__module__.partition(".")[0] in ("httpx", "httpcore") for kind in type(error).__mro__)


def comes_from_client(error: BaseException) -> bool:
    """Whether Prefect or what it talks to its server with has raised an error, and not what Prefect runs."""
    if is_answer(error) or type(error).__module__.partition(".")[0] in LIBRARIES:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any(f"/site-packages/{name}/" in frames[-1].filename for name in LIBRARIES)


def translate_error(error: Exception, address: str | None) -> StoreError | ConfigError:
    """The error for the user. Only a server that takes part again helps, so it is worth a retry, unless the address
    answers that there is no such thing."""
    told = to_line(error, 200).partition(" - Response")[0] or type(error).__name__
    if address is None:
        return StoreError(f"Prefect's embedded server fails ({told}); the same command goes on from here")
    where = f"the Prefect server at {address}, {SETTING} {name_source()},"
    if "'404 " in told or "'405 " in told:
        return ConfigError(
            f"{where} is no Prefect API ({told}); its address ends in /api, such as {EXAMPLE}; correct it, or "
            f"{describe_removal()} to run without one"
        )
    return StoreError(
        f"{where} does not answer ({told}); start it, or {describe_removal()} to run without one{_name_proxy(address)}"
    )


def _name_proxy(address: str) -> str:
    """A hint to the proxy that stands before a server elsewhere."""
    scheme = address.partition(":")[0].lower()
    for name in (f"{scheme}_proxy", f"{scheme.upper()}_PROXY", "all_proxy", "ALL_PROXY"):
        if os.environ.get(name) and not any(host in address for host in LOOPBACK):
            return f"; {name} is set: if the server is not behind that proxy, add its host to NO_PROXY"
    return ""
