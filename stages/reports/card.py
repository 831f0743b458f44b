"""Reads scorecard.json and the speed.json beside it."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from dmdr.errors import DataError
from dmdr.metrics.scorecard import SCHEMA, Figures, Scorecard, Speed


def read_scorecard(folder: Path, address: str) -> Scorecard:
    """The scorecard in `folder`. address: of its evaluation, for messages.

    Raises:
        DataError: the file is damaged, or a DMDR wrote it whose figures mean something else.
    """
    try:
        text = (folder / "scorecard.json").read_text(encoding="utf-8")
        schema = json.loads(text)["schema"]
        if schema == SCHEMA:
            return Scorecard.model_validate_json(text)
    except (ValueError, KeyError, TypeError) as error:
        raise _refuse(f"{address}/scorecard.json", address, error) from error
    raise DataError(
        f"{address}/scorecard.json has schema {schema}, this DMDR reads {SCHEMA}; delete {address} and evaluate again"
    )


def read_figures(folder: Path, address: str) -> Figures:
    """Models, means and differences of a scorecard of any schema.

    Raises:
        DataError: the file is damaged.
    """
    try:
        return Figures.model_validate_json((folder / "scorecard.json").read_bytes())
    except ValidationError as error:
        raise _refuse(f"{address}/scorecard.json", address, error) from error


def read_speed(folder: Path, address: str) -> Speed:
    """How fast the models of the evaluation drew.

    Raises:
        DataError: the file is damaged.
    """
    try:
        return Speed.model_validate_json((folder / "speed.json").read_bytes())
    except ValidationError as error:
        raise _refuse(f"{address}/speed.json", address, error) from error


def _refuse(file: str, address: str, error: Exception) -> DataError:
    """One line. pydantic's own message has several: the first problem stands for all."""
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return DataError(f"{file} does not read ({reason}); delete {address} and evaluate again")
