"""A reward of the user's own code: built, held to what it says of itself, and checked at every call.

The class is called with the device, as a text, and its object with (images, prompts, metadata), as `protocol.py` has
it. Three attributes say what it is: `differentiable`; `version`, a text; `range`, the lowest and the highest score, or
None.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dmdr.config.own_rewards import OwnReward
from dmdr.config.prompt_record import PromptRecord
from dmdr.errors import DataError, NonFinite
from dmdr.rewards.own_code import blame_code, import_code

Range = tuple[float, float]
MISSING = object()


class UserReward:
    """The object of a user's class, under the name that the config gives it.

    Raises:
        DataError: the class cannot be built, or does not say what it is.
    """

    def __init__(self, name: str, reward: OwnReward, device: str) -> None:
        self.name, self.place = name, reward.place
        kind = import_code(name, reward)
        if not callable(kind):
            raise DataError(f"the reward {name} ({self.place}) is no class, but {type(kind).__name__}; name a class")
        with blame_code(name, self.place):
            self.scorer = kind(device)
        if not callable(self.scorer):
            raise DataError(
                f"the reward {name} ({self.place}) has no __call__(images, prompts, metadata); dmdr init reward "
                "prints one that has"
            )
        self.differentiable, self.version, self.range = self.read_claims()

    def read_claims(self) -> tuple[bool, str, Range | None]:
        """What the object says of itself: whether it is differentiable, its version, its range.

        Raises:
            DataError: one of them is missing, or of another type.
        """
        found = {name: getattr(self.scorer, name, MISSING) for name in ("differentiable", "version", "range")}
        differentiable, version, span = found.values()
        if not isinstance(differentiable, bool):
            raise self._blame("differentiable", differentiable, "True or False")
        if not isinstance(version, str):
            raise self._blame("version", version, 'a text such as "1"')
        if span is None:
            return differentiable, version, None
        if not isinstance(span, tuple) or len(span) != 2 or not all(isinstance(each, int | float) for each in span):
            raise self._blame("range", span, "(lowest, highest) or None")
        low, high = map(float, span)
        if not low < high:
            raise self._blame("range", span, "(lowest, highest), the lowest first")
        return differentiable, version, (low, high)

    def _blame(self, attribute: str, found: object, wanted: str) -> DataError:
        what = "lacks" if found is MISSING else f"has {found!r} as"
        return DataError(f"the reward {self.name} ({self.place}) {what} its `{attribute}`; set it to {wanted}")

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[PromptRecord] = ()) -> torch.Tensor:
        """
        Raises:
            DataError: the code raises, or does not give each image one number.
            NonFinite: a score is not a number.
        """
        with blame_code(self.name, self.place):
            scores = self.scorer(images, prompts, list(metadata))
        return check_scores(scores, len(images), f"the reward {self.name} ({self.place})")


def check_scores(scores: object, count: int, who: str) -> torch.Tensor:
    """Scores (count,) in float32. who: the reward, for messages.

    Raises:
        DataError: they are not one number for each image.
        NonFinite: one of them is not a number.
    """
    if not isinstance(scores, torch.Tensor):
        raise DataError(f"{who} gives {type(scores).__name__}, not a tensor; return one score for each image")
    if scores.shape != (count,):
        raise DataError(f"{who} gives {tuple(scores.shape)} for {count} images; return one score for each image")
    if not scores.isfinite().all():
        bad = int((~scores.isfinite()).sum())
        raise NonFinite(f"{who} gives {bad} of {count} images a score that is not a number; mend it")
    return scores.float()
