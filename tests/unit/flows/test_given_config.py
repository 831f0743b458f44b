"""The config of a flow run: a path, an address or the text of the YAML. A file that appears later is waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dmdr.config.load import load_config
from dmdr.errors import ConfigError, InputMissing
from flows.launch import given_config
from flows.launch.given_config import open_config, read_config
from stages.store.address import open_place


@pytest.fixture(autouse=True)
def looks_are_frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given_config, "PAUSE", 0.05)


def refusal(kind: type[Exception], given: str, wait: float = 0.0) -> str:
    with pytest.raises(kind) as refused, open_config(given, print, wait=wait):
        pass
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_text_and_path_are_the_same_config(tiny_config: Callable[..., Path]):
    file, said = tiny_config(), []
    for given in (str(file), f"file://{file}", file.read_text()):
        with open_config(given, said.append, wait=60) as path:
            assert load_config(path) == load_config(file)
        assert read_config(given) == load_config(file)
    assert not said and (path == str(file) or not Path(path).exists())


def test_an_address_in_a_store_is_read(tiny_config: Callable[..., Path], store: str, tmp_path: Path):
    """A folder by its path, and S3."""
    file = tiny_config()
    open_place(f"{store}/configs").publish("my-run.yaml", lambda target: target.write_bytes(file.read_bytes()))
    address = f"{store}/configs/my-run.yaml"
    with open_config(address, print, wait=0) as path:
        assert Path(path).read_text() == file.read_text()
    assert read_config(address) == load_config(file)
    if "://" in store:
        assert f"config {store}/configs/no.yaml does not exist" in refusal(InputMissing, f"{store}/configs/no.yaml")
        open_place(f"{store}/configs").publish("large.yaml", lambda target: target.write_bytes(b"#" * 2**20))
        assert "has more than 262,144 bytes" in refusal(ConfigError, f"{store}/configs/large.yaml")
        open_place(f"{store}/configs").publish("bytes.yaml", lambda target: target.write_bytes(b"run: \xff\n"))
        assert "bytes.yaml is not YAML" in refusal(ConfigError, f"{store}/configs/bytes.yaml")


def test_a_file_that_appears_later_is_waited_for(tiny_config: Callable[..., Path], tmp_path: Path):
    text, late, said = tiny_config().read_text(), tmp_path / "configs.yaml", []

    def appear() -> None:
        time.sleep(0.4)
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").rename(late)

    threading.Thread(target=appear, daemon=True).start()
    with open_config(str(late), said.append, wait=30) as path:
        assert path == str(late)
    assert len(said) == 1 and said[0].startswith(f"waiting up to 30 s for {late}: ")


def test_the_wait_has_an_end(tmp_path: Path):
    began = time.monotonic()
    assert "never.yaml does not exist" in refusal(InputMissing, str(tmp_path / "never.yaml"), wait=0.3)
    assert 0.3 <= time.monotonic() - began < 5
    refusal(InputMissing, str(tmp_path / "never.yaml"))  # by hand nobody waits


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("run: mine\nsed: 3\n", "the text given as config: "),
        ("run: [\n", "the text given as config is not YAML"),
        ("- a\n- b\n", "the text given as config must be a mapping"),
        ('{"run": "mine"}', "the text given as config: teacher is missing"),
        ("#" * 2**18 + "\n", "the text given as config has more than 262,144 bytes"),
        ("s3://BUCKET", "config s3://BUCKET is not the address of a file"),
        ("s3://BUCKET/folder/", "config s3://BUCKET/folder/ is not the address of a file"),
        ("nothing://BUCKET/my-run.yaml", "nothing://BUCKET"),
    ],
)
def test_what_is_no_config_is_refused_in_one_line(given: str, said: str):
    assert said in refusal(ConfigError, given)
