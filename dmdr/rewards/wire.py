"""What a reward service and its client send each other: JSON over HTTP. No torch.

GET  /v1/reward   -> About: who answers
POST /v1/score       ScoreRequest: images with their prompts -> ScoreAnswer: one score for each, and who gave it

An image is a PNG of 8 bits, RGB, in base64: the scores are those of the image that a user would see. An answer of
another status than 200 is a Refusal. 503 asks to come again after the seconds of Retry-After.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

ABOUT, SCORE = "/v1/reward", "/v1/score"
MOST_BYTES = 2**28  # of a request; 64 images of 1024 pixels take about half of it
MOST_IMAGES = 256  # in a request
MOST_ANSWER = 2**20  # bytes of an answer
Text = Annotated[str, Field(min_length=1, max_length=200)]


class Message(BaseModel):
    """A message; one with another key or another type is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class About(Message):
    """Which reward a service computes. digest: sha256 of what makes its scores."""

    protocol: Literal[1] = 1
    name: Text
    version: Text
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")


class ScoreRequest(Message):
    """Images (base64 of PNG), their prompts, and what is known of each prompt."""

    protocol: Literal[1] = 1
    images: list[str] = Field(min_length=1, max_length=MOST_IMAGES)
    prompts: list[str]
    metadata: list[dict[str, JsonValue]]


class ScoreAnswer(About):
    """One score for each image, in their order."""

    scores: list[float]


class Refusal(Message):
    """Why there are no scores, in one line."""

    error: str
