"""Which scorecards a page can show."""

from __future__ import annotations

from dmdr.errors import DataError

SCHEMA = 2  # of dmdr.metrics.scorecard


def readable(card: dict, address: str) -> dict:
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
