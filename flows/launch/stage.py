"""One stage of one run, as it is handed to whatever runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dmdr.config.cluster import Cluster, Pods
from dmdr.config.load import load_config
from dmdr.config.run import Config
from dmdr.config.stages import StageName
from dmdr.errors import ConfigError
from flows.launch.labels import RUN, STAGE, to_label


@dataclass(frozen=True)
class Stage:
    """One stage of one run.

    text: the config file, word for word. teacher: the address of a teacher that replaces the config's. adopt: the run
    whose result of this stage is copied.
    """

    name: StageName
    run: str
    store: str
    config: Config
    text: str
    teacher: str | None = None
    adopt: str | None = None

    @property
    def cluster(self) -> Cluster:
        """The cluster of the config; `prepare_stage` has seen that there is one."""
        assert self.config.execution.cluster is not None
        return self.config.execution.cluster

    @property
    def pods(self) -> Pods:
        """What a pod of this stage asks for."""
        return self.cluster.of(self.name)

    @property
    def selector(self) -> str:
        """The labels that all attempts at this stage have."""
        return f"{RUN}={self.run_label},{STAGE}={self.name}"

    @property
    def run_label(self) -> str:
        """The name of the run, as a label can hold it."""
        return to_label(self.run)

    @property
    def is_set(self) -> bool:
        """Whether it runs on several nodes, as a JobSet."""
        return self.pods.nodes > 1


def build_options(config: str, run: str, store: str, teacher: str | None, adopt: str | None) -> list[str]:
    """The arguments of `python -m stages` that follow the name of the stage."""
    options = ["--config", config, "--run", run, "--store", store]
    if teacher is not None:
        options += ["--teacher", teacher]
    if adopt is not None:
        options += ["--adopt", adopt]
    return options


def name_command(verb: str, job: str, stage: Stage) -> str:
    """What a person types to look at the Job of a stage, or to stop it."""
    return f"kubectl -n {stage.cluster.namespace} {verb} {'jobset' if stage.is_set else 'job'} {job}"


def prepare_stage(
    stage: StageName, config: str, run: str | None, store: str, teacher: str | None = None, adopt: str | None = None
) -> Stage:
    """A stage of a config file, ready for a manifest. run: its name; the config's own if None.

    Raises:
        ConfigError: the config has no execution.cluster.
    """
    checked = load_config(config)
    checked.require_stage(stage, f"stage {stage}")
    if checked.execution.cluster is None:
        raise ConfigError(
            f"config {config} has no execution.cluster, which says what a Job asks for; add one with an image"
        )
    text = Path(config).read_text(encoding="utf-8")
    return Stage(stage, run or checked.run, store, checked, text, teacher, adopt)
