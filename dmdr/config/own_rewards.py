"""Rewards of one's own: a file, an installed package, or a service in another process. No torch."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from dmdr.config.reward_weights import OF
from dmdr.config.section import Address, Positive, Rate, Section

REWARD_NAME = r"^[a-z][a-z0-9-]{0,39}$"  # no dots, which part the keys of a config
RewardName = Annotated[str, Field(pattern=REWARD_NAME)]
FILE = re.compile(r"(?P<path>.+\.py):(?P<name>[A-Za-z_]\w*)")
ONLY_SERVICE = ("timeout", "wait", "batch")


class OwnReward(Section):
    """A reward that does not come with DMDR. Set exactly one of `file`, `entry_point` and `url`."""

    # FILE.py:CLASS. The code in the file runs in the process of the stage; `dmdr init reward` writes one to begin with
    file: Address | None = None
    entry_point: str | None = Field(None, min_length=1)  # of the group dmdr.rewards, of an installed package
    url: Address | None = None  # http://HOST:PORT of a service, such as `dmdr serve-reward`
    timeout: Rate = 60.0  # of a service: seconds that an answer may take
    # of a service: seconds that it may be away. Then the stage ends with exit code 74, after a checkpoint
    wait: Rate = 600.0
    batch: Positive = 16  # of a service: most images in a request

    @model_validator(mode="after")
    def _check_place(self) -> OwnReward:
        given = [key for key in ("file", "entry_point", "url") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a reward of your own has {' and '.join(given) or 'no place'}; give one of file, entry_point, url"
            )
        if self.file is not None and not FILE.fullmatch(self.file):
            raise ValueError(f"file {self.file} is not FILE.py:CLASS, for example my_rewards.py:Sharpness")
        if self.file is not None and "://" in self.file:
            raise ValueError(f"file {self.file} is not on this machine; copy it here, or serve it and give its url")
        if self.url is not None:
            check_url(self.url)
        elif unused := sorted(self.model_fields_set.intersection(ONLY_SERVICE)):
            raise ValueError(f"{unused[0]} is set but only a reward with a url has it; drop it")
        return self

    @property
    def place(self) -> str:
        """The one place that is set."""
        return self.file or self.entry_point or self.url or ""

    def split_file(self) -> tuple[str, str]:
        """The path of the file and the name of the class in it."""
        assert self.file is not None
        path, _, name = self.file.rpartition(":")
        return path, name


def check_url(url: str) -> None:
    """
    Raises:
        ValueError: it is no address of a service.
    """
    try:
        parts = urlsplit(url)
        has_place = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port that is none
        has_place = False
    if not has_place or parts.query or parts.fragment:
        raise ValueError(f"url {url} is no address of a service; give http://HOST:PORT")


def refuse_taken_name(name: str) -> None:
    """
    Raises:
        ValueError: DMDR has a reward or metric of that name.
    """
    if name in OF or name in ("lab-checker", "fashion-judge"):
        raise ValueError(f"rewards.{name} has the name of a reward or metric that comes with DMDR; choose another")


def check_reachable(name: str, reward: OwnReward) -> None:
    """Refuse a file that no pod would find where the config says.

    Raises:
        ValueError: its path is relative.
    """
    if reward.file is not None and not reward.file.startswith("/"):
        raise ValueError(
            f"rewards.{name}.file {reward.file} is relative, and a pod of execution.cluster does not see this folder; "
            "give its absolute path in the image or on one of execution.cluster.claims, or serve it "
            f"(dmdr serve-reward {reward.file}) and give its url"
        )
