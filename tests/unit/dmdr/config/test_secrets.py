"""An address with a secret is refused everywhere, without being repeated; so is an environment that would hold one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dmdr.config.load import parse_mapping, validate
from dmdr.config.plain_text import quote, to_line
from dmdr.config.run import Config
from dmdr.config.secrets import has_secret, hide_secrets
from dmdr.errors import ConfigError
from flows.cli import main
from stages.__main__ import main as run_stage
from stages.store.address import open_place

SHIPPED = (Path(__file__).parents[4] / "configs/lab-flow.yaml").read_text(encoding="utf-8")
CANARY = "Ca7arySecret"
ADDRESSES = [
    f"s3://KEY:{CANARY}@bucket/prefix",
    f"s3://KEY:{CANARY}/with/slash@bucket/prefix",
    f"s3://{CANARY}@bucket",
    f"https://user:{CANARY}@host/prompts.txt",
    f"http://host/prompts.txt?token={CANARY}",
    f"https://host/x?a=b&X-Amz-Signature={CANARY}&c=d",
    f"https://host/x?access_key={CANARY}",
    f"hub:owner/name@main?token={CANARY}",
    f"hub:hf_{CANARY}{CANARY}/name@main",
    f"postgres://me:{CANARY}@[::1]:5432/x",
]
HARMLESS = [
    "s3://bucket/teachers/sd35@3f2a",
    "hub:stabilityai/sdxl@" + "0123456789abcdef" * 2 + "01234567",
    "http://127.0.0.1:4200/api",
    "s3://bucket/a@b/c:d@e",
    "http://host:8080/a@b",
    "file:///home/me/a:b@c",
    "./prompts?.txt",
    "lab:flow",
    "set:geneval",
    "a photo of me@work, at 5:30",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_with_a_secret_is_refused_unrepeated(address: str, capsys: pytest.CaptureFixture, tmp_path: Path):
    assert has_secret(address) and CANARY not in hide_secrets(f"cannot read {address}: refused")
    changes = [
        {"teacher": {"path": address, "guidance_scale": 3.0}},
        {"teacher": {"path": "x.safetensors", "parts": address, "guidance_scale": 3.0}},
        {"prompts": {"sources": ["lab:train", address]}},
        {"prompts": {"sources": ["lab:train"], "evaluation": address}},
        {"prompts": {"sources": ["set:geneval"], "folder": address}},
        {"weights": {"hpsv2.1": address}},
    ]
    for change in changes:
        with pytest.raises(ConfigError, match="holds credentials or a token") as refusal:
            validate({**parse_mapping(SHIPPED, "test"), **change}, Config, "test")
        assert CANARY not in str(refusal.value) and refusal.value.__cause__ is None
    with pytest.raises(ConfigError, match="holds credentials") as refusal:
        open_place(address)
    assert CANARY not in str(refusal.value)
    for command in (
        ["runs", "--store", address],
        ["run", "quickstart", f"--store={address}"],
        ["run", "quickstart", "--set", f"teacher.path={address}"],
        ["evaluate", "quickstart", "--steps", "4", "--pipeline", address],
        ["teachers", "publish", address, "--as", "x", "--to", str(tmp_path)],
        ["stage", "prompts", "--config", "quickstart.yaml", "--teacher", address],
    ):
        assert main(command) == 64
        told = capsys.readouterr()
        assert "holds credentials or a token" in told.err and told.err.count("\n") == 1
        assert CANARY not in told.out + told.err
    assert run_stage(["prompts", "--config", "x.yaml", "--store", address]) == 64
    assert CANARY not in capsys.readouterr().err


@pytest.mark.parametrize("address", HARMLESS)
def test_an_address_without_a_secret_is_taken(address: str):
    assert not has_secret(address) and hide_secrets(address) == address


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DB_PASS", "x"),
        ("MYSQL_PASSWD", "x"),
        ("BASIC_AUTH", "x"),
        ("GCP_CREDS", "x"),
        ("AWS_CREDENTIALS", "x"),
        ("HF_TOKEN", "x"),
        ("WANDB_API_KEY", "x"),
        ("client_secret", "x"),
        ("DATABASE", f"postgres://me:{CANARY}@db/x"),
        ("WEBHOOK", f"https://h/x?token={CANARY}"),
        ("PLAIN", "hf_" + "a" * 34),
        ("PLAIN", "AKIA" + "A" * 16),
        ("PLAIN", "ghp_" + "a" * 36),
        ("PLAIN", "sk-" + "a" * 40),
    ],
)
def test_an_environment_of_a_cluster_holds_no_secret(name: str, value: str):
    cluster = {"image": f"r/i@sha256:{'0' * 64}", "environment": {name: value}}
    data = {**parse_mapping(SHIPPED, "test"), "execution": {"cluster": cluster}}
    with pytest.raises(
        ConfigError, match=f"has {name}, .*kubectl create secret generic.*execution.cluster.secrets"
    ) as refusal:
        validate(data, Config, "test")
    assert value not in re.sub("execution|example", "", str(refusal.value)) or value == "x"


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "OMP_NUM_THREADS", "AUTHOR", "HTTPS_PROXY"])
def test_an_environment_of_a_cluster_takes_other_variables(name: str):
    cluster = {"image": f"r/i@sha256:{'0' * 64}", "environment": {name: "http://proxy:3128"}}
    validate({**parse_mapping(SHIPPED, "test"), "execution": {"cluster": cluster}}, Config, "test")


def test_a_line_shows_no_control_characters_and_is_bounded():
    assert to_line("a\nb\tc\x1b[31m\u202e\ud800\x9b") == "a b c\\x1b[31m\\u202e\\ud800\\x9b"
    assert len(to_line("x" * 10**6)) == 2000
    assert quote({"a": "b"}) == "a mapping" and quote(10**5000) == "a huge number" and len(quote("x" * 999)) == 80
