"""A signed export is delivered only as its owner signed it, whoever writes to the store."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from dmdr.errors import ConfigError, DataError, InputMissing
from flows import cli
from stages.store.artifacts import Artifact
from stages.store.signature import check_signing_key, sign_export, verify_folder
from tests.support.sealing import PROVENANCE
from tests.support.store_bench import IDENTITY, INPUTS, write

FILES = {
    "pipeline/model_index.json": b"{}",
    "pipeline/unet/w.safetensors": b"weights",
    "lora/l.safetensors": b"lora",
    "SHA256SUMS": b"sums",
}


def write_keys(folder: Path, name: str = "dmdr") -> tuple[str, str]:
    """A new private key and its public half."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    public = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    write(folder, {f"{name}.key": private, f"{name}.pub": public})
    return str(folder / f"{name}.key"), str(folder / f"{name}.pub")


@pytest.fixture
def keys(tmp_path: Path) -> tuple[str, str]:
    return write_keys(tmp_path / "keys")


def seal_export(store: Path, folder: Path, change: Callable[[Path], object] = lambda folder: None) -> None:
    change(folder)
    artifact = Artifact(str(store), "r", "export")
    artifact.claim(IDENTITY, INPUTS)
    artifact.seal(folder, facts={}, provenance=PROVENANCE)


@pytest.mark.process
@pytest.mark.parametrize("form", [None, "pipeline", "lora"])
def test_a_signed_export_is_pulled_and_checked(tmp_path: Path, keys: tuple[str, str], form: str | None) -> None:
    out = write(tmp_path / "out", FILES)
    sign_export(out, ["pipeline", "lora"], keys[0])
    seal_export(tmp_path / "runs", out)
    asked = [] if form is None else ["--form", form]
    pull = ["pull", "r", "export", str(tmp_path / "here"), "--store", str(tmp_path / "runs"), *asked]
    assert cli.main([*pull, "--verify", keys[1]]) == 0
    copied = tmp_path / "here" if form is None else tmp_path / "here" / form
    standard = [sys.executable, "-m", "model_signing", "verify", "key", str(copied)]
    options = ["--signature", str(copied / "model.sig"), "--public_key", keys[1], "--ignore-paths", "model.sig"]
    assert subprocess.run([*standard, *options], capture_output=True).returncode == 0, "as the standard's own tool does"


HARMS: dict[str, Callable[[Path], object]] = {
    "changed": lambda folder: (folder / "pipeline/unet/w.safetensors").write_bytes(b"weightz"),
    "added": lambda folder: (folder / "pipeline/evil.py").write_bytes(b"x"),
    "removed": lambda folder: (folder / "pipeline/model_index.json").unlink(),
    "renamed": lambda folder: (folder / "pipeline/unet/w.safetensors").rename(folder / "pipeline/unet/v.safetensors"),
    "stripped": lambda folder: [file.unlink() for file in folder.rglob("model.sig")],
    "of the other form": lambda folder: shutil.copy(folder / "lora/model.sig", folder / "pipeline/model.sig"),
    "no JSON": lambda folder: [file.write_bytes(b"{") for file in folder.rglob("model.sig")],
    "empty": lambda folder: [file.write_text(json.dumps({})) for file in folder.rglob("model.sig")],
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("form", [None, "pipeline"])
def test_what_the_owner_did_not_sign_is_not_delivered(
    tmp_path: Path, keys: tuple[str, str], capfd: pytest.CaptureFixture, harm: str, form: str | None
) -> None:
    """The store is sealed by a forger, who makes records as well as we do, and has no key."""
    out = write(tmp_path / "out", FILES)
    sign_export(out, ["pipeline", "lora"], keys[0])
    seal_export(tmp_path / "runs", out, HARMS[harm])
    asked = [] if form is None else ["--form", form]
    pull = ["pull", "r", "export", str(tmp_path / "here"), "--store", str(tmp_path / "runs"), *asked]
    assert cli.main([*pull, "--verify", keys[1]]) == 65
    told = capfd.readouterr().err
    assert "sign" in told
    assert len(told.splitlines()) == 2, "the progress of the pull, and why it failed"
    assert not (tmp_path / "here").exists()


def test_the_key_of_somebody_else(tmp_path: Path, keys: tuple[str, str]) -> None:
    out = write(tmp_path / "out", FILES)
    sign_export(out, ["pipeline"], write_keys(tmp_path / "keys", "other")[0])
    with pytest.raises(DataError, match="is not what the owner of .* signed"):
        verify_folder(out, keys[1], "out")


def test_what_is_no_key(tmp_path: Path, keys: tuple[str, str], rng: random.Random) -> None:
    with pytest.raises(InputMissing, match="cannot read the key"):
        check_signing_key(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="holds no private key"):
        check_signing_key(keys[1])
    for number, data in enumerate(
        (b"", rng.randbytes(200), b"-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----")
    ):
        write(tmp_path, {f"bad{number}": data})
        with pytest.raises(ConfigError, match="holds no private key"):
            check_signing_key(str(tmp_path / f"bad{number}"))
        with pytest.raises(ConfigError, match="holds no public key"):
            verify_folder(tmp_path, str(tmp_path / f"bad{number}"), "out")
    secret = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.BestAvailableEncryption(b"pass")
    )
    other = rsa.generate_private_key(65537, 2048).private_bytes(
        pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption()
    )
    write(tmp_path, {"secret": secret, "rsa": other})
    with pytest.raises(ConfigError, match="has a password"):
        check_signing_key(str(tmp_path / "secret"))
    with pytest.raises(ConfigError, match="no key of an elliptic curve"):
        check_signing_key(str(tmp_path / "rsa"))
