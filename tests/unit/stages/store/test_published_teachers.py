"""Published teachers, in a folder and on S3: whole or invisible, never changed; and what stages make of addresses."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from safetensors.numpy import save_file

from dmdr.config.load import load_config
from dmdr.config.names import NAME
from dmdr.errors import DataError
from dmdr.teacher import digests
from flows import cli
from stages.store.artifacts import Artifact
from stages.store.published_teachers import PublishedTeacher, Revision, list_published, publish_teacher
from stages.store.revisions import run_name
from stages.store.teacher_folder import resolve_teacher
from tests.support.s3_server import BUCKET, spoil
from tests.support.stage_process import refused, run_stages
from tests.support.trained_run import trained_run

ROOT = Path(__file__).parents[4]
LAB = ROOT / "dmdr" / "lab" / "teachers"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMDR_CACHE", str(tmp_path / "cache"))


def publish(store: str, folder: Path, name: str = "lab", revision: str | None = None) -> PublishedTeacher:
    return publish_teacher(str(folder), name, revision, store, lambda here, total: None)


def fetched(config: Path, address: str) -> Path:
    """The local folder that a stage gets for an address."""
    return Path(resolve_teacher(load_config(config), address, lambda here: None).teacher.path)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_published_teacher_is_the_same_teacher(store, tiny_config, tmp_path, capsys):
    source = Path(shutil.copytree(LAB / "fashion", tmp_path / "mine"))
    (source / "empty.txt").touch()
    digest, before = digests.digest(source), contents(source)
    with temporary_settings({PREFECT_API_URL: None}):
        for _ in range(2):
            assert cli.main(["teachers", "publish", str(source), "--as", "fashion", "--to", store]) == 0
            told = capsys.readouterr()
            address = f"{store}/fashion/{digest[:12]}"
            assert told.out == f"fashion@{digest[:12]}, sha256 {digest}, is published at {address}\n"
            assert "no Prefect API is configured" in told.err
    assert contents(source) == before, "the source stays as it was"
    assert [(each.address, each.digest) for each in list_published(store)] == [(address, digest)]
    assert cli.main(["teachers", "list", "--at", store]) == 0
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")[1:-1]]
    assert row[:3] == [f"fashion@{digest[:12]}", "sd3", f"{digest[:12]}…"] and row[-1] == address

    found = fetched(tiny_config(), address)
    assert contents(found) == before
    assert found.name == f"fashion@{digest[:12]}", "that is what records and model cards call it"


def test_what_may_not_be_published(tmp_path, capsys):
    """Each in one line, with its exit code; nothing of it can be listed."""
    store = str(tmp_path / "teachers")
    publish(store, LAB / "fashion", revision="1")
    broken = {name: Path(shutil.copytree(LAB / "flow", tmp_path / name)) for name in ("cut", "hollow", "foreign")}
    weights = next((broken["cut"] / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-10])
    shutil.rmtree(broken["hollow"] / "vae")
    (broken["foreign"] / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    (tmp_path / "nothing").mkdir()
    for code, folder, name, revision, said in (
        (64, LAB / "flow", "lab", "1", "belongs to another teacher than"),
        (64, LAB / "flow", "La b", "1", "--as 'La b' must be small letters"),
        (64, LAB / "flow", "lab", "../1", "--revision '../1' must be small letters"),
        (65, broken["cut"], "cut", "1", "diffusion_pytorch_model.safetensors is damaged"),
        (65, broken["hollow"], "hollow", "1", "lacks vae, which its model_index.json names"),
        (65, broken["foreign"], "foreign", "1", "is a KandinskyPipeline; DMDR knows"),
        (65, tmp_path / "nothing", "nothing", "1", "has no model_index.json"),
        (66, tmp_path / "nowhere", "nowhere", "1", "no such folder"),
    ):
        command = ["teachers", "publish", str(folder), "--as", name, "--revision", revision, "--to", store]
        assert cli.main(command) == code
        told = capsys.readouterr()
        assert said in told.err and told.err.count("\n") == 1 and told.out == ""
    assert [each.address for each in list_published(store)] == [f"{store}/lab/1"]


def test_a_prefect_that_does_not_answer_is_said(tmp_path, capsys):
    store = str(tmp_path / "teachers")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", "PREFECT_CLIENT_MAX_RETRIES": 0}):
        assert cli.main(["teachers", "publish", str(LAB / "fashion"), "--as", "lab", "--to", store]) == 74
    told = capsys.readouterr().err
    assert "is published, but the Prefect API at http://127.0.0.1:9/api, " in told
    assert "did not take the event" in told
    assert [each.name for each in list_published(store)] == ["lab"]


PUBLISHER = """
import os, sys
import s3fs  # before the fork: no thread is running yet, and a kill meets the publisher, not an import
import safetensors.numpy
from stages.store.published_teachers import publish_teacher

for line in sys.stdin:
    folder, name, revision, to = line.split()
    child = os.fork()
    if child == 0:
        publish_teacher(folder, name, revision, to, lambda here, total: None)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def write_teacher(folder: Path, rng: random.Random) -> Path:
    """A folder that looks like a teacher: an index, an autoencoder's config and three files of 1 MiB."""
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    for part in parts:
        (folder / part).mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline", **parts}))
    (folder / "vae/config.json").write_text("{}")
    for n in range(3):
        weights = {"weight": np.frombuffer(rng.randbytes(2**20), np.uint8)}
        save_file(weights, folder / "unet" / f"{n}.safetensors")
    return folder


@pytest.mark.process
def test_a_killed_publisher_leaves_a_teacher_whole_or_invisible(store, tiny_config, tmp_path):
    """SIGKILL at random instants; what goes on from it ends with the same bytes."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng, kills = random.Random(seed), 5 if store.startswith("s3://") else 12
    source = write_teacher(tmp_path / "source", rng)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", PUBLISHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as publisher:

        def published_until(delay: float | None, revision: int) -> bool:
            """Publish, with a kill after so many seconds; whether it ended by itself."""
            print(source, "lab", revision, store, file=publisher.stdin, flush=True)
            child = int(publisher.stdout.readline())
            if delay is not None:
                time.sleep(delay)
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            status = int(publisher.stdout.readline())
            assert status in (0, signal.SIGKILL)
            return status == 0

        times = []
        for revision in range(3):
            began = time.monotonic()
            assert published_until(None, revision)
            times.append(time.monotonic() - began)
        whole, revision, cut, done = min(times), 3, 0, {0, 1, 2}
        while cut < kills:
            ended = published_until(rng.uniform(0, whole), revision)
            cut += not ended
            visible = {int(each.revision) for each in list_published(store)}
            assert visible - done <= {revision} and done <= visible
            assert revision in visible or not ended
            done = visible
            revision += revision in visible or rng.random() < 0.3  # else the next one goes on from what this one left
        for each in set(range(revision + 1)) - done:
            assert published_until(None, each)
        publisher.stdin.close()
    print(f"{cut} kills in {revision + 1} revisions, a publication takes {whole:.2f} s")
    listed = list_published(store)
    assert {int(each.revision) for each in listed} == set(range(revision + 1))
    wanted, config = contents(source), tiny_config()
    for each in listed:
        assert contents(fetched(config, each.address)) == wanted


@pytest.mark.process
def test_a_stage_runs_on_a_published_teacher(s3, tiny_config, tiny_sd3_folder, tmp_path):
    """For real; the digest is what counts, so another address of the same teacher is the same input."""
    store = f"s3://{BUCKET}/{tmp_path.name}"
    made = publish(store, tiny_sd3_folder, "tiny", "one")
    config = tiny_config(teacher={"path": "/models/nowhere", "guidance_scale": 3.0, "steps": 3})
    prompts = ("prompts", "--config", str(config), "--teacher")
    sealed = run_stages(*prompts, made.address, cwd=tmp_path)
    assert sealed.returncode == 0, sealed.stderr
    record = Artifact(str(tmp_path / "runs"), "tiny", "prompts").sealed()
    assert record.inputs["teacher"] == digests.digest(tiny_sd3_folder) == made.digest
    assert record.provenance.teacher == "tiny@one"
    again = run_stages(*prompts, str(tiny_sd3_folder), cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, "prompts: sealed already at runs/tiny/prompts\n"), again.stderr

    refused(run_stages(*prompts, f"{store}/tiny/two", cwd=tmp_path), 66, f"no teacher is published at {store}/tiny/two")
    refused(run_stages(*prompts, str(LAB / "fashion"), cwd=tmp_path), 64, "input teacher is")
    refused(run_stages(*prompts, "s3://one", cwd=tmp_path), 64, "is not PREFIX/NAME/REVISION")
    refused(run_stages(*prompts, "one.safetensors", cwd=tmp_path), 64, "teacher one.safetensors", "teacher.parts")


def test_a_damaged_teacher_is_never_used(store, tiny_config, tmp_path):
    made = publish(store, LAB / "fashion", revision="1")
    spoil(store, "lab/1/lab@1/vae/config.json", b"{}")
    config = tiny_config()
    with pytest.raises(DataError, match="publish (it|that teacher) again under another --revision"):
        fetched(config, made.address)
    assert not (tmp_path / "cache" / "teachers" / made.digest / "lab@1").exists()
    whole = publish(store, LAB / "fashion", revision="2")
    folder = fetched(config, whole.address)
    spoil(store, "lab/2/record.json", None)
    assert [each.revision for each in list_published(store)] == ["1"]
    assert digests.digest(folder) == whole.digest


def test_what_is_fetched_is_fetched_once_and_goes_on(s3, tiny_config, tmp_path):
    store = f"s3://{BUCKET}/{tmp_path.name}"
    made, config = publish(store, LAB / "flow", revision="1"), tiny_config()
    seen: list[int] = []

    def interrupted(here: int) -> None:
        seen.append(here)
        if here > 10**6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve_teacher(load_config(config), made.address, interrupted)
    begun = next((tmp_path / "cache").rglob(".lab@1.begun"))
    kept = {path: path.stat().st_mtime_ns for path in begun.rglob("*") if path.is_file()}
    assert kept and 10**6 < max(seen) < sum(file.size for file in made.record.files.values())
    folder = fetched(config, made.address)
    assert contents(folder) == contents(LAB / "flow")
    times = {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    whole = [path for path in kept if times[path.relative_to(begun / "lab@1")] == kept[path]]
    assert len(whole) >= len(kept) - 1, "what was whole was not fetched again"
    spoil(store, "lab/1/lab@1/model_index.json", None)
    assert fetched(config, made.address) == folder


@pytest.mark.process
def test_a_cold_start_is_adopted_or_refused(tiny_config: Callable[..., Path], tmp_path):
    """As dmdr/from-cold-start does it: another joint training on the same prompts and cold start."""
    config = load_config(tiny_config())
    trained_run(config, tmp_path / "runs")
    joint = {**config.model_dump(mode="json")["joint"], "updates": 1}
    other, store = str(tiny_config(run="other", joint=joint)), str(tmp_path / "runs")
    options = ("--config", other, "--adopt")
    refused(run_stages("cold_start", *options, "tiny", cwd=tmp_path), 66, "needs prompts")
    for stage in ("prompts", "cold_start"):
        refused(run_stages(stage, *options, "nobody", cwd=tmp_path), 66, f"{stage} of run nobody is not sealed")
        done = run_stages(stage, *options, "tiny", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert done.stdout == f"{stage}: the same as that of tiny, copied to runs/other/{stage}\n"
        records = [Artifact(store, run, stage).sealed() for run in ("tiny", "other")]
        assert records[0].fingerprint == records[1].fingerprint
        assert records[1].provenance.adopted_from == "tiny"
    again = run_stages("cold_start", *options, "tiny", cwd=tmp_path)
    assert again.stdout == "cold_start: sealed already at runs/other/cold_start\n"

    more = {**config.model_dump(mode="json")["cold_start"], "updates": 3}
    third = ("--config", str(tiny_config(run="third", cold_start=more)), "--adopt", "tiny")
    assert run_stages("prompts", *third, cwd=tmp_path).returncode == 0
    done = run_stages("cold_start", *third, cwd=tmp_path)
    refused(done, 64, "they differ in cold_start.updates (settings)")
    assert not (tmp_path / "runs/third/cold_start").exists(), "a refusal leaves nothing behind"


def test_a_run_is_named_after_its_teacher():
    names = ["a", "a-b", "b", "b-1", "1", "sd3.5-large", "x" * 63]
    triples = [(config, name, revision) for config in names for name in names for revision in names]
    made = {run_name(config, Revision(name, revision, "", ())) for config, name, revision in triples}
    assert len(made) == len(triples), "a-b of 1 is not a of b-1"
    assert all(re.fullmatch(NAME, name) for name in made)
    assert run_name("lab", Revision("sd3", "2026-11", "", ())).startswith("lab-sd3-2026-11-")


HUB = """
import json, sys
from stages.store.revisions import list_revisions
print(json.dumps([[each.name, each.revision, each.address] for each in list_revisions(sys.argv[1])]))
"""


@pytest.mark.process
def test_a_hub_has_a_revision_for_each_teacher_not_for_each_commit():
    """The tag and the branch's head differ in a README alone; an older branch is another teacher, one has none."""
    index, unet, readme = (
        {"rfilename": name, "blobId": f"{n}" * 40}
        for n, name in enumerate(("model_index.json", "unet/diffusion_pytorch_model.safetensors", "README.md"))
    )
    commits = {"a" * 40: [index], "b" * 40: [index, readme], "c" * 40: [index, unet], "d" * 40: [readme]}
    refs = {
        "tags": [{"name": "v1", "ref": "refs/tags/v1", "targetCommit": "a" * 40}],
        "branches": [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": letter * 40}
            for name, letter in {"main": "b", "older": "c", "words": "d"}.items()
        ],
        "converts": [],
    }
    with hub("Small/Teacher", refs, commits) as address:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}

        def listed(teachers: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-c", HUB, teachers]
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

        done, lost = listed("hub:Small/Teacher"), listed("hub:Small/Nothing")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [each[2] for each in found] == [f"hub:Small/Teacher@{letter * 40}" for letter in "ac"]
    assert {each[0] for each in found} == {"small-teacher"} and found[0][1] != found[1][1]
    assert "InputMissing: teachers hub:Small/Nothing cannot be listed" in lost.stderr


@contextmanager
def hub(repository: str, refs: dict, commits: dict[str, list[dict]]) -> Iterator[str]:
    """What a model hub answers about the branches, tags and files of one repository; its address."""

    class Answer(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].removeprefix(f"/api/models/{repository}/")
            commit = path.removeprefix("revision/")
            model = {"id": repository, "sha": commit, "siblings": commits.get(commit)}
            content = refs if path == "refs" else model if commit in commits else None
            self.send_response(404 if content is None else 200)
            data = json.dumps(content or {"error": "Repository not found"}).encode()
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
