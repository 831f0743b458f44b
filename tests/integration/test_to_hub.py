"""`dmdr pull --to-hub`: what arrives at a hub, which here is a small server, and what is refused before it is asked."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import constants

from dmdr.config.load import load_config
from flows import cli
from tests.support.trained_run import run_stage, seal_stage, trained_run

TOKEN = "hf_of_a_test"


class Hub:
    """What the server has been sent. status: that it answers a commit with, if it is not to take it."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.created: dict = {}
        self.tokens: set[str] = set()
        self.status = 200


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The requests of a commit without large files, as huggingface_hub makes them."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            state.tokens.add(self.headers["Authorization"])
            if self.path == "/api/repos/create":
                state.created = json.loads(body)
                return self.answer({"url": f"{constants.ENDPOINT}/me/model"})
            if self.path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if "/preupload/" in self.path:
                files = [
                    {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for each in json.loads(body)["files"]
                ]
                return self.answer({"files": files})
            if state.status != 200:
                return self.answer({"error": "not for you"}, state.status)
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    state.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(
                {"commitUrl": f"{constants.ENDPOINT}/me/model/commit/1", "commitOid": "1", "pullRequestUrl": None}
            )

        def do_GET(self) -> None:
            self.answer({"id": "some/model", "cardData": {"license": "openrail++"}, "siblings": []})

        def answer(self, content: dict, status: int = 200) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield state
    server.shutdown()
    server.server_close()


def pull(*arguments: object) -> int:
    return cli.main(["pull", "tiny", *map(str, arguments)])


@pytest.mark.process
def test_a_run_arrives_with_its_card_and_its_scores(hub, tiny_config, tmp_path, capsys):
    student = {"steps": 2, "form": "lora", "lora_rank": 4}
    config = load_config(tiny_config(student=student, export={"forms": ["pipeline", "lora", "single-file"]}))
    store, copy = trained_run(config, tmp_path / "store"), tmp_path / "copy"
    seal_stage(config, store, "export")
    hub.status = 500
    assert pull("export", copy, "--to-hub", "me/model", "--store", store) == 74
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("dmdr: me/model was not uploaded (")
    assert line.endswith(f"{copy} is whole, repeat the command to upload it")
    hub.status = 403
    assert pull("export", copy, "--to-hub", "me/model", "--store", store) == 64
    assert "the hub refuses to write me/model" in capsys.readouterr().err.splitlines()[-1]

    hub.status = 200
    run_stage(config, store, "evaluate")
    assert pull("export", copy, "--to-hub", "me/model", "--store", store) == 0
    assert f"is at {constants.ENDPOINT}/me/model" in capsys.readouterr().out
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert hub.created["visibility"] == "private"

    here = tmp_path / "as-on-the-hub"
    for name, data in hub.files.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(data)
    DiffusionPipeline.from_pretrained(here)
    assert (here / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert {"images/1.png", "provenance.json", "lora/comfyui.json", "single-file/tiny.safetensors"} <= hub.files.keys()
    assert not {name for name in hub.files if name.startswith("lora/images") or name.endswith("SHA256SUMS")}
    card = hub.files["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["widget"][0]["output"] == {"url": "images/1.png"}
    assert 'DiffusionPipeline.from_pretrained("me/model", dtype=dtype).to(device)' in card
    assert 'pipe.load_lora_weights("me/model", subfolder="lora")' in card
    assert '.from_pretrained("me/model", subfolder="lora/scheduler")' in card
    url = "https://huggingface.co/me/model/blob/main/single-file/tiny.safetensors"
    assert f'from_single_file("{url}", config="me/model", dtype=dtype).to(device)' in card
    assert "| lab-mixer" in card
    code = re.search(r"### pipeline\n.*?```python\n(.*?)```", card, re.DOTALL)[1]
    exec(code.replace('"me/model"', repr(str(here))).replace("image.png", str(tmp_path / "i.png")), {})
    assert (tmp_path / "i.png").is_file()


@pytest.mark.process
def test_a_lora_alone_is_the_repositorys_root(hub, tiny_config, tmp_path):
    config = load_config(tiny_config(student={"steps": 2, "form": "lora", "lora_rank": 4}))
    store = trained_run(config, tmp_path / "store")
    seal_stage(config, store, "export")
    assert pull("export", tmp_path / "copy", "--form", "lora", "--to-hub", "me/model", "--store", store) == 0
    assert {"pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json", "comfyui.json"} <= hub.files.keys()
    card = hub.files["README.md"].decode()
    assert 'pipe.load_lora_weights("me/model")' in card
    assert '.from_pretrained("me/model", subfolder="scheduler")' in card
    assert "### pipeline" not in card


def test_what_is_refused_before_anything_is_fetched(tiny_config, tmp_path, monkeypatch, capsys):
    config = load_config(tiny_config())
    store = trained_run(config, tmp_path / "store")
    seal_stage(config, store, "export")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    capsys.readouterr()

    def told(words: str, *arguments: object, stage: str = "export") -> None:
        assert pull(stage, tmp_path / "copy", *arguments, "--store", store) == 64
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert words in line

    told("--to-hub is for the stage export, and the stage is joint", "--to-hub", "me/model", stage="joint")
    told("'model' is not OWNER/NAME", "--to-hub", "model")
    told("'me/a b' is not OWNER/NAME", "--to-hub", "me/a b")
    told("leave --form out, so that both are uploaded", "--to-hub", "me/model", "--form", "single-file")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    told("--to-hub needs a token of the hub; set HF_TOKEN", "--to-hub", "me/model")
    assert not (tmp_path / "copy").exists()
    monkeypatch.undo()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "mine").touch()
    told("holds something else than this export", "--to-hub", "me/model")
