"""Many prompts: killed and resumed by shard, read in part from a store, encoded in several ways to the same numbers."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from dmdr.backbones.protocol import Item
from dmdr.config.batches import count_trajectories
from dmdr.config.load import load_config
from dmdr.errors import DataError, Stopped
from dmdr.promptset import PromptSet
from dmdr.promptset.encode import convert
from dmdr.rollout import prompt_order
from dmdr.shared_base import SharedBase
from dmdr.teacher.half_storage import store_in_half
from stages import prompts as prompts_stage
from stages.runtime.prompt_inputs import PromptInputs
from stages.store.artifacts import Artifact
from stages.store.sealed_files import SealedFiles
from tests.support.s3_proxy import Faults
from tests.support.s3_server import BUCKET, spoil
from tests.support.sealing import PROVENANCE
from tests.support.stage_process import command, finish, start
from tests.support.tiny_teachers import copy_teacher
from tests.support.trained_run import context_for, run_stage, seal_stage
from tests.support.training_results import TRAINING, assert_same, digests

SHARD = 8
WAYS = {"joined": {}, "rows": {"encode": "stage", "dtype": "bfloat16"}, "text": {"encode": "on_the_fly"}}


class Sources(NamedTuple):
    """A file of prompts and the settings to read it."""

    file: Path
    settings: dict


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    rng = random.Random(5)
    words = ["red", "circle", "apple", "sea", "owl", "map", "snow", "glass"]
    texts = [" ".join(rng.choices(words, k=rng.randrange(1, 9))) + f" {n}" for n in range(60)]
    file = tmp_path / "many.txt"
    file.write_text("\n".join(texts) + "\n")
    return Sources(file, {"sources": [str(file)], "shard_size": SHARD, "evaluation_share": 0.2})


def kept(store: Path) -> set[str]:
    return {path.name for path in (store / "tiny/prompts/checkpoints").glob("*.json")}


@pytest.mark.process
@pytest.mark.parametrize("way", ["joined", "rows"])
def test_killed_prompts_go_on_after_the_last_shard(tiny_config, sources: Sources, tmp_path: Path, way: str) -> None:
    config = tiny_config(prompts={**sources.settings, **WAYS[way], "shard_size": 2})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_stage(load_config(config), whole, "prompts")
    kills = 0
    while kills < 2:
        before = kept(killed)
        process = start(command("prompts", config, killed))
        while not kept(killed) - before and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        err = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, err
        assert before <= kept(killed)
        assert not before or re.search(r"goes on after \d+ shards of an earlier attempt", err), err
        kills += 1
    left = len(kept(killed))
    err = finish(command("prompts", config, killed))
    assert f"goes on after {left} shards of an earlier attempt" in err
    assert digests(killed, "prompts") == digests(whole, "prompts")
    assert not list((killed / "tiny/prompts/checkpoints").glob("*"))
    records = [json.loads((store / "tiny/prompts/record.json").read_text()) for store in (whole, killed)]
    assert records[0]["fingerprint"] == records[1]["fingerprint"]
    assert records[0]["facts"] == records[1]["facts"]


def stopped_after(config, store: Path, shards: int) -> None:
    """Run the stage prompts until so many shards are finished."""
    context = context_for(config, store, "prompts", stop=lambda: len(kept(store)) >= shards)
    with pytest.raises(Stopped, match="shards that are finished are kept"):
        prompts_stage.run(context)


@pytest.mark.parametrize("harm", ["bit", "missing", "manifest", "owner", "another file"])
def test_a_shard_that_is_not_what_it_says_is_made_again(
    tiny_config, sources: Sources, tmp_path: Path, harm: str, capsys: pytest.CaptureFixture
) -> None:
    config = load_config(tiny_config(prompts={**sources.settings, **WAYS["rows"]}))
    whole, store = tmp_path / "whole", tmp_path / "store"
    seal_stage(config, whole, "prompts")
    stopped_after(config, store, 3)
    part = sorted(kept(store))[1].removesuffix(".json")
    shard, manifest = store / f"tiny/prompts/{part}.items", store / f"tiny/prompts/checkpoints/{part}.json"
    told = json.loads(manifest.read_text())
    if harm == "bit":
        data = bytearray(shard.read_bytes())
        data[len(data) // 3] ^= 4
        shard.write_bytes(data)
    elif harm == "missing":
        shard.unlink()
    elif harm == "manifest":
        manifest.write_text("[" * 5)
    elif harm == "owner":
        manifest.write_text(json.dumps({**told, "owner": "0" * 64}))
    else:
        manifest.write_text(json.dumps({**told, "files": {"../../claim.json": told["files"][f"{part}.items"]}}))
    run_stage(config, store, "prompts")
    err = capsys.readouterr().err
    assert f"{part} is DAMAGED (" in err
    assert "it is made again" in err
    assert digests(store, "prompts") == digests(whole, "prompts")


@pytest.mark.parametrize("harmed", [False, True])
def test_the_next_attempt_on_s3_goes_on_too(
    tiny_config, sources: Sources, tmp_path: Path, s3: str, far: str, harmed: bool, capsys: pytest.CaptureFixture
) -> None:
    config = load_config(tiny_config(prompts={**sources.settings, **WAYS["rows"]}))
    seal_stage(config, tmp_path / "whole", "prompts")
    place = Artifact(far, "tiny", "prompts").place
    first = context_for(config, far, "prompts", stop=lambda: "checkpoints/train-00001.json" in place.names())
    with pytest.raises(Stopped, match="the shards that are finished are kept"):
        prompts_stage.run(first)
    if harmed:
        spoil(f"{far}/tiny/prompts", "train-00001.items", b"something else")
    second = context_for(config, far, "prompts")
    record = second.artifact.seal(second.out, facts=prompts_stage.run(second), provenance=PROVENANCE)
    assert {name: file.sha256 for name, file in record.files.items()} == digests(tmp_path / "whole", "prompts")
    assert ("DAMAGED" in capsys.readouterr().err) == harmed
    assert (record.files["train-00001.items"].stored_as is not None) == harmed
    stored = {file.stored_as or name for name, file in record.files.items()}
    assert stored <= {*place.names()} and not [name for name in place.names() if "checkpoints" in name]
    artifact = Artifact(far, "tiny", "prompts")
    assert_equal(read_all(artifact.fetch(tmp_path / "pulled")), read_all(tmp_path / "whole/tiny/prompts"))


# Encoded in several ways


def read_all(folder: Path, split: str = "train") -> list[Item]:
    found = PromptSet(folder, split)
    return found.items(range(len(found)))


@pytest.mark.parametrize("family", ["sd3", "sdxl", "z_image", "flux"])
def test_each_way_gives_the_same_numbers(
    tiny_config, sources: Sources, tmp_path: Path, request: pytest.FixtureRequest, family: str
) -> None:
    """bfloat16 is float32 rounded once, and what is encoded on the fly is what is stored."""
    teacher = {"path": str(request.getfixturevalue(f"tiny_{family}_folder")), "guidance_scale": 3.0, "steps": 2}
    if family == "z_image":
        teacher["resolution"] = 64
    found: dict[str, list[Item]] = {}
    for way in WAYS:
        config = load_config(tiny_config(prompts={**sources.settings, **WAYS[way]}, teacher=teacher))
        store = tmp_path / way
        run_stage(config, store, "prompts")
        inputs = PromptInputs(context_for(config, store, "cold_start"))
        backbone = inputs.load_teacher("cpu")
        assert inputs.open_split("train").layout == way
        encoded = inputs.open_encoded("train", backbone)
        found[way] = encoded.items(list(range(len(encoded))))
        assert (backbone.pipe.text_encoder is None) == (way != "text")
    for exact, rounded, anew in zip(*found.values(), strict=True):
        for key, value in exact.items():
            assert torch.equal(rounded[key], value.to(torch.bfloat16))
            torch.testing.assert_close(anew[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sd3", "sdxl", "z_image", "flux"])
def test_networks_in_bfloat16_round_the_states_themselves(family: str, request: pytest.FixtureRequest) -> None:
    """So states that are stored in bfloat16 are the same numbers for them."""
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    backbone = copy_teacher(folder, resolution=64 if family == "z_image" else None)
    SharedBase(backbone, fake_rank=2, fake_scale=2.0, student_rank=None, seed=0, compute=torch.bfloat16)
    items, _ = backbone.encode(["a red circle", "two owls at night"])
    exact, rounded = backbone.collate(items), backbone.collate([convert(item, torch.bfloat16) for item in items])
    assert all(torch.equal(exact[key], rounded[key]) for key in exact)


def test_weights_in_half_precision_give_the_same_numbers(tiny_sd3_folder: Path) -> None:
    backbone = copy_teacher(tiny_sd3_folder)
    dtypes = {"text_encoder": torch.bfloat16, "text_encoder_2": torch.float16}  # the third is left as it is
    for name, dtype in dtypes.items():
        for parameter in getattr(backbone.pipe, name).parameters():
            parameter.data = parameter.data.to(dtype).float()
    prompts = ["a red circle", "two owls at night"]
    before, _ = backbone.encode(prompts)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        store_in_half(getattr(backbone.pipe, name))
        stored = {each.dtype for each in getattr(backbone.pipe, name).parameters() if each.ndim == 2}
        assert stored == {torch.float32, dtypes.get(name, torch.float32)}
    after, _ = backbone.encode(prompts)
    assert_equal(after, before)


def test_evaluation_draws_prompts_that_are_encoded_on_the_fly(tiny_config, sources: Sources, tmp_path: Path) -> None:
    evaluate = {"metrics": ["lab-mixer"], "models": ["teacher"], "batch_size": 4}
    means = []
    for way in WAYS:
        config = load_config(tiny_config(prompts={**sources.settings, **WAYS[way]}, evaluate=evaluate))
        seal_stage(config, tmp_path / way, "prompts")
        card = json.loads((run_stage(config, tmp_path / way, "evaluate") / "scorecard.json").read_text())
        means.append(card["metrics"][0]["mean"])
    assert means == pytest.approx([means[0]] * 3, abs=0.02)


def test_training_that_encodes_on_the_fly_is_training(tiny_config, sources: Sources, tmp_path: Path) -> None:
    """Both ways, also a thread ahead, give the same student; a stage that is resumed gives the same bits."""
    few = {**TRAINING, "updates": 2, "batch_size": 2, "fake_updates": 2, "dynamic": {"updates": 2}}
    joint = {**few, "rl": None, "watch": {"every": 1, "reward": "lab-mixer", "prompts": 3}}
    stored = tiny_config(prompts=sources.settings, cold_start=few, joint=joint)
    for stage in ("prompts", "cold_start", "joint"):
        run_stage(load_config(stored), tmp_path / "stored", stage)
    for name in ("device", "cpu"):
        execution = {"device": "cpu", "checkpoint_every": 1, "text_encoders": name}
        changes = {"prompts": {**sources.settings, **WAYS["text"]}, "execution": execution}
        config = load_config(tiny_config(cold_start=few, joint=joint, **changes))
        for stage in ("prompts", "cold_start", "joint"):
            run_stage(config, tmp_path / name, stage)
            if stage != "prompts":
                assert_same(tmp_path / name, tmp_path / "stored", stage)
    assert digests(tmp_path / "device", "joint") == digests(tmp_path / "cpu", "joint")


def test_a_large_set_is_encoded_on_the_fly(
    tiny_config, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = load_config(tiny_config(prompts=sources.settings))
    small = run_stage(config, tmp_path / "small", "prompts")
    monkeypatch.setattr("dmdr.promptset.encode.MOST_STORED", 10_000)
    large = run_stage(config, tmp_path / "large", "prompts")
    assert not list(large.glob("*.items")) and not list(large.glob("train-*.safetensors"))
    assert "they are encoded on the fly: only their texts are stored" in capsys.readouterr().err
    assert sum(f.stat().st_size for f in large.glob("train-*")) < 0.1 * sum(
        f.stat().st_size for f in small.glob("train-*")
    )
    kept_small, kept_large = (json.loads((each / "record.json").read_text()) for each in (small, large))
    assert kept_small["identity"] == kept_large["identity"]
    assert kept_large["facts"] == {**kept_small["facts"], "encode": "on_the_fly"}


# Read in part, from S3


@pytest.fixture
def far(tmp_path: Path) -> str:
    return f"s3://{BUCKET}/{tmp_path.name}/runs"


def upload(store: Path, far: str, config) -> Artifact:
    """Seal the prompts of a local store on S3 too."""
    context = context_for(config, far, "prompts")
    folder = store / "tiny/prompts"
    record = json.loads((folder / "record.json").read_text())
    for name in record["files"]:
        shutil.copyfile(folder / name, context.out / name)
    context.artifact.seal(context.out, facts=record["facts"], provenance=PROVENANCE)
    return context.artifact


@pytest.mark.parametrize("way", ["joined", "rows"])
def test_only_what_is_needed_is_read(
    tiny_config, sources: Sources, tmp_path: Path, proxy: Faults, far: str, way: str
) -> None:
    config = load_config(tiny_config(prompts={**sources.settings, **WAYS[way]}))
    near = seal_stage(config, tmp_path / "near", "prompts")
    artifact = upload(tmp_path / "near", far, config)
    expected, size = read_all(near), sum(path.stat().st_size for path in near.glob("*.*"))
    files = SealedFiles(artifact, tmp_path / "cache", 2**30)
    train = PromptSet(files, "train", sizes=PromptSet(near, "train").sizes)
    proxy.seen.clear()
    proxy.sizes.clear()
    assert_equal(train.items([9, 3, 9]), [expected[n] for n in (9, 3, 9)])
    ends = (".items", ".safetensors") if way == "rows" else (".safetensors",)
    asked = {line.split("/")[-1].split("?")[0] for line in proxy.seen if line.startswith("GET") and "train-" in line}
    assert {name.split(".")[0] for name in asked if name.endswith(ends)} == {"train-00000", "train-00001"}
    print(f"{way}: {proxy.sent:,} of {size:,} bytes")
    assert proxy.sent < size * (0.6 if way == "joined" else 0.3)
    before = proxy.sent
    assert_equal(train.items([3, 9]), [expected[n] for n in (3, 9)])
    assert proxy.sent == before, "what is kept is not asked for again"


def assert_equal(found: list[Item], expected: list[Item]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("way", ["joined", "rows"])
def test_the_cache_is_bounded(tiny_config, sources: Sources, tmp_path: Path, s3: str, far: str, way: str) -> None:
    config = load_config(tiny_config(prompts={**sources.settings, **WAYS[way]}))
    near = seal_stage(config, tmp_path / "near", "prompts")
    artifact = upload(tmp_path / "near", far, config)
    expected, cache = read_all(near), tmp_path / "cache"
    limit = max(path.stat().st_size for path in near.glob("train-*")) * 2
    train = PromptSet(SealedFiles(artifact, cache, limit), "train")
    rng = random.Random(1)
    for _ in range(15):
        indices = rng.choices(range(len(train)), k=3)
        assert_equal(train.items(indices), [expected[n] for n in indices])
        train.records(indices)
        assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) <= limit


@pytest.mark.parametrize("way", ["joined", "rows"])
def test_what_arrives_wrong_is_asked_for_again_and_then_one_line(
    tiny_config, sources: Sources, tmp_path: Path, proxy: Faults, far: str, way: str
) -> None:
    config = load_config(tiny_config(prompts={**sources.settings, **WAYS[way]}))
    near = seal_stage(config, tmp_path / "near", "prompts")
    artifact, expected = upload(tmp_path / "near", far, config), read_all(near)
    name = "train-00001.items" if way == "rows" else "train-00001.safetensors"
    train = PromptSet(SealedFiles(artifact, tmp_path / "cache", 2**30), "train")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    train = PromptSet(SealedFiles(artifact, tmp_path / "cache", 2**30), "train", sizes=train.sizes)
    proxy.flip, proxy.flipped = name, 2
    assert_equal(train.items([SHARD]), [expected[SHARD]])
    assert proxy.flipped == 0
    fresh = PromptSet(SealedFiles(artifact, tmp_path / "fresh", 2**30), "train", sizes=train.sizes)
    proxy.flipped = 99
    with pytest.raises(DataError, match=rf"{name} is damaged.* run prompts again$") as raised:
        fresh.items([SHARD])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("stage", ["cold_start", "joint"])
def test_two_ranks_read_only_the_rows_they_need(
    tiny_config: Callable[..., Path], sources: Sources, tmp_path: Path, proxy: Faults, far: str, stage: str
) -> None:
    """A stage of two processes on S3: the rows of its own prompts are all that either of them reads."""
    sources.file.write_text("\n".join(f"a red circle of number {n}" for n in range(200)) + "\n")
    settings = {**sources.settings, **WAYS["rows"], "evaluation_share": 0.05}
    training = {**TRAINING, "updates": 2, "batch_size": 2}
    path = tiny_config(
        prompts=settings, cold_start=training, joint=training, execution={"device": "cpu", "processes": 2}
    )
    config = load_config(path)
    near = seal_stage(config, tmp_path / "near", "prompts")
    upload(tmp_path / "near", far, config)
    if stage == "joint":
        finish(["stages", "cold_start", "--config", str(path), "--store", far])
    proxy.seen.clear()
    proxy.sizes.clear()
    finish(["stages", stage, "--config", str(path), "--store", far])
    asked = [re.search(r"(train-\d+)\.items", line) for line in proxy.seen if line.startswith("GET")]
    total, read = len(PromptSet(near, "train")), sum(size for line, size in proxy.sizes if ".items" in line)
    met = training["updates"] * count_trajectories(2, training["fake_updates"], config.student.steps)
    order = prompt_order(config.seed, stage, 0, met, total)
    whole = sum(path.stat().st_size for path in near.glob("train-*.items"))
    print(f"{met} prompts met by two ranks; {read:,} of {whole:,} bytes")
    assert {found[1] for found in asked if found} == {f"train-{index // SHARD:05d}" for index in order}
    row = max(path.stat().st_size for path in near.glob("train-*.items")) / SHARD
    assert read <= (met + 2) * row, "each row once, and the empty prompt of each rank"
