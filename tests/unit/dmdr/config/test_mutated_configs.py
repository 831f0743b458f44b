"""A damaged config loads, or is refused in one line: by the function that reads it, and by the command."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dmdr.config.load import load_config
from dmdr.config.plain_text import CONTROL
from dmdr.errors import ConfigError
from flows.cli import main
from tests.support.mutated_configs import mutate

LONGEST = 6000  # characters of a message: a few of its clauses


def test_a_thousand_damaged_configs_load_or_are_refused_in_one_line(tmp_path: Path):
    file, generator = tmp_path / "config.yaml", random.Random(20)
    loaded = 0
    for number in range(1000):
        file.write_bytes(mutate(generator))
        try:
            load_config(file)
            loaded += 1
        except ConfigError as error:
            message = str(error)
            assert "\n" not in message and len(message) < LONGEST and not CONTROL.search(message), (number, message)
            assert "KEY:SECRET" not in message and "abcdef" not in message, (number, message)
    assert 50 < loaded < 700  # else it tries nothing


def test_damaged_configs_end_the_command_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    file, generator = tmp_path / "config.yaml", random.Random(21)
    for number in range(40):
        file.write_bytes(mutate(generator))
        exit_code = main(["run", str(file), "--dry-run", "--store", str(tmp_path / "store")])
        told = capsys.readouterr()
        assert exit_code in (0, 64, 65, 66), (number, told)
        assert "Traceback" not in told.err and "fault of DMDR" not in told.err, (number, told)
        assert not CONTROL.search(told.out + told.err), (number, told)
        assert told.err.count("\n") <= 1 + told.err.count("prompts: "), (number, told)
