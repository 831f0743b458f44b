"""`dmdr render`: the Job that a stage would be, so that `kubectl create -f -` can start it without Prefect."""

from __future__ import annotations

import yaml

from flows.launch.manifest import build_manifest
from flows.launch.stage import prepare_stage


class _Text(yaml.SafeDumper):
    """SafeDumper that writes text of several lines, as the config is, and labels that recur so that people can read."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Text.add_representer(str, _text)


def print_job(config: str, stage: str, run: str | None, store: str, attempt: int) -> int:
    """Print the manifest of a stage as YAML. Always 0.

    Raises:
        ConfigError: the config has no execution.cluster, or no pod would see the store.
        InputMissing: there is no such config.
    """
    print(
        yaml.dump(build_manifest(prepare_stage(stage, config, run, store), attempt), Dumper=_Text, sort_keys=False),
        end="",
    )
    return 0
