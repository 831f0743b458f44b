"""Public prompt sets by name, against a web server that serves small files in the formats of the real ones."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dmdr.config.inputs import Prompts
from dmdr.config.load import load_config
from dmdr.errors import ConfigError, DataError, InputMissing, StoreError
from dmdr.promptset import PromptSet
from stages import prompts
from stages.prompt_sources import sources
from stages.prompt_sources.public_set_files import Sets
from stages.prompt_sources.public_sets import SETS, File, NamedSet, find_set
from stages.prompt_sources.report import Tally
from stages.runtime.context import Context
from stages.runtime.progress import Progress
from stages.store.artifacts import Artifact
from stages.store.inputs import fingerprint_inputs
from tests.support.sealing import PROVENANCE

ROOT = Path(__file__).parents[4]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "position",
        "include": [
            {"class": "dog", "count": 1},
            {"class": "tie", "count": 1, "position": ["right of", 0]},
        ],
        "prompt": "a photo of a tie right of a dog",
    },
]
QUESTIONS = [  # item_id, text, proposition_id, dependency, question
    ("midjourney7", 'A "tall", red\nhouse, by the sea', "1", "0", "Is there a house?"),
    ("midjourney7", 'A "tall", red\nhouse, by the sea', "2", "1", "Is the house red?"),
    ("12", "Two cats on a sofa", "1", "0", "Are there cats?"),
]
COLUMNS = ("item_id", "text", "proposition_id", "dependency", "question_natural_language")
PARTI = 'Prompt\tCategory\tChallenge\tNote\na "red" cube\tArtifacts\tBasic\t\nlife\tAbstract\tBasic\tBiology\n'


@dataclass
class Site:
    """A web server: what it has, what it was asked, and how it fails."""

    address: str
    files: dict[str, bytes]
    asked: list[str] = field(default_factory=list)
    failing: list[int] = field(default_factory=list)  # statuses of the next answers; 0 breaks off in the middle
    go_on: threading.Event = field(default_factory=threading.Event)  # what is asked for below slow/ stops half way

    def file(self, name: str, **says: str) -> File:
        return File(f"{self.address}/{name}", hashlib.sha256(self.files[name]).hexdigest(), says)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    table = "".join(json.dumps(row) + "\n" for row in GENEVAL).encode()
    (tmp_path / "dpg.csv").write_text("", encoding="utf-8")
    with (tmp_path / "dpg.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *QUESTIONS])
    made = Site(
        "",
        {
            "evaluation_metadata.jsonl": table,
            "dpg_bench.csv": (tmp_path / "dpg.csv").read_bytes(),
            "PartiPrompts.tsv": PARTI.encode(),
            "color_val.txt": b"a red cup\r\na blue cat",
            "shape_val.txt": b"a round table\na square clock\n",
            "anime.json": json.dumps(["a girl in the rain", "a robot"]).encode(),
            "photo.json": json.dumps(["a dog"]).encode(),
            "text_to_image.json": json.dumps([{"input_prompt": "a fox", "output_image": "image/0.png"}]).encode(),
        },
    )

    class Answer(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            made.asked.append(self.path)
            content = made.files.get(self.path.rsplit("/", 1)[-1])
            status = 404 if content is None else made.failing.pop(0) if made.failing else 200
            self.send_response(status or 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.send_header("ETag", f'"{hashlib.sha1(content or b"").hexdigest()}"')  # these two are the hub's
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if content is None or self.command == "HEAD" or status not in (0, 200):
                return
            self.wfile.write(content[: len(content) // 2])
            if status == 0:
                return
            if "slow" in self.path:
                self.wfile.flush()
                made.go_on.wait(60)
            try:
                self.wfile.write(content[len(content) // 2 :])
            except OSError:  # the one who asked was killed
                return

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    made.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield made
    made.go_on.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def sets(site: Site, tmp_path: Path) -> Sets:
    """The sets of the site, by the names of the real ones."""

    def like(name: str, rows: int, *files: File) -> NamedSet:
        return replace(SETS[name], rows=rows, files=files)

    table = {
        "geneval": like("geneval", 3, site.file("evaluation_metadata.jsonl")),
        "dpg-bench": like("dpg-bench", 2, site.file("dpg_bench.csv")),
        "parti": like("parti", 2, site.file("PartiPrompts.tsv")),
        "t2i-compbench": like(
            "t2i-compbench", 4, site.file("color_val.txt", tag="color"), site.file("shape_val.txt", tag="shape")
        ),
        "hpdv2": like("hpdv2", 3, site.file("anime.json", style="anime"), site.file("photo.json", style="photo")),
    }
    return Sets(table=table, cache=tmp_path / "cache", pauses=(0.01, 0.01))


def selected(sets: Sets, **settings: object) -> tuple[list[dict], Tally]:
    tally = Tally()
    found = prompts.select_records(Prompts(evaluation_share=1e-9, **settings), tally, lambda line: None, sets)
    return [record for _, record in found], tally


def others(sets: Sets, name: str, **changes: object) -> Sets:
    return replace(sets, table={**sets.table, name: replace(sets.table[name], **changes)})


def context(config_path: Path, tmp_path: Path) -> Context:
    config = load_config(config_path)
    (tmp_path / "out").mkdir()
    artifact = Artifact(str(tmp_path / "runs"), config.run, "prompts")
    artifact.claim({}, {})
    return Context(
        config=config,
        artifact=artifact,
        out=tmp_path / "out",
        cache=tmp_path / "inputs",
        progress=Progress("prompts"),
        stop=lambda: False,
    )


def test_what_the_records_say(sets: Sets) -> None:
    expected = {
        "geneval": GENEVAL,
        "dpg-bench": [
            {"prompt": 'A "tall", red house, by the sea', "item_id": "midjourney7"},
            {"prompt": "Two cats on a sofa", "item_id": "12"},
        ],
        "parti": [
            {"prompt": 'a "red" cube', "Category": "Artifacts", "Challenge": "Basic"},
            {"prompt": "life", "Category": "Abstract", "Challenge": "Basic", "Note": "Biology"},
        ],
        "t2i-compbench": [
            {"prompt": "a red cup", "tag": "color"},
            {"prompt": "a blue cat", "tag": "color"},
            {"prompt": "a round table", "tag": "shape"},
            {"prompt": "a square clock", "tag": "shape"},
        ],
        "hpdv2": [
            {"prompt": "a girl in the rain", "style": "anime", "index": 0},
            {"prompt": "a robot", "style": "anime", "index": 1},
            {"prompt": "a dog", "style": "photo", "index": 0},
        ],
    }
    for name, records in expected.items():
        assert selected(sets, sources=[f"set:{name}"], column="of the user's own files")[0] == records, name


def test_a_set_is_fetched_once_and_is_the_same_from_a_folder(sets: Sets, site: Site, tmp_path: Path) -> None:
    found = {
        name: (sources.digest_source(f"set:{name}", sets), selected(sets, sources=[f"set:{name}"]))
        for name in sets.table
    }
    assert sorted(site.asked) == sorted(f"/{file.name}" for each in sets.table.values() for file in each.files)
    assert found["geneval"][0] == hashlib.sha256(site.files["evaluation_metadata.jsonl"]).hexdigest()
    assert len({digest for digest, _ in found.values()}) == len(found)
    for name, content in site.files.items():
        (tmp_path / name).write_bytes(content)
    folder, asked = replace(sets, folder=tmp_path), len(site.asked)
    for name, (digest, records) in found.items():
        assert sources.digest_source(f"set:{name}", folder) == digest
        assert selected(folder, sources=[f"set:{name}"]) == records
    (tmp_path / "photo.json").write_bytes(b'["a cat"]')
    with pytest.raises(DataError, match=r"set:hpdv2: photo\.json at .*photo\.json has sha256 [0-9a-f]{12}… instead of"):
        sources.digest_source("set:hpdv2", folder)
    (tmp_path / "photo.json").unlink()
    with pytest.raises(InputMissing, match=r"photo\.json does not exist, .* put http://.*/photo\.json there"):
        sources.digest_source("set:hpdv2", folder)
    assert len(site.asked) == asked


@contextlib.contextmanager
def not_root() -> Iterator[None]:
    """Root may read everything."""
    before = os.geteuid()
    os.seteuid(before or 65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize(
    ("of_file", "of_folder", "told"),
    [
        (0o000, 0o755, "cannot read {}: Permission denied; make it readable for this user"),
        (0o644, 0o600, "{} .*this user may not open its folder"),
    ],
)
def test_what_this_user_may_not_read_is_named(of_file: int, of_folder: int, told: str, sets: Sets) -> None:
    with tempfile.TemporaryDirectory() as place:  # not below tmp_path, which is closed to all but its owner
        table, own = Path(place, "PartiPrompts.tsv"), Path(place, "own.txt")
        for path, content in ((table, PARTI), (own, "a lamp\n")):
            path.write_text(content)
            path.chmod(of_file)
        Path(place).chmod(of_folder)
        for source, path in (("set:parti", table), (str(own), own)):
            with not_root(), pytest.raises(InputMissing, match=told.format(path)):
                sources.digest_source(source, replace(sets, folder=Path(place)))
        Path(place).chmod(0o700)


def test_of_several_files_the_one_that_changed_counts(sets: Sets, site: Site) -> None:
    before = sources.digest_source("set:t2i-compbench", sets)
    color, shape = sets.table["t2i-compbench"].files
    swapped = others(sets, "t2i-compbench", files=(shape, color))
    site.files["shape_val.txt"] = b"a round table\na square cloud\n"
    changed = others(sets, "t2i-compbench", files=(color, site.file("shape_val.txt", tag="shape")))
    assert (
        len(
            {
                before,
                sources.digest_source("set:t2i-compbench", swapped),
                sources.digest_source("set:t2i-compbench", changed),
            }
        )
        == 3
    )


@pytest.mark.parametrize("failing", [[503], [0], [429, 0]])
def test_what_passes_is_tried_again(failing: list[int], sets: Sets, site: Site) -> None:
    site.failing += failing
    assert selected(sets, sources=["set:geneval"])[0] == GENEVAL
    assert len(site.asked) == len(failing) + 1


def test_no_network(sets: Sets, site: Site) -> None:
    told = r"set:geneval: http.*metadata\.jsonl cannot be fetched .* put evaluation_metadata\.jsonl into a folder"
    for failing, asked in (([404], 1), ([503, 0, 502], 3)):
        site.asked.clear()
        site.failing += failing
        with pytest.raises(InputMissing, match=told):
            selected(sets, sources=["set:geneval"])
        assert len(site.asked) == asked
        assert not any(path.name == "evaluation_metadata.jsonl" for path in sets.cache.rglob("*"))
    nobody = others(sets, "geneval", files=(File("http://127.0.0.1:9/evaluation_metadata.jsonl"),))
    with pytest.raises(InputMissing, match=told):
        selected(nobody, sources=["set:geneval"])


def test_a_cache_that_cannot_be_written(sets: Sets, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="set:geneval: cannot write .* set HF_HOME to a writable folder"):
        selected(replace(sets, cache=tmp_path / "file"), sources=["set:geneval"])


def test_another_file_than_is_promised(sets: Sets, site: Site) -> None:
    good, name = site.files["evaluation_metadata.jsonl"], "evaluation_metadata.jsonl"
    site.files[name] = b"<html>log in first</html>"
    with pytest.raises(
        DataError, match=rf"set:geneval: {name} at http://.* has sha256 .* instead of .*; put {name} into"
    ):
        selected(sets, sources=["set:geneval"])
    assert not list(sets.cache.rglob(name))
    site.files[name] = good
    selected(sets, sources=["set:geneval"])
    (kept,) = sets.cache.rglob(name)
    kept.write_bytes(good[:-9])  # damaged since
    assert selected(sets, sources=["set:geneval"])[0] == GENEVAL


@pytest.mark.parametrize("known", [True, False])
def test_another_count_than_is_promised(known: bool, sets: Sets, site: Site) -> None:
    bad = site.files["evaluation_metadata.jsonl"].replace(b'{"tag": "counting"', b'{"tag": counting"')
    site.files["evaluation_metadata.jsonl"] = bad
    file = site.file("evaluation_metadata.jsonl")
    broken = others(sets, "geneval", files=(file if known else replace(file, sha256=None),))
    said: list[str] = []
    with pytest.raises(
        DataError, match="set:geneval should have 3 prompts, but 2 were found in .*; replace each file that differs"
    ):
        list(prompts.select_records(Prompts(sources=["set:geneval"]), Tally(), said.append, broken))
    assert said == ["set:geneval (evaluation_metadata.jsonl), line 2, is not JSON; skipped"]
    with pytest.raises(DataError, match="set:parti should have 3 prompts, but 2 were found"):
        selected(others(sets, "parti", rows=3), sources=["set:parti"])
    site.files["photo.json"] = b'["cut off'
    with pytest.raises(DataError, match=r"set:hpdv2 \(photo\.json\) is not JSON"):
        selected(others(sets, "hpdv2", files=(site.file("photo.json"),)), sources=["set:hpdv2"])


FETCH = """
import sys
from pathlib import Path
from stages.prompt_sources.public_sets import File, NamedSet
from stages.prompt_sources.public_set_files import Sets
table = {"slow": NamedSet("evaluation", "MIT", None, (File(sys.argv[1], None),))}
print(Sets(table=table, cache=Path(sys.argv[2])).find_files("set:slow")[0].path)
"""


@pytest.mark.process
def test_killed_in_the_middle_nothing_looks_whole(site: Site, tmp_path: Path) -> None:
    """Without a known digest, so that only its name says that a file is whole. More than one chunk is written."""
    site.files["long.txt"] = b"a red cup\n" * 500_000
    cache, address = tmp_path / "cache", f"{site.address}/slow/long.txt"
    command = [sys.executable, "-c", FETCH, address, str(cache)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    until = time.monotonic() + 60
    while not any(path.is_file() and path.stat().st_size for path in cache.rglob(".*.begun")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert {path.name for path in cache.rglob("*") if path.is_file()} == {".long.txt.begun", ".long.txt.lock"}
    site.go_on.set()
    found = Path(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip())
    assert found.read_bytes() == site.files["long.txt"]
    assert {path.name for path in found.parent.iterdir()} == {".long.txt.lock", "long.txt"}


FROM_HUB = """
from stages.prompt_sources.lines import Lines
from stages.prompt_sources.sources import read_source
print(list(read_source("set:sharegpt-4o-image@%s", "prompt", Lines("hub", print))))
"""


@pytest.mark.process
def test_a_set_of_the_hub_at_a_commit_of_ones_own(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is pinned to no commit; .* as set:sharegpt-4o-image@COMMIT, 40 hex digits"):
        selected(Sets(), sources=["set:sharegpt-4o-image"])
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": site.address}
    command = [sys.executable, "-c", FROM_HUB % COMMIT]
    for offline in ("0", "1"):  # the second time there is no network
        settings = environment | {"HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_XET": "1"}
        found = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
        assert found.stdout == "[{'output_image': 'image/0.png', 'prompt': 'a fox'}]\n", found.stderr
    path = f"/datasets/FreedomIntelligence/ShareGPT-4o-Image/resolve/{COMMIT}/text_to_image.json"
    assert path in site.asked
    settings |= {"HF_HOME": str(tmp_path / "empty")}
    lost = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True).stderr.strip()
    assert lost.splitlines()[-1].startswith("dmdr.errors.InputMissing: prompt source set:sharegpt-4o-image@")
    assert "put text_to_image.json into a folder" in lost


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("set:genevel", "did you mean set:geneval?"),
        ("set:", "there are geneval, dpg-bench"),
        (f"set:geneval@{COMMIT}", "set:geneval is pinned already; take @0123"),
        ("set:sharegpt-4o-image@main", "main is not a commit; give all 40 hex digits"),
    ],
)
def test_a_name_that_means_nothing(source: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("?", r"\?")):
        find_set(source, SETS)


def test_the_real_table() -> None:
    """Every file is pinned, has a format that is read, and a name by which it alone lies in prompts.folder."""
    by_name: dict[str, set[str]] = {}
    for name, each in SETS.items():
        for file in each.files:
            by_name.setdefault(file.name, set()).add(file.address)
            assert Path(file.name).suffix in sources.READERS_OF_SETS
            assert any(len(part) == 40 for part in file.address.replace("@", "/").split("/")) or name.startswith(
                "share"
            )
            assert file.sha256 is None or len(file.sha256) == 64
    assert all(len(addresses) == 1 for addresses in by_name.values())


# The whole stage


def test_geneval_in_the_prompt_set_and_the_report(
    sets: Sets, site: Site, tmp_path: Path, tiny_config: Callable[..., Path]
) -> None:
    (tmp_path / "own.txt").write_text("A photo of a BENCH\na lamp\na round table\na lamp\n" + "long " * 99 + "\n")
    own = str(tmp_path / "own.txt")
    settings = {"sources": [own, "set:t2i-compbench"], "evaluation": "set:geneval"}
    made = context(tiny_config(prompts=settings), tmp_path)
    facts = prompts.run(made, sets)
    sealed = made.artifact.seal(made.out, facts=facts, provenance=PROVENANCE)
    folder = made.artifact.place.root
    found = PromptSet(folder, "evaluation")
    assert found.records(range(len(found))) == GENEVAL
    trained = PromptSet(folder, "train")
    kept = [record["prompt"] for record in trained.records(range(len(trained)))]
    assert kept == ["a lamp", "a round table", ("long " * 99).strip(), "a red cup", "a blue cat", "a square clock"]

    report = json.loads((folder / "report.json").read_text())
    geneval, file, compbench = report.pop("sources")
    assert facts == report
    assert facts["truncated"] == 1
    assert [facts[name] for name in ("read", "train", "evaluation", "duplicates", "overlap", "bad")] == [
        12,
        6,
        3,
        2,
        1,
        0,
    ]
    for name in ("read", "train", "evaluation", "duplicates", "overlap", "bad"):
        assert facts[name] == sum(each[name] for each in (geneval, file, compbench))
    assert (geneval["input"], geneval["source"], geneval["licence"]) == ("evaluation", "set:geneval", "MIT")
    assert (geneval["promised"], geneval["found"], geneval["kind"]) == (3, 3, "evaluation")
    assert geneval["sha256"] == hashlib.sha256(site.files["evaluation_metadata.jsonl"]).hexdigest()
    assert geneval["files"] == [{"address": f"{site.address}/evaluation_metadata.jsonl", "sha256": geneval["sha256"]}]
    assert (file["overlap"], file["duplicates"], "licence" in file, "source" in file) == (1, 1, False, False)
    assert (compbench["duplicates"], compbench["train"], len(compbench["files"])) == (1, 3, 2)

    for name, content in site.files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "again").mkdir()
    settings["sources"][0] = str(
        Path(own).rename(tmp_path / "again/renamed.txt")
    )  # where they lie is no part of a result
    again = context(tiny_config(prompts={**settings, "folder": str(tmp_path)}), tmp_path / "again")
    facts = prompts.run(again, replace(sets, folder=tmp_path))
    resealed = again.artifact.seal(again.out, facts=facts, provenance=PROVENANCE)
    assert resealed.files == sealed.files


def test_overlap_between_two_named_sets(sets: Sets, site: Site) -> None:
    site.files["photo.json"] = json.dumps(["A red cup"]).encode()
    sets = others(sets, "hpdv2", rows=1, files=(site.file("photo.json", style="photo"),))
    records, tally = selected(sets, sources=["set:t2i-compbench", "set:parti"], evaluation="set:hpdv2")
    assert tally.total().overlap == tally.of_input("source:0").overlap == 1
    assert [record["prompt"] for record in records].count("a red cup") == 0
    assert tally.of_input("source:0").train == 3


def test_the_folder_of_the_config_is_read(tmp_path: Path, tiny_config: Callable[..., Path]) -> None:
    """With the real table: a file by a real name but with another content is refused."""
    path = tiny_config(prompts={"sources": ["set:parti"], "folder": str(tmp_path)})
    with pytest.raises(InputMissing, match=r"PartiPrompts\.tsv does not exist, .* put https://"):
        fingerprint_inputs(load_config(path), "prompts", str(tmp_path / "runs"), "tiny")
    (tmp_path / "PartiPrompts.tsv").write_text(PARTI)
    with pytest.raises(DataError, match=r"has sha256 .* instead of fab29e41bb51…; put https://"):
        fingerprint_inputs(load_config(path), "prompts", str(tmp_path / "runs"), "tiny")
    idle = tiny_config(prompts={"sources": ["lab:train"], "folder": str(tmp_path)})
    with pytest.raises(ConfigError, match="prompts.folder is set but only sources named set:NAME are read"):
        load_config(idle)
