"""Who hears of what becomes of a run. No torch."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from dmdr.config.secrets import refuse_secret
from dmdr.config.section import Section

EventName = Literal["alarm", "sealed", "finished", "failed", "waiting", "budget", "promoted", "kept"]
EVENTS: tuple[EventName, ...] = get_args(EventName)
VARIABLE = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*")


def check_webhook(webhook: str) -> str:
    """Raises ValueError if it is neither an address nor the name of a variable."""
    if VARIABLE.fullmatch(webhook) or re.match(r"https?://[^\s/]", webhook):
        return refuse_secret(webhook)
    raise ValueError("a webhook is an address, http:// or https://, or env:NAME of a variable that holds one")


class Notify(Section):
    """One receiver of events: an alarm, a stage sealed, the run finished or failed, a Job that waits, a budget spent,
    a name promoted to the run, or kept where it is because the run is no better.

    Each event is sent once, however often a run is started again.
    """

    # gets a POST with JSON: event, run, stage, store, text. Most such addresses are secrets: give env:NAME, of an
    # environment variable that holds it
    webhook: Annotated[str, AfterValidator(check_webhook)] | None = None
    command: tuple[str, ...] | None = Field(None, min_length=1, strict=False)  # gets the same JSON on its stdin
    events: tuple[EventName, ...] = Field(EVENTS, min_length=1, strict=False)  # that it hears of

    @model_validator(mode="after")
    def _check_receiver(self) -> Notify:
        if (self.webhook is None) == (self.command is None):
            raise ValueError("execution.notify needs a webhook or a command in each entry, and not both")
        return self
