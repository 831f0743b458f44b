"""The stage prompts against a naive reading of the same files, on a pipeline folder that diffusers wrote."""

from __future__ import annotations

import csv
import gzip
import json
import random
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dmdr.config.inputs import Prompts
from dmdr.config.load import load_config
from dmdr.config.run import Config
from dmdr.errors import ConfigError, DataError, InputMissing, Stopped
from dmdr.promptset import PromptSet
from dmdr.teacher.load import load_teacher
from stages import prompts
from stages.prompt_sources import sources
from stages.prompt_sources.report import PromptCounts, Tally
from stages.runtime.context import Context
from stages.runtime.progress import Progress
from stages.store.artifacts import Artifact
from stages.store.inputs import fingerprint_inputs
from tests.support.sealing import PROVENANCE

SEED = random.SystemRandom().randrange(2**32)
WORDS = (
    "red",
    "blue",
    "CIRCLE",
    "Red",
    "nai\u0308ve",
    "na\u00efve",
    "\u2126mega",
    "ß",
    "SS",
    "ss",
    "山",
    "🦊",
    "a\u200db",
)
SPACES = (" ", "  ", "\t", "\u00a0", " \u3000", "\x01 ", " \u202e")


@pytest.fixture
def rng() -> random.Random:
    print(f"seed {SEED}")
    return random.Random(SEED)


def phrase(rng: random.Random) -> str:
    return rng.choice(SPACES).join(rng.choice(WORDS) for _ in range(rng.randrange(1, 4))) + rng.choice(
        ("", " ", "\x7f")
    )


def naive(text: str) -> str:
    """`normalise`, a character at a time."""
    out = ""
    for letter in text:
        if letter.isspace():
            out += " "
        elif unicodedata.category(letter) != "Cc" and letter not in "\u202e\ufeff":
            out += letter
    while "  " in out:
        out = out.replace("  ", " ")
    return unicodedata.normalize("NFC", out.strip(" "))


def selected(**settings: object) -> tuple[list[tuple[str, dict]], PromptCounts, list[str]]:
    tally = Tally()
    said: list[str] = []
    return list(prompts.select_records(Prompts(**settings), tally, said.append)), tally.total(), said


def test_normalising(rng: random.Random) -> None:
    for _ in range(2000):
        text = "".join(chr(rng.choice([rng.randrange(0x250), rng.randrange(0x300, 0x370), 0x2028])) for _ in range(12))
        once = sources.normalise(text)
        assert once == naive(text)
        assert sources.normalise(once) == once
        assert not any(unicodedata.category(letter) == "Cc" for letter in once)


def test_selection_is_what_a_naive_reading_gives(tmp_path: Path, rng: random.Random) -> None:
    for trial in range(20):
        held_out, train = [phrase(rng) for _ in range(30)], [phrase(rng) for _ in range(150)]
        (tmp_path / "h.txt").write_text("\n".join(held_out), encoding="utf-8")
        (tmp_path / "t.txt").write_text("\r\n".join(train) + "\r\n", encoding="utf-8", newline="")
        found, counts, said = selected(sources=[str(tmp_path / "t.txt")], evaluation=str(tmp_path / "h.txt"))
        first: dict[str, tuple[str, str]] = {}
        for split, text in [*(("evaluation", t) for t in held_out), *(("train", t) for t in train)]:
            first.setdefault(naive(text).casefold(), (split, naive(text)))
        assert [(split, record["prompt"]) for split, record in found] == list(first.values()), trial
        assert counts.read == 180 == len(found) + counts.duplicates + counts.overlap
        assert not said


def test_the_split_is_a_function_of_the_text(tmp_path: Path, rng: random.Random) -> None:
    texts = [f"prompt {n}" for n in range(4000)]
    splits = []
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("\n".join(rng.sample(texts, k=len(texts))), encoding="utf-8")
        found, _, _ = selected(sources=[str(tmp_path / name)], evaluation_share=0.25)
        splits.append({record["prompt"]: split for split, record in found})
    assert splits[0] == splits[1]
    share = Counter(splits[0].values())["evaluation"] / 4000
    assert abs(share - 0.25) < 0.035  # 5 standard deviations


def table(path: Path, rows: list[dict]) -> Path:
    """Write rows in the format that the suffix names."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            dialect = "excel" if path.suffix == ".csv" else "excel-tab"
            writer = csv.DictWriter(file, list(rows[0]), dialect=dialect)
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet", ".CSV"])
def test_every_format_says_the_same(suffix: str, tmp_path: Path, rng: random.Random) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    marks = ('"', ",", ";", "''", '""', " ", "'") if suffix == ".tsv" else ('"', ",", "\n", "\t", '""', " ", "'")
    texts = [rng.choice(marks).join(["a" + str(n), rng.choice(marks), phrase(rng)]) for n in range(40)]
    rows = [{"tag": f"t{n % 3}", "Caption": text, "note": f"n {n}"} for n, text in enumerate(texts)]
    if suffix == ".tsv":
        rows = [{**row, "Caption": row["Caption"].replace("\t", " ")} for row in rows]
    path = table(tmp_path / f"p{suffix.lower()}", rows).rename(tmp_path / f"p{suffix}")
    found, counts, said = selected(sources=[str(path)], column="Caption", evaluation_share=1e-9)
    assert [record for _, record in found] == [
        {"tag": row["tag"], "note": row["note"], "prompt": naive(row["Caption"])} for row in rows
    ]
    assert (counts.read, counts.bad, said) == (40, 0, [])


def test_geneval_metadata_stays(tmp_path: Path) -> None:
    row = {
        "tag": "counting",
        "include": [{"class": "apple", "count": 2}],
        "exclude": [{"class": "apple", "count": 3}],
        "prompt": "two apples",
        "score": 0.5,
        "unseen": True,
        "none": None,
        "nested": {"dropped": 1},
        "list": [1],
    }
    found, _, _ = selected(sources=[str(table(tmp_path / "g.jsonl", [row]))], evaluation_share=1e-9)
    assert found[0][1] == {key: value for key, value in row.items() if key not in ("nested", "list")}
    train, _, _ = selected(sources=["lab:train"], evaluation="lab:held-out")
    assert {split for split, _ in train} == {"train", "evaluation"}
    assert all("include" in record and "tag" in record for _, record in train)


BAD_TEXT = {
    b"\xff\xfe broken": "is not UTF-8",
    b"nul \0 here": "NUL",
    b"\x01\x02": "has no prompt",
    b"x" * 4097: "longer than 4,096 bytes",
    b"y" * 300_000: "longer than",
}
BAD_JSON = {
    b"{": "is not JSON",
    b"[1]": "has no 'prompt'",
    b'{"text": "a"}': "has no 'prompt'",
    b'{"prompt": 3}': "no text",
    b'{"prompt": "a\\u0000b"}': "NUL",
    b'{"prompt": "\\ud83d"}': "surrogate",
    b"[" * 4000: "is not JSON",
    b'{"prompt": "a", "prompt": "b"}': "has 'prompt' twice",
}


@pytest.mark.parametrize(("name", "bad"), [("p.txt", BAD_TEXT), ("p.jsonl", BAD_JSON)])
def test_bad_lines_are_named_by_number_and_skipped(name: str, bad: dict, tmp_path: Path, rng: random.Random) -> None:
    count = 100 * len(bad) + 100
    lines = [f"good {n}".encode() if name == "p.txt" else b'{"prompt": "good %d"}' % n for n in range(count)]
    places = sorted(rng.sample(range(count), k=len(bad)))
    for place, line in zip(places, bad, strict=True):
        lines[place] = line
    (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
    found, counts, said = selected(sources=[str(tmp_path / name)], evaluation_share=0.5)
    assert len(found) == count - len(bad)
    assert (counts.read, counts.bad) == (count, len(bad))
    for place, reason, line in zip(places, bad.values(), said, strict=True):
        assert f"line {place + 1:,}, " in line
        assert reason in line
    (tmp_path / name).write_bytes(b"\n".join(lines[: max(places) + 1] + lines[:60][::-1]) + b"\n\xff\n" * 20)
    with pytest.raises(DataError, match=r"of [\d,]+ lines are bad, more than 1%"):
        selected(sources=[str(tmp_path / name)])


def test_only_the_first_ten_bad_lines_are_named(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"".join(b"p %d\n" % n for n in range(3000)) + b"\xff\n" * 25)
    _, counts, said = selected(sources=[str(tmp_path / "p.txt")])
    assert counts.bad == 25
    assert len(said) == 11
    assert "25 bad lines in all" in said[-1]


def test_a_quote_that_never_closes_costs_one_field(tmp_path: Path) -> None:
    rows = [f'{n},"prompt {n}"' for n in range(100_000)]
    rows[50_000] = '50000,"never closed'
    rows[70_000] = "70000,too,many"
    (tmp_path / "p.csv").write_text("id,prompt\n" + "\n".join(rows) + "\n", encoding="utf-8")
    found, counts, said = selected(sources=[str(tmp_path / "p.csv")])
    assert counts.read == 100_000
    assert len(found) == counts.read - counts.bad
    assert 2 <= counts.bad < 1000
    assert "is not CSV" in said[0]
    assert "line 70,002, has 3 fields" in "".join(said)


@pytest.mark.parametrize(
    ("name", "content", "error", "told"),
    [
        ("empty.txt", b"", DataError, "is empty"),
        ("empty.csv", b"prompt,x\n", DataError, "is empty"),
        ("other.csv", b"text,x\na,b\n", ConfigError, "no column 'prompt', it has 'text', 'x'"),
        ("other.tsv", b"text\tx\na\tb\n", ConfigError, "no column 'prompt'"),
        (
            "kind.docx",
            b"",
            ConfigError,
            "has an unknown format; give lab:train, lab:held-out, fashion:train, fashion:held-out, set:NAME, a folder",
        ),
        ("gone.txt", None, InputMissing, "is not a file"),
        ("table.parquet.gz", b"", ConfigError, "unknown format"),
        ("one.json", b'{"prompt": "a"}', DataError, "is dict, not a list"),
        ("two.csv", b"prompt,x,prompt\na,b,c\n", ConfigError, "has the column 'prompt' 2 times; rename all but one"),
        ("two.tsv", b"prompt\tprompt\na\tc\n", ConfigError, "has the column 'prompt' 2 times"),
        ("utf16.txt", "a\nb\n".encode("utf-16"), DataError, "is UTF-16, .* save it as UTF-8"),
        ("latin.txt", "caf\xe9\n".encode("latin-1"), DataError, "most often, one is not UTF-8"),
        ("cut.txt.gz", gzip.compress(b"a prompt\n" * 999, mtime=0)[:-9], DataError, "is not a complete gzip file"),
        ("plain.txt.gz", b"a prompt\n", DataError, "is not a complete gzip file"),
    ],
)
def test_a_source_that_is_not_one(
    name: str, content: bytes | None, error: type[Exception], told: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=told):
        selected(sources=[str(tmp_path / name)])
    with pytest.raises(ConfigError, match="lab:held-out"):
        selected(sources=["lab:nope"])


def test_broken_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = table(tmp_path / "p.parquet", [{"prompt": f"p {n}"} for n in range(1000)])
    with pytest.raises(ConfigError, match="no column 'text', it has 'prompt'"):
        selected(sources=[str(path)], column="text")
    for data in (b"", b"PAR1", path.read_bytes()[:-100], b"PAR1" + path.read_bytes()[100:]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"p\.parquet is not a complete Parquet file"):
            selected(sources=[str(path)])


# The whole stage


def context(config: Config, tmp_path: Path, stop: Callable[[], bool] = lambda: False) -> Context:
    (tmp_path / "out").mkdir()
    artifact = Artifact(str(tmp_path / "runs"), config.run, "prompts")
    artifact.claim({}, {})
    return Context(
        config=config,
        artifact=artifact,
        out=tmp_path / "out",
        cache=tmp_path / "cache",
        progress=Progress("prompts"),
        stop=stop,
    )


def test_the_prompt_set_holds_what_the_teacher_encodes(
    tmp_path: Path, tiny_config: Callable[..., Path], tiny_sd3_folder: Path, rng: random.Random
) -> None:
    rows = [{"prompt": f"{phrase(rng)} {n}", "tag": f"t{n}"} for n in range(45)]
    rows[7]["prompt"] = "very " * 100
    path = table(tmp_path / "p.jsonl", rows)
    config = load_config(tiny_config(prompts={"sources": [str(path)], "shard_size": 16, "evaluation_share": 0.3}))
    made = context(config, tmp_path)
    facts = prompts.run(made)
    report = json.loads((made.out / "report.json").read_text())
    made.artifact.seal(made.out, facts=facts, provenance=PROVENANCE)
    folder = made.artifact.place.root
    assert {**facts, "sources": report["sources"]} == report
    assert facts["truncated"] == 1
    assert facts["read"] == 45 == facts["train"] + facts["evaluation"]
    backbone = load_teacher(tiny_sd3_folder)
    seen = []
    for split in ("train", "evaluation"):
        found = PromptSet(folder, split)
        records = found.records(range(len(found)))
        assert len(found) == facts[split]
        assert len(list(folder.glob(f"{split}-*.jsonl"))) == -(-facts[split] // 16)
        for record, item in zip(records, found.items(range(len(found))), strict=True):
            alone = backbone.encode([record["prompt"]])[0][0]
            assert item.keys() == alone.keys()
            for key in item:
                torch.testing.assert_close(item[key], alone[key], rtol=1e-4, atol=1e-5)
        seen += [(record["prompt"], record["tag"]) for record in records]
    assert sorted(seen) == sorted((naive(row["prompt"]), row["tag"]) for row in rows)
    empty = backbone.encode([""])[0][0]
    for key, tensor in PromptSet.unconditional(folder).items():
        assert torch.equal(tensor, empty[key])


def test_it_stops_when_told_to_and_refuses_an_empty_split(tmp_path: Path, tiny_config: Callable[..., Path]) -> None:
    told = threading.Event()
    made = context(load_config(tiny_config()), tmp_path, stop=told.is_set)
    told.set()
    with pytest.raises(Stopped):
        prompts.run(made)
    held_out = str(tmp_path / "held-out.txt")
    for settings, message in (
        ({"sources": [held_out], "evaluation": held_out}, "no prompt is left to train on"),
        ({"sources": [held_out], "evaluation_share": 1e-9}, "no prompt is left for evaluation"),
    ):
        (tmp_path / message).mkdir()
        with pytest.raises(DataError, match=message):
            prompts.run(context(load_config(tiny_config(prompts=settings)), tmp_path / message))


def test_inputs_are_contents_not_addresses(tmp_path: Path, tiny_config: Callable[..., Path]) -> None:
    config = load_config(tiny_config())
    store = str(tmp_path / "runs")
    found = fingerprint_inputs(config, "prompts", store, "tiny")
    assert found.keys() == {"teacher", "source:0", "evaluation"}
    (tmp_path / "train.txt").rename(tmp_path / "moved.txt")
    moved = {"sources": [str(tmp_path / "moved.txt")], "evaluation": str(tmp_path / "held-out.txt")}
    with pytest.raises(InputMissing, match=r"train\.txt is not a file"):
        fingerprint_inputs(config, "prompts", store, "tiny")
    assert fingerprint_inputs(load_config(tiny_config(prompts=moved)), "prompts", store, "tiny") == found
    (tmp_path / "moved.txt").write_text("something else\n")
    changed = fingerprint_inputs(load_config(tiny_config(prompts=moved)), "prompts", store, "tiny")
    assert {key for key in found if found[key] != changed[key]} == {"source:0"}
    with pytest.raises(InputMissing, match=r"needs prompts, which is not sealed .* run python -m stages prompts"):
        fingerprint_inputs(config, "cold_start", store, "tiny")
