"""What a page shows of an evaluation: scorecard.json, with speed.json beside it."""

from __future__ import annotations

from dmdr.errors import DataError

SCHEMA = 2  # of dmdr.metrics.scorecard, which needs scipy


def require_readable(card: dict, address: str) -> dict:
    """The card itself.

    Raises:
        DataError: it was written by another DMDR, whose figures this one does not know the meaning of.
    """
    if card["schema"] != SCHEMA:
        raise DataError(
            f"{address}/scorecard.json has schema {card['schema']}, this DMDR reads {SCHEMA}; delete {address} and "
            "evaluate again"
        )
    return card


def add_speed(card: dict, speed: dict) -> dict:
    """The card with how long the models took to draw; speed: the content of speed.json."""
    models = [{**each, "seconds_per_image": speed["seconds_per_image"][each["name"]]} for each in card["models"]]
    return {**card, "models": models, "device": speed["device"], "batch_size": speed["batch_size"]}
