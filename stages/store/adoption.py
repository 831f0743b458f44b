"""Taking over what another run sealed, instead of running the stage."""

from __future__ import annotations

from dmdr.errors import ConfigError
from stages.store.address import find_differing_keys, normalise_json
from stages.store.artifacts import Artifact
from stages.store.records import Json, Record


def adopt_stage(own: Artifact, run: str, identity: Json, inputs: dict[str, str]) -> Record:
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
        settings = find_differing_keys(normalise_json(identity), theirs.identity)
        differences = [f"{key} (settings)" for key in settings]
        differences += [f"{key} (inputs)" for key in find_differing_keys(inputs, theirs.inputs)]
        raise ConfigError(
            f"the {own.stage} of run {run} cannot be that of {own.run}: they differ in {', '.join(differences)}; "
            f"change the config to what {other.address}/record.json says, or run the stage without --adopt"
        )
    return record
