"""Take over a stage that another run has sealed, instead of running it."""

from __future__ import annotations

from dmdr.errors import ConfigError
from stages.store.address import find_differing_keys, normalise_json
from stages.store.artifacts import Artifact
from stages.store.records import Json, Record


def adopt_stage(own: Artifact, run: str, identity: Json, inputs: dict[str, str]) -> Record:
    """Copy the verified result of another run of the same store, and seal it here; returns the record.

    Raises:
        InputMissing: that run has not sealed this stage.
        ConfigError: that run has other settings or inputs, or this address belongs to other ones.
        DataError: one of its files is damaged.
    """
    other = Artifact(own.store, run, own.stage)
    other_record = other.sealed()
    record = own.adopt(other, identity, inputs)
    if record is None:
        settings = find_differing_keys(normalise_json(identity), other_record.identity)
        differences = [f"{key} (settings)" for key in settings]
        differences += [f"{key} (inputs)" for key in find_differing_keys(inputs, other_record.inputs)]
        raise ConfigError(
            f"run {own.run} cannot take over {own.stage} from run {run}: they differ in {', '.join(differences)}; "
            f"take these values from {other.address}/record.json into the config, or run the stage without --adopt"
        )
    return record
