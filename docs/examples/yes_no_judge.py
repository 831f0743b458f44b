"""A judge for images: asks a vision-language model yes/no questions, and scores by the probability of yes.

It asks any endpoint with OpenAI's API that returns the probabilities of tokens (`logprobs`), such as vLLM or SGLang:

    vllm serve Qwen/Qwen2.5-VL-7B-Instruct --port 8080
    JUDGE_URL=http://127.0.0.1:8080/v1 JUDGE_MODEL=Qwen/Qwen2.5-VL-7B-Instruct \\
        dmdr serve-reward docs/examples/yes_no_judge.py:YesNoJudge --port 8000
    # in the config:  rewards: {judge: {url: "http://127.0.0.1:8000"}}

The questions of a prompt are the list `questions` of its record, or else one: whether the image shows the prompt. A
score is the mean over the questions of P(yes) / (P(yes) + P(no)), each summed over the spellings of the word. A key, if
the endpoint asks for one, comes from the variable JUDGE_KEY: never from a config.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image

ASK = "{question} Answer with one word, yes or no."
WHETHER = 'Does this image show the following, in every detail? "{prompt}"'
AT_ONCE = 8  # questions that are asked at the same time
TIMEOUT = 50.0  # seconds for an answer, less than `timeout` of the reward in the config


class YesNoJudge:
    """The mean probability of yes, over the questions of a prompt."""

    differentiable, version, range = False, "1", (0.0, 1.0)

    def __init__(self, device: str) -> None:
        self.url, self.model = os.environ["JUDGE_URL"].rstrip("/"), os.environ["JUDGE_MODEL"]
        self.headers = {"Content-Type": "application/json"}
        if key := os.environ.get("JUDGE_KEY"):
            self.headers["Authorization"] = f"Bearer {key}"

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[Mapping[str, object]]) -> torch.Tensor:
        """images (B, 3, H, W) in [0, 1] -> scores (B,)."""
        asked, places = [], []
        for place, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            questions = metadata[place].get("questions") if metadata else None
            picture = encode(image)
            for question in questions if isinstance(questions, list) else [WHETHER.format(prompt=prompt)]:
                asked.append((picture, str(question)))
                places.append(place)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = torch.tensor(list(pool.map(lambda each: self.ask(*each), asked)))
        index, zeros = torch.tensor(places), torch.zeros(len(prompts))
        sums = zeros.index_add(0, index, answers)
        return sums / zeros.index_add(0, index, torch.ones(len(places)))

    def ask(self, picture: str, question: str) -> float:
        """The probability of yes. picture: a data URL."""
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": ASK.format(question=question)},
        ]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 20,
        }
        request = urllib.request.Request(
            f"{self.url}/chat/completions", json.dumps(body).encode(), self.headers, method="POST"
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            answer = json.load(response)
        first = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        chances = {"yes": 0.0, "no": 0.0}
        for token in first:
            word = token["token"].strip().lower()
            if word in chances:
                chances[word] += math.exp(token["logprob"])
        if not sum(chances.values()):
            raise ValueError(f"{self.model} answers neither yes nor no, but {first[0]['token']!r}; ask another model")
        return chances["yes"] / sum(chances.values())


def encode(image: torch.Tensor) -> str:
    """An image (3, H, W) in [0, 1] as a data URL of a PNG."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
