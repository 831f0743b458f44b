"""What reads like a secret: credentials inside an address, tokens of known form, names of variables that hold one.

An address stands in records, in logs and on pages, so it may hold no secret. No pydantic: the command line needs this
file quickly.
"""

from __future__ import annotations

import re

from dmdr.errors import ConfigError

# The forms of tokens that their givers publish: Hugging Face, AWS, GitHub, GitLab, OpenAI, Slack, Google, Prefect
TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{16,}|(AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}|AIza[\w-]{30,}|pn[ub]_[A-Za-z0-9]{20,})"
)
# user@, user:password@, also with a slash in the password; a port is digits
LOGIN = re.compile(r"(?<=://)([^/?#\s@'\"]*|[^/?#\s@:'\"]+:(?!\d+(/|$))[^\s@'\"]*)@", re.IGNORECASE)
QUERY = re.compile(
    r"(?<=[?&;])([\w.-]*(token|key|keyid|secret|passw(or)?d|pwd|auth|credentials?|signature|sig)=)([^&\s'\"]+)",
    re.IGNORECASE,
)
PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")
NAME = re.compile(
    r"KEY(?!BOARD)|TOKEN(?!IZER)|SECRET|PASS(?!THROUGH|IVE)|PASSWD|PWD$|AUTH(?!OR)|AUTHORIZ|CREDS?(?![A-Z])|CREDENTIAL"
    r"|CONNECTION_STRING",
    re.IGNORECASE,
)
HIDDEN = "***"


def has_secret(text: str) -> bool:
    """Whether a text, such as an address, holds credentials or a token."""
    return any(form.search(text) for form in (LOGIN, QUERY, TOKEN, PRIVATE_KEY))


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name is likely to hold a secret."""
    return NAME.search(name) is not None


def hide_secrets(text: str) -> str:
    """The text with its credentials and tokens blotted out."""
    text = QUERY.sub(rf"\1{HIDDEN}", LOGIN.sub(f"{HIDDEN}@", text))
    return TOKEN.sub(HIDDEN, text)


def refuse_secret(address: str) -> str:
    """The address, if it holds no secret.

    Raises:
        ValueError: it does. The message does not repeat it.
    """
    if has_secret(address):
        raise ValueError(
            "an address holds credentials or a token, which would stand in records and logs; take them out and give "
            "them by the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile for s3://, HF_TOKEN for "
            "hub:, and a file downloaded beforehand for http"
        )
    return address


def refuse_secret_arguments(arguments: list[str]) -> None:
    """Refuse a command line that has an address with a secret.

    Raises:
        ConfigError: without the address.
    """
    for argument in arguments:
        option = argument.partition("=")[0] if argument.startswith("-") else ""
        try:
            refuse_secret(argument)
        except ValueError as error:
            raise ConfigError(f"{option}: {error}" if option and not has_secret(option) else str(error)) from None
