"""What Prefect shows of a decision about a promotion: a line, an artifact on the flow run's page, and an event."""

from __future__ import annotations

from collections.abc import Callable

from flows.prefect_support import artifacts, news
from stages.runtime.events import build_promotion
from stages.store.records import Decision


def show_decision(store: str, decision: Decision, say: Callable[[str], None]) -> None:
    """Show whether a run was promoted. say: takes the line."""
    say(decision.text)
    artifacts.publish_promotion(decision)
    news.emit(build_promotion(store, decision))
