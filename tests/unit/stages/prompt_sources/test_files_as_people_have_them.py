"""The same prompts, in every shape that programs write them in, are the same records."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from dmdr.config.prompt_record import PromptRecord
from dmdr.errors import USER_ERRORS, ConfigError, InputMissing
from stages.prompt_sources.lines import Lines
from stages.prompt_sources.sources import digest_source, read_source

P = [f"a {color} {shape}" for color in ("red", "blue", "green") for shape in ("circle", "square", "ring", "cross")]
NAN = math.nan


def read(source: Path | str, column: str = "prompt") -> list[PromptRecord]:
    said: list[str] = []
    found = list(read_source(str(source), column, Lines(str(source), said.append)))
    assert not [line for line in said if "skipped" in line], said
    return found


def jsonl(**more: object) -> bytes:
    return "".join(json.dumps({"prompt": p, **more}) + "\n" for p in P).encode()


def separated(mark: str, header: str = "prompt{}id\n") -> bytes:
    return (header.format(mark) + "".join(f"{p}{mark}{n}\n" for n, p in enumerate(P))).encode()


def table(values: object, name: str = "prompt") -> Callable[[Path], None]:
    return lambda path: parquet.write_table(pyarrow.table({name: values}), path)


FILES: dict[str, bytes | Callable[[Path], None]] = {
    "plain.txt": "\n".join(P).encode(),
    "blank-at-end.txt": ("\n".join(P) + "\n\n\n").encode(),
    "blank-between.txt": ("\n \t\n".join(P)).encode(),
    "windows.txt": "\r\n".join(P).encode(),
    "old-mac.txt": "\r".join(P).encode(),
    "old-mac-end.txt": ("\r".join(P) + "\r\r").encode(),
    "bom.txt": "\ufeff".encode() + "\n".join(P).encode(),
    "blank.jsonl": jsonl() + b"\n",
    "old-mac.jsonl": jsonl().replace(b"\n", b"\r"),
    "long.jsonl": jsonl(tokens=list(range(2000)), text="x" * 100_000),
    "nan.jsonl": jsonl(aesthetic=NAN),
    "infinite.ndjson": jsonl(aesthetic=-math.inf),
    "surrogate.jsonl": jsonl(note="\ud83d"),
    "strings.json": json.dumps(P).encode(),
    "objects.json": json.dumps([{"prompt": p, "score": NAN} for p in P]).encode(),
    "comma.csv": separated(","),
    "semicolon.csv": separated(";"),
    "tab.csv": separated("\t"),
    "bar.csv": separated("|"),
    "spaced.csv": separated(", "),
    "spaced-quoted.csv": ("id, prompt\n" + "".join(f'{n}, "{p}"\n' for n, p in enumerate(P))).encode(),
    "sep.csv": b"sep=;\r\n" + separated(";"),
    "bom.csv": b"\xef\xbb\xbf" + separated(","),
    "blank.csv": b"\n" + separated(",") + b"\n\n",
    "twice.csv": b"prompt,id,id\n" + b"".join(b"%s,1,2\n" % p.encode() for p in P),
    "plain.tsv": separated("\t"),
    "blank.tsv": separated("\t") + b"\n",
    "zipped.txt.gz": gzip.compress("\n".join(P).encode()),
    "zipped.CSV.gz": gzip.compress(separated(";")),
    "members.jsonl.gz": gzip.compress(jsonl()[:50]) + gzip.compress(jsonl()[50:]),
    "text.parquet": table(P),
    "large.parquet": table(pyarrow.array(P, pyarrow.large_string())),
    "view.parquet": table(pyarrow.array(P, pyarrow.string_view())),
    "category.parquet": table(pyarrow.array(P).dictionary_encode()),
    "bytes.parquet": table(pyarrow.array([p.encode() for p in P], pyarrow.binary())),
}


@pytest.mark.parametrize("name", FILES)
def test_it_has_the_prompts(name: str, tmp_path: Path):
    content = FILES[name]
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        content(tmp_path / name)
    records = read(tmp_path / name)
    assert [record["prompt"] for record in records] == P
    assert not {"aesthetic", "score", "note", "tokens", "text"} & {key for record in records for key in record}
    json.dumps(records, allow_nan=False).encode()


def test_a_folder_and_a_pattern_are_their_files_in_order(tmp_path: Path):
    data = tmp_path / "set/data"
    data.mkdir(parents=True)
    for n in range(3):
        part = pyarrow.table({"prompt": P[4 * n : 4 * n + 4]})
        parquet.write_table(part, data / f"train-0000{n}-of-00003.parquet")
    (data / "README.md").write_text("not prompts")
    (tmp_path / "set/.cache").mkdir()
    (tmp_path / "set/.cache/lock.txt").write_text("not prompts either")
    sources = (tmp_path / "set", data, data / "*.parquet", tmp_path / "set/**/train-*")
    for source in sources:
        assert [record["prompt"] for record in read(source)] == P
    assert len({digest_source(str(source)) for source in sources}) == 1
    moved = (tmp_path / "set").rename(tmp_path / "elsewhere")
    before = digest_source(str(moved))
    (moved / "data/train-00001-of-00003.parquet").unlink()
    assert digest_source(str(moved)) != before
    for nothing in (tmp_path / "elsewhere/*.txt", tmp_path):
        if nothing == tmp_path:
            nothing = tmp_path / "empty"
            nothing.mkdir()
        with pytest.raises(InputMissing, match=r"has no file that ends in \.txt, .*\.gz; correct prompts.sources"):
            read(nothing)


def test_captions_beside_images_are_a_source(tmp_path: Path):
    """A folder as trainers of LoRAs have it."""
    for n, prompt in enumerate(P):
        (tmp_path / f"{n:03d}.txt").write_text(prompt)
        (tmp_path / f"{n:03d}.png").write_bytes(b"\x89PNG")
    assert [record["prompt"] for record in read(tmp_path)] == P


def test_a_column_of_lists_is_refused(tmp_path: Path):
    parquet.write_table(pyarrow.table({"prompt": [[p, p] for p in P]}), tmp_path / "list.parquet")
    with pytest.raises(ConfigError, match="column 'prompt' holds list<.*>, not text; correct prompts.column"):
        read(tmp_path / "list.parquet")


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("item_id", "partiprompts_12", True),
        ("item_id", "../../../etc/passwd", False),
        ("item_id", "/abs", False),
        ("item_id", "a/b", False),
        ("item_id", "..", False),
        ("item_id", "", False),
        ("item_id", 7, False),
        ("item_id", "x" * 101, False),
        ("style", "anime", True),
        ("style", "..\\..\\x", False),
        ("style", "a\nb", False),
        ("style", "an oil painting, very old", False),
        ("index", 3, True),
        ("index", "3", False),
        ("index", -1, False),
        ("index", True, False),
        ("index", 1.5, False),
        ("note", "any, text; ../ too", True),
        ("note", "x" * 5000, False),
        ("include", [{"class": "apple", "count": NAN}], False),
        ("include", [{"class": "apple", "count": 1}], True),
        ("a\x1b[2Jkey", "value", False),
    ],
)
def test_a_value_that_cannot_be_used_costs_itself(key: str, value: object, kept: bool, tmp_path: Path):
    rows = [{"prompt": "one", key: value}, {"prompt": "two"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = read(tmp_path / "p.jsonl")
    assert [record["prompt"] for record in records] == ["one", "two"]
    assert (records[0].get(key) == value) is kept
    assert (key in records[0]) is kept


def test_what_is_shown_has_no_control_characters(tmp_path: Path):
    row = {"prompt": "a\x1b[31m red\u202e ring", "tag": "col\x1b]0;title\x07our", "note": "two\nlines"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    [record] = read(tmp_path / "p.jsonl")
    assert record == {"prompt": "a[31m red ring", "tag": "col]0;titleour", "note": "two lines"}


SEED = random.SystemRandom().randrange(2**32)
ODD = (
    b"\0",
    b"\xff\xfe",
    b"\xc3",
    b'"',
    b"'",
    b"\r",
    b"\n",
    b"\x1b[2J",
    b"\\",
    b",",
    b"\t",
    b"{",
    b"]",
    b"\xe2\x80\xae",
    b"-" * 9000,
)


def harm(data: bytes, rng: random.Random) -> bytes:
    """The bytes of a file after one to four accidents."""
    for _ in range(rng.randrange(1, 5)):
        at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        accident = rng.choice(["flip", "cut", "insert", "repeat", "drop", "swap", "begin", "shuffle"])
        if accident == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif accident == "cut":
            data = data[:at]
        elif accident == "insert":
            data = data[:at] + rng.choice(ODD) + data[at:]
        elif accident == "repeat":
            data = data[:to] + data[at:to] * rng.randrange(1, 4) + data[to:]
        elif accident == "drop":
            data = data[:at] + data[to:]
        elif accident == "swap":
            data = data.replace(rng.choice((b"\n", b",", b'"', b":")), rng.choice(ODD))
        elif accident == "begin":
            data = rng.choice((*ODD, b"\xef\xbb\xbf", b"PAR1", b"\x1f\x8b", b"[")) + data
        else:
            lines = data.split(b"\n")
            rng.shuffle(lines)
            data = b"\n".join(lines)
    return data


def test_whatever_happened_to_a_file_it_is_read_or_refused_in_one_line(tmp_path: Path):
    """500 files after accidents: prompts that can be used and shown, or one line that can be shown; and soon."""
    print(f"seed {SEED}")
    rng, whole, refused = random.Random(SEED), {}, 0
    for name, content in FILES.items():
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
        whole[name] = path.read_bytes()
        path.unlink()
    for number in range(500):
        name = rng.choice(list(whole))
        file = tmp_path / f"{number}-{name}"
        file.write_bytes(harm(whole[name], rng))
        said: list[str] = []
        try:
            records = list(read_source(str(file), "prompt", Lines(str(file), said.append)))
        except USER_ERRORS as error:
            refused += 1
            assert len(str(error)) < 1000, name
            assert str(error).isprintable(), name
        else:
            for record in records:
                assert isinstance(record["prompt"], str)
                assert record["prompt"].strip()
                json.dumps(record, allow_nan=False).encode()
            digest_source(str(file))
        assert all(len(line) < 1000 and line.isprintable() for line in said), name
        file.unlink()
    assert 50 < refused < 450
