"""Find the tiny decoder that a config names. Without torch, because its digest is an input of the joint stage."""

from __future__ import annotations

from pathlib import Path

from dmdr.errors import InputMissing
from dmdr.teacher import hub

KEY = "rl.tiny_decoder"
FILES = ("config.json", "*.safetensors")


def find_tiny_decoder(address: str) -> Path:
    """The folder of an AutoencoderTiny. address: the folder, or hub:OWNER/NAME@COMMIT.

    Raises:
        ConfigError: an address on a hub does not pin a commit.
        InputMissing: there is no such folder.
    """
    folder = hub.fetch(KEY, address, files=FILES) if hub.is_hub(address) else Path(address)
    if not (folder / "config.json").is_file():
        raise InputMissing(f"{KEY} {address} has no config.json; give the folder of an AutoencoderTiny, such as TAESD")
    return folder
