"""Taking over what another run sealed in the place of running a stage."""

from __future__ import annotations

import json

from dmdr.errors import ConfigError
from stages.store.artifacts import Artifact


def adopt_stage(own: Artifact, run: str, identity: dict, inputs: dict[str, str]) -> dict:
    """Copy the result of another run of the same store, verified, and seal it here; returns the record.

    Raises:
        InputMissing: that run has not sealed this stage.
        ConfigError: it did so with other settings or inputs, or this address belongs to others.
        DataError: one of its files is damaged.
    """
    other = Artifact(own.store, run, own.stage)
    theirs = other.sealed()
    record = own.adopt(other, identity, inputs)
    if record is None:
        asked = json.loads(json.dumps({"settings": identity, "inputs": inputs}))
        found = {"settings": theirs["identity"], "inputs": theirs["inputs"]}
        differ = [f"{key} ({kind})" for kind in asked for key in _list_differences(asked[kind], found[kind])]
        raise ConfigError(
            f"the {own.stage} of run {run} cannot be that of {own.run}: they differ in {', '.join(differ)}; give the "
            f"config what {other.address}/record.json says, or let this run make its own"
        )
    return record


def _list_differences(one: dict, other: dict) -> list[str]:
    missing = object()
    return sorted(key for key in {*one, *other} if one.get(key, missing) != other.get(key, missing))
