"""A store is believed only as far as it proves itself: whose a file is, what its record says, where its names lead."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dmdr.config.identity import fingerprint
from dmdr.errors import USER_ERRORS, ConfigError, DataError, InputMissing, StoreError
from flows import cli
from stages.store.artifacts import Artifact
from stages.store.published_teachers import TeacherAddress
from stages.store.removal import plan_removal, remove
from stages.store.runs import follow_name, list_promoted, promote_run
from stages.store.shards import Shards
from tests.support.sealing import PROVENANCE
from tests.support.store_bench import IDENTITY, INPUTS, Bench, contents, same, save, sealed, state, write

RECORD = "r/cold_start/record.json"
Change = Callable[[dict], object]


def copy_files(bench: Bench, source: str, target: str) -> None:
    for name in bench.names():
        if name.startswith(f"{source}/"):
            bench.put(f"{target}/{name.removeprefix(f'{source}/')}", bench.get(name))


def edit(bench: Bench, name: str, change: Change) -> None:
    data = json.loads(bench.get(name))
    change(data)
    bench.put(name, json.dumps(data).encode())


# Whose it is


@pytest.mark.parametrize(
    ("identity", "inputs", "told"),
    [
        ({**IDENTITY, "seed": 1}, INPUTS, "seed is 0 there, 1 here"),
        (IDENTITY, {"teacher": "cd" * 32}, "input teacher is abab"),
        (IDENTITY, INPUTS, None),
    ],
)
def test_a_checkpoint_knows_whose_it_is(bench: Bench, identity: dict, inputs: dict, told: str | None) -> None:
    save(bench.artifact("theirs"), 7)
    ours = bench.artifact("ours")
    assert ours.claim(identity, inputs) is None
    copy_files(bench, "theirs/cold_start/checkpoints", "ours/cold_start/checkpoints")
    if told is None:
        assert same(ours.checkpoints(2).newest(), 7), "the same settings and inputs make the same result in any run"
        return
    with pytest.raises(DataError, match=f"step-00000007 is of another result than cold_start of run ours .*{told}"):
        ours.checkpoints(2).newest()
    assert any("ours/cold_start/checkpoints" in name for name in bench.names()), "it is refused, not deleted"


def test_a_checkpoint_of_another_stage_or_of_nobody(bench: Bench, capfd: pytest.CaptureFixture) -> None:
    save(bench.artifact(stage="cold_start"), 3, 4)
    bench.artifact(stage="joint").claim(IDENTITY, INPUTS)
    copy_files(bench, "r/cold_start/checkpoints", "r/joint/checkpoints")
    with pytest.raises(DataError, match="it is of the stage cold_start"):
        bench.artifact(stage="joint").checkpoints(2).newest()
    edit(bench, "r/cold_start/checkpoints/step-00000004/manifest.json", lambda manifest: manifest.pop("identity"))
    assert same(bench.artifact().checkpoints(2).newest(), 3)
    assert "step-00000004 is DAMAGED" in capfd.readouterr().err


def test_a_checkpoint_that_the_stage_cannot_have_is_damaged(bench: Bench, capfd: pytest.CaptureFixture) -> None:
    save(bench.artifact(), 3, 9)

    def check(step: int, info: dict) -> None:
        if step > 5:
            raise ValueError("the stage has 5 updates")

    assert same(bench.artifact().checkpoints(2).newest(check), 3)
    assert "step-00000009 is DAMAGED (the stage has 5 updates)" in capfd.readouterr().err


def test_a_shard_of_other_settings_is_made_again(bench: Bench, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    theirs, ours = bench.artifact("theirs", "evaluate"), bench.artifact("ours", "evaluate")
    theirs.claim(IDENTITY, INPUTS)
    Shards(theirs, tmp_path / "theirs").keep("images-00000.tar", b"theirs", {"seconds": 1.0})
    ours.claim({**IDENTITY, "seed": 1}, INPUTS)
    copy_files(bench, "theirs/evaluate/checkpoints", "ours/evaluate/checkpoints")
    assert Shards(ours, tmp_path / "ours").get("images-00000.tar") is None
    assert "images-00000.tar is DAMAGED (it is of another result); it is made again" in capfd.readouterr().err
    assert Shards(theirs, tmp_path / "again").get("images-00000.tar") is not None


def test_an_unreadable_checkpoint_is_named_and_the_one_before_used(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """A folder where a file should be reads as badly as a broken disk, also for root."""
    artifact = Artifact(str(tmp_path), "r", "joint")
    save(artifact, 1, 2)
    for step in (2, 1):
        manifest = tmp_path / f"r/joint/checkpoints/step-{step:08d}/manifest.json"
        manifest.unlink()
        manifest.mkdir()
        if step == 2:
            assert same(artifact.checkpoints(2).newest(), 1)
            assert "step-00000002 cannot be READ" in capfd.readouterr().err
    with pytest.raises(StoreError, match="delete .*/checkpoints to start from the beginning"):
        artifact.checkpoints(2).newest()


# What is deleted


def test_an_address_with_files_of_others_is_refused(bench: Bench, tmp_path: Path, rng: random.Random) -> None:
    bench.put("r/cold_start/thesis.txt", b"years of work")
    with pytest.raises(ConfigError, match=r"holds thesis\.txt, which DMDR did not write; give another --run"):
        bench.artifact().claim(IDENTITY, INPUTS)
    with pytest.raises(ConfigError, match="which DMDR did not write"):
        plan_removal(bench.url, "r", None)
    with pytest.raises(ConfigError, match="which DMDR did not write"):
        TeacherAddress(bench.url, "r", "cold_start").claim({}, INPUTS)
    assert bench.names() == {"r/cold_start/thesis.txt"}


def test_a_seal_and_a_removal_leave_the_files_of_others(bench: Bench, tmp_path: Path, rng: random.Random) -> None:
    artifact = bench.artifact()
    save(artifact, 1)
    for name in ("notes.txt", "pipeline/notes.txt"):
        bench.put(f"r/cold_start/{name}", b"mine")
    bench.put("r/notes.txt", b"mine")
    killed = next(iter(contents(rng)))
    bench.put(f"r/cold_start/{killed}~0123456789ab", b"of a killed attempt")
    record = sealed(artifact, tmp_path / "out", contents(rng))
    left = {name for name in bench.names() if "/." not in name}
    assert left == {"r/notes.txt"} | {
        f"r/cold_start/{name}"
        for name in (*record.files, "claim.json", "record.json", "notes.txt", "pipeline/notes.txt")
    }
    if bench.root:
        artifact.place._scratch.cleanup()  # its process has ended, as far as the folder can tell
    remove(plan_removal(bench.url, "r", None))
    mine = {"r/notes.txt", "r/cold_start/notes.txt", "r/cold_start/pipeline/notes.txt"}
    assert {name for name in bench.names() if "/." not in name} == mine


# What a record says


def test_weights_changed_with_their_record_are_never_delivered(
    bench: Bench, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    artifact = bench.artifact(stage="export")
    artifact.claim(IDENTITY, INPUTS)
    artifact.seal(write(tmp_path / "out", {"diffusers/w": b"good"}), facts={}, provenance=PROVENANCE)
    promote_run(bench.url, "r", "production")
    bench.put("r/export/diffusers/w", b"evil")

    def forge(record: dict) -> None:
        record["files"]["diffusers/w"]["sha256"] = hashlib.sha256(b"evil").hexdigest()

    edit(bench, "r/export/record.json", forge)
    for command in (["pull", "production", "export", str(tmp_path / "here")], ["status", "r"], ["runs"]):
        assert cli.main([*command, "--store", bench.url]) == 65
        told = capfd.readouterr().err
        assert "was changed after it was written" in told
        assert told.count("\n") == 1
    assert not (tmp_path / "here").exists()

    def forge_all(record: dict) -> None:  # by somebody who knows how fingerprints are made
        record.pop("checksum")
        contents = {name: file["sha256"] for name, file in record["files"].items()}
        parts = {key: record[key] for key in ("stage", "identity", "inputs")}
        record["fingerprint"] = fingerprint({**parts, "files": contents})

    edit(bench, "r/export/record.json", forge_all)
    assert cli.main(["pull", "production", "export", str(tmp_path / "here"), "--store", bench.url]) == 65
    assert "production points at result" in capfd.readouterr().err


def test_a_record_from_before_checksums_is_read(bench: Bench, tmp_path: Path, rng: random.Random) -> None:
    record = sealed(bench.artifact(), tmp_path / "out", contents(rng))
    edit(bench, RECORD, lambda data: data.pop("checksum"))
    assert bench.artifact().record() == record.model_copy(update={"checksum": None})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"schema": 1, "schema": 1, "identity": {}, "inputs": {}}',
        b'{"schema": 1, "identity": NaN, "inputs": {}}',
        b'{"schema": ' + b"9" * 5000 + b', "identity": {}, "inputs": {}}',
        b"\xff\xfe\x00",
        b'{"schema": 1, "identity": {}, "inputs": {}}',
    ],
)
@pytest.mark.parametrize("file", ["record.json", "claim.json", "pointer"])
def test_a_malformed_document_is_one_line_in_every_command(
    tmp_path: Path, capfd: pytest.CaptureFixture, file: str, data: bytes
) -> None:
    bench = Bench(str(tmp_path / "runs"), tmp_path / "runs")
    bench.put("_promoted/production.json" if file == "pointer" else f"r/export/{file}", data)
    commands = [
        ["runs"],
        ["promote", "r", "--as", "production"],
        ["pull", "production", "export", str(tmp_path / "here")],
    ]
    if file != "pointer":
        commands += [["status", "r"], ["rm", "r", "--yes"]]
    for command in commands:
        code, told = cli.main([*command, "--store", bench.url]), capfd.readouterr().err
        assert code in (0, 64, 65, 66), command
        assert told.count("\n") <= 1, told
        assert len(told) < 500, told
        if command[0] == "rm" and code == 0:
            bench.put(f"r/export/{file}", data)


def test_a_pipe_and_an_endless_file_are_no_records(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path), "r", "joint")
    record = tmp_path / "r/joint/record.json"
    record.parent.mkdir(parents=True)
    record.symlink_to("/dev/zero")
    with pytest.raises(StoreError, match="it is no file"):
        artifact.record()
    with record.unlink() or record.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match="larger than 64 MiB"):
        artifact.record()


def test_a_link_cannot_lead_out_of_an_address(tmp_path: Path, rng: random.Random) -> None:
    home = write(tmp_path / "home", {"thesis.txt": b"years of work"})
    artifact = Artifact(str(tmp_path / "runs"), "r", "joint")
    artifact.claim(IDENTITY, INPUTS)
    (tmp_path / "runs/r/joint/checkpoints").symlink_to(home)
    with pytest.raises(DataError, match="leads out of"):
        artifact.checkpoints(2).save(1, state(1), {})
    artifact.seal(write(tmp_path / "out", contents(rng)), facts={}, provenance=PROVENANCE)
    assert (home / "thesis.txt").read_bytes() == b"years of work"
    assert not (tmp_path / "runs/r/joint/checkpoints").is_symlink()


NAMES = (
    "../x",
    "/etc/passwd",
    "a/../../x",
    "a//b",
    "./a",
    "a\\..\\b",
    "a\nb",
    "\x1b[2J",
    "",
    "a/",
    "\u202ea",
    "x" * 2000,
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["name", "stored_as"])
def test_a_file_name_cannot_leave_its_place(tmp_path: Path, rng: random.Random, name: str, where: str) -> None:
    bench = Bench(str(tmp_path / "runs"), tmp_path / "runs")
    sealed(bench.artifact(), tmp_path / "out", contents(rng))

    def forge(record: dict) -> None:
        first = next(iter(record["files"]))
        if where == "name":
            record["files"][name] = record["files"].pop(first)
        else:
            record["files"][first]["stored_as"] = name
        files = {each: file["sha256"] for each, file in record["files"].items()}
        record["fingerprint"] = fingerprint(
            {**{key: record[key] for key in ("stage", "identity", "inputs")}, "files": files}
        )
        record.pop("checksum")

    edit(bench, RECORD, forge)
    with pytest.raises(DataError) as caught:
        bench.artifact().fetch(tmp_path / "cache")
    assert str(caught.value).isprintable()


# Fuzzing


def mutate(data: object, rng: random.Random) -> object:
    """The JSON value with one thing changed: a key or an item dropped, doubled or renamed, or a value replaced."""
    data = copy.deepcopy(data)
    places: list[tuple[dict | list, object]] = []

    def visit(value: object) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            visit(value[key])

    visit(data)
    inside, key = rng.choice(places)
    action = rng.choice(["drop", "rename", "replace", "replace", "tweak"])
    if action == "drop":
        del inside[key]
    elif action == "rename" and isinstance(inside, dict):
        inside[rng.choice(["../../x", "x", "", "é\x1b[31m", "files", "schema"])] = inside.pop(key)
    elif action == "tweak" and isinstance(inside[key], str) and inside[key]:
        at = rng.randrange(len(inside[key]))
        inside[key] = inside[key][:at] + rng.choice("0z/.~\x00") + inside[key][at + 1 :]
    elif action == "tweak" and type(inside[key]) in (int, float):
        inside[key] = rng.choice([-inside[key], inside[key] + 1, 1e300, 2**70])
    else:
        odd = [
            None,
            True,
            -1,
            0,
            1.5,
            2**70,
            "",
            "x",
            "../..",
            "/etc",
            [],
            {},
            [[]],
            {"": ""},
            "\x1b]0;x\x07",
            "a" * 9999,
        ]
        inside[key] = rng.choice(odd)
    return data


def test_no_changed_document_is_believed(tmp_path: Path, rng: random.Random, capfd: pytest.CaptureFixture) -> None:
    """300 changed records, pointers, claims and manifests: refused in one line, or without any effect."""
    bench = Bench(str(tmp_path / "runs"), tmp_path / "runs")
    artifact = bench.artifact(stage="export")
    artifact.claim(IDENTITY, INPUTS)
    artifact.seal(write(tmp_path / "out", contents(rng)), facts={"loss": 0.5}, provenance=PROVENANCE)
    promote_run(bench.url, "r", "production")
    save(bench.artifact(stage="joint"), 1, 2)
    beside = {name: bench.get(name) for name in bench.names() if "/." not in name}
    whole = artifact.record()

    def read_pointer() -> object:
        return follow_name(bench.url, "production"), list_promoted(bench.url)["production"].fingerprint

    def read_checkpoint() -> object:
        found = bench.artifact(stage="joint").checkpoints(2).newest()
        return found.step if found else None

    readers: dict[str, Callable[[], object]] = {
        "r/export/record.json": lambda: artifact.fetch(tmp_path / "cache") and artifact.record(),
        "_promoted/production/000001.json": read_pointer,
        "r/joint/claim.json": lambda: bench.artifact(stage="joint").claim(IDENTITY, INPUTS),
        "r/joint/checkpoints/step-00000002/manifest.json": read_checkpoint,
    }
    harmless = {
        "r/export/record.json": [whole],
        "_promoted/production/000001.json": [("r", whole.fingerprint)],
        "r/joint/claim.json": [None],
        "r/joint/checkpoints/step-00000002/manifest.json": [1, 2],
    }
    refused = 0
    for _ in range(300):
        name = rng.choice(list(readers))
        bench.put(name, json.dumps(mutate(json.loads(beside[name]), rng)).encode())
        try:
            found = readers[name]()
        except USER_ERRORS as error:
            refused += 1
            assert len(str(error)) < 2000
            assert "\n" not in str(error)
        else:
            if name == "r/export/record.json":  # an added key, or a lost checksum, changes nothing that is used
                assert found.fingerprint == whole.fingerprint and found.files == whole.files
            else:
                assert found in harmless[name], name
        bench.put(name, beside[name])
    capfd.readouterr()
    assert refused > 100
    assert {name: bench.get(name) for name in bench.names() if "/." not in name} == beside, "nothing else was touched"


def test_only_the_names_of_a_checkpoint_are_steps(bench: Bench) -> None:
    save(bench.artifact(), 1)
    for name in ("step-9999999999/manifest.json", "step-1/manifest.json", "steps", "step-00000005"):
        bench.put(f"r/cold_start/checkpoints/{name}", b"{}")
    assert same(bench.artifact().checkpoints(2).newest(), 1)
    assert torch.equal(bench.artifact().checkpoints(2).newest().tensors["steps"], torch.tensor(1))


def test_nothing_sealed_is_input_missing(bench: Bench) -> None:
    with pytest.raises(InputMissing, match="is not sealed"):
        bench.artifact().fetch(Path("unused"))
