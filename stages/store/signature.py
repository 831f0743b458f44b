"""Sign an export with a private key, and check the signature of a copy, by the standard of OpenSSF Model Signing.

FORM/model.sig   signs all other files of that form, so that it can be checked where a form is copied alone
model.sig        signs all files of the export, these signatures included

A key is one of an elliptic curve, in a PEM file: `openssl ecparam -name prime256v1 -genkey -noout -out dmdr.key` makes
one, and `openssl ec -in dmdr.key -pubout -out dmdr.pub` its public half. `model_signing verify` checks the files too.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dmdr.errors import ConfigError, DataError, InputMissing

if TYPE_CHECKING:
    from model_signing.hashing import Config as Hashing

SIGNATURE = "model.sig"


def check_signing_key(key: str) -> None:
    """
    Raises:
        InputMissing: there is no such file.
        ConfigError: it holds no private key that can sign, or model-signing is not installed.
    """
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    _require_library()
    try:
        loaded = load_pem_private_key(_read_key(key), None)
    except TypeError as error:
        raise ConfigError(f"the key {key} has a password; give execution.signing_key one without") from error
    except ValueError as error:
        raise ConfigError(f"{key} holds no private key (PEM); openssl ecparam -genkey makes one") from error
    if not isinstance(loaded, EllipticCurvePrivateKey):
        raise ConfigError(f"{key} is no key of an elliptic curve; openssl ecparam -genkey makes one")


def sign_export(folder: Path, forms: Iterable[str], key: str) -> None:
    """Write the signature of each form, and that of the whole export. Raises as `check_signing_key` does."""
    check_signing_key(key)
    from model_signing.signing import Config

    for each in (*(folder / form for form in forms), folder):
        config = Config().set_hashing_config(_ignore_signature()).use_elliptic_key_signer(private_key=Path(key))
        config.sign(each, each / SIGNATURE)


def verify_folder(folder: Path, key: str, what: str) -> None:
    """Check the signature of an export, or of one form. what: its name in messages.

    Raises:
        InputMissing: there is no such key.
        ConfigError: it is no public key, or model-signing is not installed.
        DataError: the folder is not signed, by another key, or is not what was signed.
    """
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    _require_library()
    try:
        load_pem_public_key(_read_key(key))
    except ValueError as error:
        raise ConfigError(f"--verify {key} holds no public key (PEM)") from error
    from model_signing.verifying import Config

    if not (folder / SIGNATURE).is_file():
        raise DataError(
            f"{what} is not signed: it has no {SIGNATURE}; export it with execution.signing_key, or pull it without "
            "--verify"
        )
    try:
        config = Config().set_hashing_config(_ignore_signature()).use_elliptic_key_verifier(public_key=Path(key))
        config.verify(folder, folder / SIGNATURE)
    except Exception as error:  # the library, cryptography and JSON each have their own
        reason = " ".join(str(error).split()).split(": Expected")[0][:200] or type(error).__name__
        raise DataError(f"{what} is not what the owner of {key} signed ({reason}); do not use it") from error


def _ignore_signature() -> Hashing:
    from model_signing.hashing import Config

    return Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _read_key(key: str) -> bytes:
    try:
        return Path(key).read_bytes()
    except OSError as error:
        raise InputMissing(f"cannot read the key {key}: {error.strerror}") from error


def _require_library() -> None:
    try:
        import model_signing  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f"signatures need {error.name}, which is not installed: pip install 'dmdr[sign]'") from error
