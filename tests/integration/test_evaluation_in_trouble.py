"""The stage evaluate: killed and repeated, shared by two ranks, with metrics and parts that are not there."""

from __future__ import annotations

import json
import random
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from dmdr.config.load import load_config
from dmdr.errors import DataError, InputMissing, Stopped
from stages import evaluate
from stages.evaluation.samples import build_sample, pack, unpack
from stages.store.artifacts import Artifact
from tests.support.stage_process import command, finish, start
from tests.support.trained_run import context_for, run_stage, seal_stage, trained_run

PROMPTS = 260  # three shards
SAME = ("scorecard.json", "scores.jsonl", "scores.parquet", "grid.png")


@pytest.fixture
def many(tiny_config, tmp_path: Path) -> Callable[..., Path]:
    """Writes the config of a run with so many evaluation prompts, in three shards, of two models."""

    def write(evaluate: dict | None = None, **changes: object) -> Path:
        settings = {"metrics": ["lab-mixer"], "batch_size": 32, "models": ["student", "teacher"]}
        path = tiny_config(evaluate=settings | (evaluate or {}), **changes)
        (tmp_path / "held-out.txt").write_text("".join(f"a red circle, number {n}\n" for n in range(PROMPTS)))
        return path

    return write


def parts(store: Path) -> dict[str, int]:
    """The finished parts of the open stage, and when each was made."""
    folder = store / "tiny" / "evaluate" / "checkpoints"
    manifests = [path.with_name(path.name.removesuffix(".json")) for path in folder.rglob("*.json")]
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in manifests if path.exists()}


def digests(store: Path) -> dict[str, str]:
    files = Artifact(str(store), "tiny", "evaluate").sealed().files
    return {name: at.sha256 for name, at in files.items() if name in SAME or name.startswith("samples/")}


@pytest.fixture
def ready(many, tmp_path: Path) -> Callable[[str], Path]:
    """A store in which only evaluate is left to do."""

    def make(name: str, **changes: object) -> Path:
        config = load_config(many(**changes))
        store = trained_run(config, tmp_path / name)
        seal_stage(config, store, "export")
        return store

    return make


@pytest.mark.process
def test_killed_it_makes_only_what_is_missing_and_ends_with_the_same_card(many, ready):
    config, whole, killed = many(), ready("whole"), ready("killed")
    run_stage(load_config(config), whole, "evaluate")
    rng = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}")
    seen: dict[str, int] = {}
    for wanted in (rng.randint(1, 4), rng.randint(6, 9)):  # of six shards of images, then six of scores
        process = start(command("evaluate", config, killed))
        end = time.monotonic() + 200
        while len(parts(killed)) < wanted and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = parts(killed)
        assert len(now) >= wanted
        assert seen.items() <= now.items(), "a part was made again"
        seen = now
    assert not (killed / "tiny" / "evaluate" / "scorecard.json").exists()
    finish(command("evaluate", config, killed))
    assert digests(killed) == digests(whole)
    assert not (killed / "tiny" / "evaluate" / "checkpoints").exists()


@pytest.mark.process
def test_two_ranks_find_what_one_finds(many, ready):
    one, two = ready("one"), ready("two")
    run_stage(load_config(many()), one, "evaluate")
    finish(command("evaluate", many(execution={"device": "cpu", "processes": 2}), two))
    assert digests(two) == digests(one)


def test_a_damaged_part_is_made_again(many, ready, tmp_path, capfd):
    config, store, whole = load_config(many()), ready("store"), ready("whole")
    answers = iter([False] * 6 + [True])
    with pytest.raises(Stopped):
        evaluate.run(context_for(config, store, "evaluate", stop=lambda: next(answers)))
    (damaged,) = parts(store)  # of the second shard, two batches were drawn
    path = store / "tiny" / "evaluate" / "checkpoints" / damaged
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    run_stage(config, store, "evaluate")
    assert f"{damaged} is DAMAGED" in capfd.readouterr().err
    run_stage(config, whole, "evaluate")
    assert digests(store) == digests(whole)


def test_metrics_without_weights_are_left_out_and_named(many, ready, tmp_path, capfd):
    nowhere = {"aesthetic": str(tmp_path / "none.pth"), "clip-vit-large-patch14": str(tmp_path / "none")}
    store = ready("store")
    config = load_config(many(evaluate={"metrics": ["aesthetic", "lab-mixer"], "limit": 6}, weights=nowhere))
    folder = run_stage(config, store, "evaluate")
    card = json.loads((folder / "scorecard.json").read_text())
    assert {each["name"] for each in card["metrics"]} == {"lab-mixer"}
    (left_out,) = card["missing"]
    assert left_out["metric"] == "aesthetic" and "none.pth does not exist" in left_out["why"]
    assert "aesthetic is left out" in capfd.readouterr().err
    record = Artifact(str(store), "tiny", "evaluate").record()
    assert record.inputs["weights:aesthetic"] == "missing"


def test_without_any_metric_there_is_no_card(many, ready, tmp_path):
    nowhere = {"aesthetic": str(tmp_path / "none.pth"), "clip-vit-large-patch14": str(tmp_path / "none")}
    store = ready("store")
    with pytest.raises(InputMissing, match="none.pth does not exist"):
        run_stage(
            load_config(many(evaluate={"metrics": ["aesthetic"], "limit": 6}, weights=nowhere)), store, "evaluate"
        )


def test_a_row_of_the_table_is_an_image_and_a_figure(many, ready):
    store = ready("store")
    settings = {"metrics": ["lab-mixer", "lab-conv"], "models": ["student"], "seeds": 3, "limit": 50}
    config = load_config(many(evaluate=settings))
    folder = run_stage(config, store, "evaluate")
    rows = parquet.read_table(folder / "scores.parquet").to_pylist()
    by_figure: dict[str, list[dict]] = {}
    for row in rows:
        by_figure.setdefault(row["figure"], []).append(row)
    assert {figure: len(rows) for figure, rows in by_figure.items()} == {
        "lab-mixer": 150,
        "lab-conv": 150,
        "diversity/pixels": 50,
        "diversity/lab-mixer": 50,
    }
    assert {row["image"] for row in by_figure["lab-mixer"]} == {0, 1, 2}
    assert {row["image"] for row in by_figure["diversity/pixels"]} == {None}
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    for figure, found in by_figure.items():
        for line in lines:
            mine = [row["score"] for row in found if row["index"] == line["index"]]
            assert np.mean(mine) == pytest.approx(line["scores"]["student"][figure], abs=1e-12)

    with tarfile.open(folder / "samples" / "student-00000.tar") as tar:
        names = tar.getnames()
    assert names[:5] == [
        "00000/metadata.jsonl",
        *(f"00000/samples/000{n}.png" for n in range(3)),
        "00001/metadata.jsonl",
    ]


def test_benchmarks_beside_rewards(tiny_config, table, tiny_mask2former, tiny_blip, tiny_open_clip, tmp_path):
    """GenEval, DPG-Bench and a reward on one card, each on the prompts that it knows; their scripts' layouts."""
    include = [{"class": "dog", "count": 1}]
    records = [
        {"prompt": "a photo of a dog", "tag": "single_object", "include": include},
        {"prompt": "a red dog", "item_id": "one"},
        {"prompt": "a cup on a table", "item_id": "two"},
        {"prompt": "a fox as a knight", "style": "anime", "index": 17},
    ]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "train.txt").write_text("a hill\na sea\n")
    config = load_config(
        tiny_config(
            prompts={"sources": [str(tmp_path / "train.txt")], "evaluation": str(tmp_path / "bench.jsonl")},
            evaluate={
                "metrics": ["geneval", "dpg-bench", "clip-score"],
                "models": ["student", "teacher"],
                "seeds": 4,
                "batch_size": 16,
            },
            weights={
                "mask2former": str(tiny_mask2former),
                "clip-vit-l-14": str(tiny_open_clip(name="colours")[0]),
                "dpg-questions": str(table),
                "vqa": str(tiny_blip),
                "clip-score": str(tiny_open_clip()[0]),
            },
        )
    )
    store = trained_run(config, tmp_path / "store")
    seal_stage(config, store, "export")
    folder = run_stage(config, store, "evaluate")
    card = json.loads((folder / "scorecard.json").read_text())
    counts = {each["name"]: each["n"] for each in card["metrics"]}
    assert counts == {"geneval": 1, "dpg-bench": 2, "clip-score": 4, "diversity/pixels": 4}
    assert card["missing"] == [] and card["about"]["clip-score"]["prefix"] == "none"
    assert {"geneval", "dpg-bench", "dpg-bench (official)"} <= set(card["tags"])
    for model in ("student", "teacher"):
        (mean,) = [e["mean"] for e in card["metrics"] if (e["name"], e["model"]) == ("dpg-bench", model)]
        assert card["tags"]["dpg-bench"][model]["overall"] == pytest.approx(mean)
        lines = [json.loads(line) for line in (folder / f"answers-{model}.jsonl").read_text().splitlines()]
        assert [line["item_id"] for line in lines] == ["one"] * 4 + ["two"] * 4
        assert len((folder / f"results-{model}.jsonl").read_text().splitlines()) == 4
    assert all(text in (folder / "report.html").read_text() for text in ("dpg-bench", "single_object"))

    with tarfile.open(folder / "samples" / "student-00000.tar") as tar:
        tar.extractall(tmp_path / "samples", filter="data")
    record = json.loads((tmp_path / "samples" / "00000" / "metadata.jsonl").read_text())
    assert record == records[0]
    whole = np.asarray(Image.open(tmp_path / "samples" / "dpg" / "one.png"))
    side = len(whole) // 2
    corners = [(0, 0), (side, 0), (0, side), (side, side)]  # as its script crops: x, then y
    for number, (x, y) in enumerate(corners):
        alone = np.asarray(Image.open(tmp_path / "samples" / "00001" / "samples" / f"000{number}.png"))
        assert np.array_equal(whole[y : y + side, x : x + side], alone)
    assert Image.open(tmp_path / "samples" / "hps" / "anime" / "00017.jpg").size == (side, side)


def test_samples_come_back(tmp_path):
    generator = torch.Generator().manual_seed(seed := random.randrange(2**32))
    print(f"seed {seed}")
    images = torch.rand(3, 2, 3, 5, 4, generator=generator) * 1.4 - 0.2
    images[1, 0, 2, 3, 1] = torch.nan
    samples = [build_sample(n + 7, {"prompt": f"ein Bär, {n}", "tag": "t"}, each) for n, each in enumerate(images)]
    path = tmp_path / "shard.tar"
    path.write_bytes(pack(samples))
    assert pack(samples) == path.read_bytes()
    found = list(unpack(path))
    assert [(each.place, each.record) for each in found] == [(each.place, each.record) for each in samples]
    for n, each in enumerate(found):
        back = each.tensor()
        for s in range(2):
            if (n, s) == (1, 0):
                assert back[s].isnan().all()
            else:
                assert (back[s] - images[n, s].clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6
    assert [each.place for each in unpack(path, {8})] == [8]

    data = path.read_bytes()
    for cut in (100, 700, len(data) // 2, data.rindex(b"IEND")):
        path.write_bytes(data[:cut])
        with pytest.raises(DataError, match=r"shard\.tar"):
            list(unpack(path))
    path.write_bytes(data.replace(b"IDAT", b"IDOT"))
    with pytest.raises(DataError, match=r"image 0000\d/samples/000\d\.png does not read"):
        list(unpack(path))
