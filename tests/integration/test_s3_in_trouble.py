"""The store on S3 behind a proxy that refuses, cuts and loses: the same bytes as on a folder, or one line why not."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError

from dmdr.config.stages import STAGES
from dmdr.errors import ConfigError, InputMissing, StoreError
from flows import cli
from stages.store import conditional_writes, remote, s3_errors, transfer
from stages.store.artifacts import Artifact
from stages.store.folder import Folder
from stages.store.layout import digest
from stages.store.remote import Remote
from tests.support.s3_proxy import Faults
from tests.support.s3_server import BUCKET
from tests.support.sealing import PROVENANCE

ROOT = Path(__file__).parents[2]
LEAST_PART = 5 * 2**20  # that S3 takes


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PART", LEAST_PART)


@pytest.fixture
def place(proxy: Faults, tmp_path: Path) -> Remote:
    """An address of its own whose store was found to honour conditions already."""
    place = Remote(f"s3://{BUCKET}/{tmp_path.name}/run/stage")
    place.create("first", b"")
    proxy.seen.clear()
    return place


def a_file(folder: Path, size: int, seed: int) -> Path:
    path = folder / f"{seed}-{size}"
    path.write_bytes(random.Random(seed).randbytes(size))
    return path


def sha256(path: Path) -> str:
    return digest(path).sha256


def leftovers(server: str, prefix: str) -> list[int]:
    """Of each multipart upload that was neither completed nor aborted: how many parts the store keeps of it."""
    bucket, _, prefix = prefix.partition("/")
    client = boto3.client("s3", endpoint_url=server)
    found = client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", [])
    parts = [client.list_parts(Bucket=bucket, Key=each["Key"], UploadId=each["UploadId"]) for each in found]
    return [len(each.get("Parts", [])) for each in parts]


# Trouble that passes


class Twice:
    """Every operation on a folder and on S3; both must answer the same."""

    def __init__(self, folder: Folder, remote: Remote, work: Path) -> None:
        self.places, self.work = (folder, remote), work

    def both(self, ask: Callable[[Folder | Remote], object]) -> object:
        answers = [ask(place) for place in self.places]
        assert answers[0] == answers[1]
        return answers[0]

    def add(self, name: str, source: Path) -> None:
        def added(place: Folder | Remote) -> str:
            copy = shutil.copyfile(source, self.work / "copy")
            return place.add(name, copy, sha256(copy))

        self.both(added)

    def fetched(self, name: str) -> object:
        def bytes_of(place: Folder | Remote) -> bytes | None:
            path = place.fetch(name, self.work / "fetched")
            return None if path is None else path.read_bytes()

        return self.both(bytes_of)


def test_a_store_in_trouble_holds_the_same_bytes_as_a_folder(proxy: Faults, tmp_path: Path) -> None:
    place, made = Remote(f"s3://{BUCKET}/trouble/run/stage"), proxy.random
    (tmp_path / "folder").mkdir()
    twice = Twice(Folder(tmp_path / "folder"), place, tmp_path)
    proxy.busy, proxy.cut, proxy.lost = 0.3, 0.1, 0.05
    for turn in range(8):
        data = made.randbytes(made.randrange(5000))
        assert twice.both(lambda place, turn=turn, data=data: place.create(f"c{turn}.json", data)) == data
        assert twice.both(lambda place, turn=turn: place.create(f"c{turn}.json", b"too late")) == data
        twice.both(lambda place, turn=turn, data=data: place.publish(f"p/{turn % 3}", lambda f: f.write_bytes(data)))
        assert twice.both(lambda place, turn=turn: place.read(f"p/{turn % 3}")) == data
        twice.add(f"deep/a b{turn}", a_file(tmp_path, made.randrange(3000), turn))
        start = made.randrange(4000)
        twice.both(lambda place, turn=turn, start=start: place.read_range(f"c{turn}.json", start, start + 999))
    twice.add("large", a_file(tmp_path, 2 * LEAST_PART + 12345, 99))
    twice.both(lambda place: place.publish("larger", lambda f: shutil.copyfile(a_file(tmp_path, 3 * 2**22, 98), f)))
    for name in twice.both(lambda place: place.names()):
        assert twice.fetched(name) is not None
    for name in ("p", "large", "deep/a b3", "not there"):
        twice.both(lambda place, name=name: place.remove(name))
        assert twice.fetched(name) is None
        assert twice.both(lambda place, name=name: place.read_range(name, 0, 9)) is None
    assert "deep/a b2" in twice.both(lambda place: place.names())
    assert place.folders() == ["deep"]


def test_our_own_write_is_recognised_when_its_answer_got_lost(
    place: Remote, proxy: Faults, s3: str, tmp_path: Path
) -> None:
    proxy.lost = 0.5
    for turn in range(12):
        assert place.create(f"c{turn}", f"{turn}".encode()) == f"{turn}".encode()
        source = a_file(tmp_path, 2000, turn)
        assert place.add(f"a{turn}", source, sha256(source)) == f"a{turn}"
    source = a_file(tmp_path, 3 * LEAST_PART, 0)
    for turn in range(6):
        assert place.add(f"large{turn}", source, sha256(source)) == f"large{turn}"
    proxy.lost = 0.0
    puts = [line for line in proxy.seen if line.startswith("PUT") and "partNumber" not in line]
    assert len(puts) > 24, "some were lost"
    assert len(place.names()) == 1 + 12 + 12 + 6
    assert set(leftovers(s3, place.root)) <= {0}, "begun without our knowing"
    other = a_file(tmp_path, 3 * LEAST_PART, 1)
    assert place.add("large0", other, sha256(other)) == f"large0~{sha256(other)[:12]}"
    assert place.fetch("large0", tmp_path / "got").read_bytes() == source.read_bytes()


def test_what_goes_up_has_a_checksum(place: Remote, proxy: Faults, tmp_path: Path) -> None:
    proxy.headers.clear()
    proxy.seen.clear()
    place.create("small", b"bytes")
    for size in (100, 3 * LEAST_PART):
        source = a_file(tmp_path, size, 5)
        place.add(source.name, source, sha256(source))
    sent = [headers for line, headers in zip(proxy.seen, proxy.headers, strict=True) if line.startswith("PUT")]
    assert len(sent) == 5
    assert all(any(name.startswith("x-amz-checksum-") for name in headers) for headers in sent)


def test_ranges_end_where_the_object_ends(place: Remote) -> None:
    place.create("five", b"01234")
    place.create("none", b"")
    assert place.read_range("five", 3, 99) == b"34"
    assert place.read_range("five", 5, 99) == b""
    assert place.read_range("none", 0, 9) == b""
    assert place.read_range("gone", 0, 9) is None


def test_an_answer_takes_one_request(place: Remote, proxy: Faults, tmp_path: Path) -> None:
    """What is tried again as a whole must not consist of several that all have to succeed."""
    source = a_file(tmp_path, 10, 1)
    asks = {
        "read": lambda: place.read("first"),
        "read what is not there": lambda: place.read("gone"),
        "create": lambda: place.create("c", b"1"),
        "add": lambda: place.add("a", source, sha256(source)),
        "publish": lambda: place.publish("p/q", lambda file: file.write_bytes(b"1")),
        "names": place.names,
        "fetch": lambda: place.fetch("a", tmp_path / "f"),
        "fetch nothing": lambda: place.fetch("gone", tmp_path / "f"),
        "range": lambda: place.read_range("a", 1, 5),
        "folders": place.folders,
        "folders of nothing": Remote(f"s3://{BUCKET}/nothing/there").folders,
        "names of nothing": Remote(f"s3://{BUCKET}/nothing/there").names,
        "remove nothing": lambda: place.remove("gone"),
    }
    for name, ask in asks.items():
        proxy.seen.clear()
        ask()
        assert len(proxy.seen) == 1, (name, proxy.seen)


def test_a_listing_of_many_pages_and_folders(place: Remote, proxy: Faults, s3: str) -> None:
    client, prefix = boto3.client("s3", endpoint_url=s3), place.root.removeprefix(f"{BUCKET}/")
    names = {"first", *(f"f{number:04d}/x" for number in range(1100))}
    for name in (*names, "", "f0000/", "f0001/x~other"):  # the second and third as consoles make folders
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=b"")
    client.put_object(Bucket=BUCKET, Key=f"{prefix}-beside/x", Body=b"")
    proxy.busy = 0.3
    assert place.names() == sorted({*names, "f0001/x~other"})
    assert place.folders() == [f"f{number:04d}" for number in range(1100)]
    place.remove("f0001/x")
    place.remove("f0002")
    assert set(place.names()) == {*names, "f0001/x~other"} - {"f0001/x", "f0002/x"}


# Trouble that lasts


@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (403, "AccessDenied", ConfigError, ["access denied", "allow s3:"]),
        (404, "NoSuchBucket", InputMissing, [" does not exist; create it, or correct the address"]),
        (400, "ExpiredToken", ConfigError, ["the credentials have expired; renew them"]),
        (403, "RequestTimeTooSkewed", ConfigError, ["clock is too far from the store's; set the clock"]),
        (403, "InvalidAccessKeyId", ConfigError, ["does not accept these credentials", "correct AWS_ACCESS_KEY_ID"]),
        (403, "SignatureDoesNotMatch", ConfigError, ["does not accept these credentials"]),
        (400, "InvalidRequest", StoreError, ["InvalidRequest it is", "repeat the command"]),
    ],
)
def test_what_will_not_pass_is_told_at_once(
    place: Remote, proxy: Faults, tmp_path: Path, status: int, code: str, kind: type, words: list[str]
) -> None:
    unknown = Remote("s3://never-asked/x/run/stage")
    source, large = a_file(tmp_path, 10, 1), a_file(tmp_path, 3 * LEAST_PART, 2)
    proxy.answers = {"": (status, code)}
    asks = {
        "read": lambda: place.read("thing"),
        "write": lambda: place.create("thing", b""),
        "write ": lambda: unknown.create("thing", b""),
        "write  ": lambda: place.add("thing", source, "0" * 64),
        "write   ": lambda: place.add("thing", large, "0" * 64),
        "write    ": lambda: place.publish("thing", lambda file: file.write_bytes(b"1")),
        "read ": lambda: place.fetch("thing", tmp_path / "f"),
        "read  ": lambda: place.read_range("thing", 0, 9),
        "list": place.names,
        "list ": place.folders,
        "delete": lambda: place.remove("thing"),
    }
    for action, ask in asks.items():
        proxy.seen.clear()
        with pytest.raises(kind) as caught:
            ask()
        told = str(caught.value)
        assert "\n" not in told
        assert told.startswith(f"cannot {action.strip()} s3://")
        assert ("/thing: " in told) == (not action.startswith("list"))
        assert all(word in told for word in words), told
        each_once = 3 if code != "ExpiredToken" else 6  # once more, in case there are new ones by now
        assert 1 <= len(proxy.seen) <= each_once, proxy.seen


def test_denied_names_the_permission(place: Remote, proxy: Faults) -> None:
    proxy.answers = {"list-type=2": (403, "AccessDenied")}
    with pytest.raises(ConfigError, match=r"access denied \(ListObjectsV2\); allow s3:ListBucket there"):
        place.names()


def test_no_credentials(proxy: Faults, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_ENDPOINT_URL"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no credentials were found; set AWS_ACCESS_KEY_ID"):
        Remote(f"s3://{BUCKET}/x/run/stage").read("thing")
    assert proxy.seen == []


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        (404, "NoSuchBucket", 66),
        (403, "AccessDenied", 64),
        (403, "InvalidAccessKeyId", 64),
        (403, "SignatureDoesNotMatch", 64),
        (400, "ExpiredToken", 64),
        (403, "RequestTimeTooSkewed", 64),
        (501, "NotImplemented", 74),
        (503, "SlowDown", 74),
    ],
)
def test_the_exit_code_says_whether_to_try_again(
    proxy: Faults, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, status, code, exit_code
) -> None:
    monkeypatch.setattr(s3_errors, "PATIENCE", 1.0)
    proxy.answers = {"": (status, code)}
    assert cli.main(["status", "my-run", "--store", f"s3://{BUCKET}/runs"]) == exit_code
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"s3://{BUCKET}/runs" in told


def test_a_bucket_that_nobody_made(s3: str, tmp_path: Path, tiny_config: Callable[..., Path]) -> None:
    """By the word of a real server, as a container meets it."""
    command = [sys.executable, "-m", "stages", "prompts", "--config", str(tiny_config()), "--store", "s3://nobody/runs"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 66
    assert done.stderr.startswith("prompts: cannot read s3://nobody/runs/tiny/prompts/record.json: the bucket nobody")
    assert done.stderr.count("\n") == 1


def test_a_bucket_whose_policy_denies(s3: str, fresh: str) -> None:
    """By the word of a real server."""
    place, denied = Remote(f"s3://{fresh}/runs/r/joint"), {"Effect": "Deny", "Principal": "*", "Action": "s3:GetObject"}
    place.create("thing", b"bytes")
    policy = {"Version": "2012-10-17", "Statement": [{**denied, "Resource": f"arn:aws:s3:::{fresh}/*"}]}
    boto3.client("s3", endpoint_url=s3).put_bucket_policy(Bucket=fresh, Policy=json.dumps(policy))
    with pytest.raises(ConfigError, match=f"cannot read s3://{fresh}/.*/thing: access denied .*allow s3:GetObject and"):
        place.read("thing")


def credentials(file: Path, key: str) -> None:
    file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")


def test_expired_credentials_are_read_anew_once(proxy: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a file, or an identity, that has new ones by now; in the middle of an upload, too."""
    file = tmp_path / "credentials"
    credentials(file, "first")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    place = Remote(f"s3://{BUCKET}/renewed/run/stage")
    place.create("thing", b"bytes")
    proxy.expired = "first"
    proxy.seen.clear()
    with pytest.raises(s3_errors.Refused, match="the credentials have expired; renew them"):
        place.read("thing")
    assert len(proxy.seen) == 2
    credentials(file, "second")
    assert place.read("thing") == b"bytes"
    assert place.read("thing") == b"bytes" and len(proxy.seen) == 5, "the new ones are kept"
    proxy.expired = "second"
    credentials(file, "third")
    source = a_file(tmp_path, 3 * LEAST_PART, 6)
    place.add("large", source, sha256(source))
    assert place.fetch("large", tmp_path / "got").read_bytes() == source.read_bytes()
    assert place.names() == ["large", "thing"]


def test_a_store_that_is_silent_is_given_up(proxy: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_errors, "PATIENCE", 3.0)
    monkeypatch.setitem(remote.S3["config_kwargs"], "read_timeout", 1)
    place = Remote(f"s3://{BUCKET}/x/run/stage")
    assert place.read("thing") is None  # it has connected
    proxy.silent, began = True, time.monotonic()
    with pytest.raises(StoreError, match="Read timeout on endpoint URL.*repeat the command"):
        place.read("thing")
    assert 3 <= len(proxy.seen) <= 5
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize("harm", ["a part is refused", "the end is refused", "interrupted"])
def test_a_failed_upload_leaves_nothing(
    place: Remote, proxy: Faults, s3: str, tmp_path: Path, harm: str, create: bool
) -> None:
    source = a_file(tmp_path, 4 * LEAST_PART, 3)
    if harm == "interrupted":

        def call(operation: str, **parameters: object) -> dict:
            if parameters.get("PartNumber") == 4:
                raise KeyboardInterrupt
            return place.fs.call_s3(operation, **parameters)

        with pytest.raises(KeyboardInterrupt):
            transfer.upload(call, BUCKET, f"{place.root}/thing".removeprefix(f"{BUCKET}/"), source, create=create)
    else:
        refused = "partNumber=3" if harm == "a part is refused" else "POST /dmdr-tests/" + "{}/thing?uploadId="
        proxy.answers = {refused.format(place.root.removeprefix(f"{BUCKET}/")): (403, "AccessDenied")}
        with pytest.raises(ConfigError, match="access denied"):
            place.add("thing", source, sha256(source)) if create else place.publish(
                "thing", lambda file: shutil.copyfile(source, file)
            )
    proxy.answers = {}
    assert leftovers(s3, place.root) == []
    assert place.names() == ["first"]


def test_the_parts_that_a_killed_upload_has_left_are_deleted(place: Remote, s3: str) -> None:
    client, prefix = boto3.client("s3", endpoint_url=s3), place.root.removeprefix(f"{BUCKET}/")
    for key in (f"{prefix}/a", f"{prefix}/below/b", f"{prefix}-of-another/c"):
        upload = client.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]
        client.upload_part(Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=1, Body=b"part")
    place.end_uploads()
    assert leftovers(s3, f"{place.root}/") == []
    assert len(leftovers(s3, f"{place.root}-of-another")) == 1
    place.end_uploads()
    assert place.names() == ["first"]


def test_an_upload_that_another_copy_ends_is_sent_again(
    place: Remote, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, ends, call = a_file(tmp_path, 4 * LEAST_PART, 3), [1], place.fs.call_s3

    def call_in_trouble(operation: str, **parameters: object) -> dict:
        if operation == "complete_multipart_upload" and ends:
            ends.pop()
            Remote(place.url).end_uploads()
            answer = {"Error": {"Code": "NoSuchUpload"}, "ResponseMetadata": {"HTTPStatusCode": 404}}
            raise FileNotFoundError("as s3fs tells it") from ClientError(answer, operation)  # moto answers 500
        return call(operation, **parameters)

    monkeypatch.setattr(place.fs, "call_s3", call_in_trouble)
    assert place.add("thing", source, sha256(source)) == "thing"
    assert not ends
    assert place.fetch("thing", tmp_path / "back").read_bytes() == source.read_bytes()
    assert leftovers(s3, place.root) == []


def test_an_upload_that_lost_bytes_is_noticed(place: Remote, proxy: Faults, tmp_path: Path) -> None:
    source = a_file(tmp_path, 3 * LEAST_PART, 4)
    proxy.short = "partNumber=3"
    with pytest.raises(StoreError, match=f"it has {3 * LEAST_PART - 1} bytes, but {3 * LEAST_PART} were sent"):
        place.add("thing", source, sha256(source))
    proxy.short = ""
    stored = place.add("thing", source, sha256(source))
    assert place.fetch(stored, tmp_path / "got").read_bytes() == source.read_bytes(), "the next attempt gets around it"


# Stores that ignore conditions


@pytest.fixture
def fresh(s3: str, tmp_path: Path) -> str:
    """A bucket that no test has asked yet."""
    name = f"fresh-{random.SystemRandom().randrange(2**40):x}"
    boto3.client("s3", endpoint_url=s3).create_bucket(Bucket=name)
    return name


def objects(server: str, bucket: str) -> list[str]:
    found = boto3.client("s3", endpoint_url=server).list_objects_v2(Bucket=bucket)
    return [each["Key"] for each in found.get("Contents", [])]


@pytest.mark.parametrize("where", ["PUT /", "uploadId="])
def test_a_store_that_ignores_conditions_is_refused(s3: str, fresh: str, proxy: Faults, where: str) -> None:
    proxy.unconditional = where
    with pytest.raises(ConfigError) as caught:
        Artifact(f"s3://{fresh}/runs", "r", "joint").claim({"a": 1}, {})
    told = str(caught.value)
    assert "\n" not in told
    for part in (f"store s3://{fresh} replaces an object", f"{conditional_writes.VARIABLE}=ignored"):
        assert part in told
    assert objects(s3, fresh) == []
    assert leftovers(s3, fresh) == []


def test_a_store_that_does_not_know_conditions_is_refused(fresh: str, proxy: Faults) -> None:
    proxy.answers = {"PUT /": (501, "NotImplemented"), "POST /": (501, "NotImplemented")}
    with pytest.raises(ConfigError, match="replaces an object although the request forbids it"):
        Artifact(f"s3://{fresh}/runs", "r", "joint").claim({"a": 1}, {})


def test_it_is_used_if_the_environment_says_so(
    s3: str, fresh: str, proxy: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.unconditional, store = "/", f"s3://{fresh}/runs"
    monkeypatch.setenv(conditional_writes.VARIABLE, "ignored")
    out = tmp_path / "out"
    out.mkdir()
    source = a_file(out, 3000, 7)
    data = source.read_bytes()
    artifact = Artifact(store, "r", "joint")
    assert artifact.claim({"a": 1}, {}) is None
    artifact.place.publish("checkpoints/part", lambda file: file.write_bytes(b"1"))
    with pytest.raises(ConfigError, match="a is 1 there, 2 here"):
        Artifact(store, "r", "joint").claim({"a": 2}, {})
    record = artifact.seal(out, facts={}, provenance=PROVENANCE)
    assert record.files[source.name].stored_as == f"{source.name}~{sha256(source)[:12]}"
    late = a_file(tmp_path, 10, 8)
    artifact.place.add(source.name, late, sha256(late))
    assert (Artifact(store, "r", "joint").fetch(tmp_path / "cache") / source.name).read_bytes() == data
    assert Artifact(store, "r", "joint").claim({"a": 1}, {}) == record
    assert not [line for line in proxy.seen if "probe-" in line]
    monkeypatch.setenv(conditional_writes.VARIABLE, "yes")
    with pytest.raises(ConfigError, match="leave it unset, or set it to ignored"):
        Artifact(store, "r", "export").claim({"a": 1}, {})


def test_a_store_is_asked_once(s3: str, fresh: str, proxy: Faults) -> None:
    for stage in STAGES:
        assert Artifact(f"s3://{fresh}/runs", "r", stage).claim({"a": 1}, {}) is None
    asked = [line.split()[0] for line in proxy.seen if "probe-" in line]
    assert asked == ["PUT", "PUT", "POST", "PUT", "POST", "DELETE", "DELETE"]  # of which the second last aborts
    assert sorted(objects(s3, fresh)) == sorted(f"runs/r/{stage}/claim.json" for stage in STAGES)


def test_a_filesystem_that_is_not_s3(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    files = {path.name: path.read_bytes() for path in (a_file(out, size, size) for size in (0, 9, 3 * LEAST_PART))}
    artifact = Artifact("memory://remote-test/runs", "r", "joint")
    assert artifact.claim({"a": 1}, {}) is None
    record = artifact.seal(out, facts={}, provenance=PROVENANCE)
    folder = Artifact("memory://remote-test/runs", "r", "joint").fetch(tmp_path / "cache")
    assert {name: (folder / name).read_bytes() for name in record.files} == files
    assert artifact.place.names() == sorted([*files, "claim.json", "record.json"])
