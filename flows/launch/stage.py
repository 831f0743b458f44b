"""A stage of a run as it is handed to whoever runs it, and the labels that its Jobs are found by."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dmdr.config.cluster import Cluster, Pods
from dmdr.config.load import load_config
from dmdr.config.run import Config
from dmdr.errors import ConfigError

PREFIX = "dmdr.dev"  # of our labels and annotations
RUN, STAGE = f"{PREFIX}/run", f"{PREFIX}/stage"


@dataclass(frozen=True)
class Stage:
    """One stage of one run: what its pods are told, and what tells its Job from others.

    text: the config file, word for word. teacher, adopt: as `python -m stages` has them.
    """

    name: str
    run: str
    store: str
    config: Config
    text: str
    teacher: str | None = None
    adopt: str | None = None

    @property
    def cluster(self) -> Cluster:
        assert self.config.execution.cluster is not None
        return self.config.execution.cluster

    @property
    def pods(self) -> Pods:
        return self.cluster.of(self.name)

    @property
    def selector(self) -> str:
        """The labels of all attempts."""
        return f"{RUN}={self.run_label},{STAGE}={self.name}"

    @property
    def run_label(self) -> str:
        return to_label(self.run)

    @property
    def is_set(self) -> bool:
        return self.pods.nodes > 1


def build_options(config: str, run: str, store: str, teacher: str | None, adopt: str | None) -> list[str]:
    """The arguments of `python -m stages` after the stage."""
    found = ["--config", config, "--run", run, "--store", store]
    found += ["--teacher", teacher] if teacher is not None else []
    return found + (["--adopt", adopt] if adopt is not None else [])


def to_label(text: str) -> str:
    """A label's value: letters, digits and . _ - with a letter or digit at both ends, at most 63."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)[:63].strip("._-")


def prepare_stage(
    stage: str, config: str, run: str | None, store: str, teacher: str | None = None, adopt: str | None = None
) -> Stage:
    """A stage of a config file, ready to be made into a manifest.

    Raises:
        ConfigError: the config has no execution.cluster.
    """
    checked = load_config(config)
    if checked.execution.cluster is None:
        raise ConfigError(
            f"config {config} has no execution.cluster, which says what a Job asks for; add one with an image"
        )
    text = Path(config).read_text(encoding="utf-8")
    return Stage(stage, run or checked.run, store, checked, text, teacher, adopt)
