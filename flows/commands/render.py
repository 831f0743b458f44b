"""`dmdr render`: the Kubernetes Job of a stage, so that `kubectl create -f -` can start it without Prefect."""

from __future__ import annotations

import yaml

from dmdr.config.stages import StageName
from flows.launch.manifest import build_manifest
from flows.launch.stage import prepare_stage


class _ReadableDumper(yaml.SafeDumper):
    """SafeDumper whose output people can read: text of several lines as a block, and no aliases for repeated labels."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_ReadableDumper.add_representer(str, _represent_text)


def print_job(config: str, stage: StageName, run: str | None, store: str, attempt: int) -> int:
    """Print the manifest of a stage as YAML; returns 0.

    Raises:
        ConfigError: the config has no execution.cluster, or no pod would see the store.
        InputMissing: there is no such config.
    """
    manifest = build_manifest(prepare_stage(stage, config, run, store), attempt)
    print(yaml.dump(manifest, Dumper=_ReadableDumper, sort_keys=False), end="")
    return 0
