"""The examples of the documents, run for real: the judge beside a stand-in for a vision-language model's endpoint."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

from dmdr.config.own_rewards import OwnReward
from dmdr.errors import DataError
from dmdr.rewards.own import UserReward

JUDGE = Path(__file__).parents[3] / "docs/examples/yes_no_judge.py"


class Endpoint(BaseHTTPRequestHandler):
    """Says yes as surely as the image is bright, in two spellings; of "blank" it knows nothing."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        picture, question = asked["messages"][0]["content"]
        data = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
        bright = sum(Image.open(io.BytesIO(data)).getpixel((0, 0))) / 765
        chances = {"Yes": bright / 2, " yes": bright / 4, "no": 0.25 * bright, "NO": 1 - bright, "The": 1e-9}
        if "blank" in question["text"]:
            chances = {"The": 1.0}
        tokens = [{"token": token, "logprob": math.log(max(each, 1e-12))} for token, each in chances.items()]
        answer = {"choices": [{"logprobs": {"content": [{"top_logprobs": tokens}]}}]}
        body = json.dumps(answer).encode()
        assert self.path == "/v1/chat/completions" and self.headers["Authorization"] == "Bearer abc"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.mark.process
def test_the_judge_scores_by_the_probability_of_yes(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
    thread.start()
    variables = {"URL": f"http://127.0.0.1:{server.server_address[1]}/v1/", "MODEL": "tiny", "KEY": "abc"}
    for name, value in variables.items():
        monkeypatch.setenv(f"JUDGE_{name}", value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    try:
        judge = UserReward("judge", OwnReward(file=f"{JUDGE}:YesNoJudge"), "cpu")
        images = torch.stack([torch.full((3, 8, 8), level) for level in (0.2, 1.0)])
        known = [{"prompt": "a"}, {"prompt": "b", "questions": ["Is it bright?", "Is it plain?"]}]
        assert judge(images, ["a", "b"], known).tolist() == pytest.approx([0.15, 0.75], abs=1e-5)
        assert judge(images, ["a", "b"]).tolist() == pytest.approx([0.15, 0.75], abs=1e-5)
        with pytest.raises(DataError, match="answers neither yes nor no, but 'The'"):
            judge(images[:1], ["blank"])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
