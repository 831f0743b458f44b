"""What a config file cannot be: each kind is refused in one line, quickly, and without much memory."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import pytest

from dmdr.config.changes import parse_changes
from dmdr.config.load import load_config
from dmdr.config.yaml_text import parse_yaml
from dmdr.errors import ConfigError, InputMissing

SHIPPED = (Path(__file__).parents[4] / "configs/lab-flow.yaml").read_text(encoding="utf-8")
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
)
SECONDS, BYTES = 1.0, 100 * 2**20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "more than 3,000 values by line 4, aliases counted in full"),
        (SHIPPED + "".join(f"k{n}: 1\n" for n in range(30_000)), "more than 100,000 bytes"),
        (SHIPPED + "".join(f"k{n}: 1\n" for n in range(3000)), "more than 3,000 values"),
        ("run: x\nseed: " + "9" * 10**6, "more than 100,000 bytes"),
        ("run: x\nseed: " + "9" * 90_000, "line 2 has a number of 90,000 digits; 100 are the most"),
        ("seed: 0x" + "f" * 90_000, "line 1 has a number of 90,002 digits"),
        ("a: " + "[" * 10_000, "more than 32 levels deep"),
        ("{a: " * 10_000, "more than 32 levels deep"),
        ("- " * 10_000, "more than 32 levels deep"),
        ("? " * 10_000, "more than 32 levels deep"),
        ("a: &a [*a]", r"alias \*a inside of what it stands for"),
        ("a: &a {<<: *a}", r"alias \*a inside of what it stands for"),
        ("a: *b", r"alias \*b"),
        ("run: !!bool maybe", "does not fit its tag .'maybe'.; correct it"),
        ("seed: !!int x", "does not fit its tag"),
        ("seed: !!float ''", "does not fit its tag"),
        ("run: !!timestamp x", "the tag !!timestamp, which means nothing here"),
        ("run: !!binary '%%%'", "the tag !!binary"),
        ("run: !!python/object/apply:os.system [ls]", "the tag !!python/object/apply:os.system"),
        ("run: \0", "unacceptable character #x0000"),
        ("run: \x1b[31m", "unacceptable character #x001b"),
        ("", "is empty"),
        ("# only a comment", "is empty"),
        ("- a", "must be a mapping of sections, found list"),
        ("hello", "must be a mapping of sections, found str"),
        ("<<: 1", "is not YAML"),
        ("{a: b}: c", "is not YAML"),
        ("a: b\n---\nc: d", "expected a single document"),
        ("a: 1\na: 2", "key 'a' is given twice, again on line 2"),
        ("null: a", "keys should be strings"),
        ("[a, b]: c", "keys should be strings"),
        ("run: " + "x" * 50_000, "run 'x{70,}… must be small letters"),
        ("teacher: [" + "x, " * 1500 + "]", "teacher: .* got a list"),
        ('run: "' + "\\e" * 1000 + '"', r"run '\\x1b"),
        ('run: "\\ud800"', "line 1 has half a surrogate pair, which is not text"),
        (SHIPPED + "".join(f"k{n}: 1\n" for n in range(50)), "unknown key k7; .*; and 42 more"),
    ],
)
def test_refused_in_one_line_at_once(text: str, message: str, tmp_path: Path):
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=message) as refusal:
        load_config(file)
    assert time.process_time() - began < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES
    assert "\n" not in str(refusal.value) and "\x1b" not in str(refusal.value) and len(str(refusal.value)) < 5000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (SHIPPED.encode("utf-16"), "is in UTF-16; save it as UTF-8"),
        (SHIPPED.encode("utf-32"), "is in UTF-32; save it as UTF-8"),
        (b"run: ok\nteacher: caf\xe9\n", "is not UTF-8: line 2 has the byte 0xe9"),
    ],
)
def test_another_encoding_is_named(data: bytes, message: str, tmp_path: Path):
    (tmp_path / "config.yaml").write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "config.yaml")


@pytest.mark.parametrize("text", ["\ufeff" + SHIPPED, SHIPPED.replace("\n", "\r\n")])
def test_a_byte_order_mark_and_windows_lines_change_nothing(text: str, tmp_path: Path):
    (tmp_path / "config.yaml").write_bytes(text.encode())
    (tmp_path / "shipped.yaml").write_text(SHIPPED)
    assert load_config(tmp_path / "config.yaml") == load_config(tmp_path / "shipped.yaml")


def test_what_is_no_file_is_not_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero", "/dev/null"):
        with pytest.raises(ConfigError, match="is a folder; name a file|is not a regular file; name a file"):
            load_config(path)
    for missing in (tmp_path / "no", "/etc/passwd/x", "a\0b", "x" * 5000):
        with pytest.raises(InputMissing, match="does not exist|File name too long"):
            load_config(missing)


def test_dates_are_words_and_numbers_are_those_of_yaml_1_2():
    text = "{day: 2026-11-29, no_day: 2026-02-31, time: 12:30:45, rate: 2e-4, word: off, tag: !!str 7}"
    assert parse_yaml(text, "test") == {
        "day": "2026-11-29",
        "no_day": "2026-02-31",
        "time": "12:30:45",
        "rate": 2e-4,
        "word": "off",
        "tag": "7",
    }


def test_an_anchor_and_a_merge_key_are_read():
    text = "a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a"
    assert parse_yaml(text, "test") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1}}


def test_a_change_is_bounded_as_a_file_is():
    with pytest.raises(ConfigError, match="--set seed: line 1 has a number of 5,000 digits"):
        parse_changes(["seed=" + "9" * 5000])
