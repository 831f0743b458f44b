"""Counts as all pages and messages print them; `stages.reports.verdict.format_number` prints scores."""

from __future__ import annotations


def format_count(number: int, what: str) -> str:
    """A number and its noun: "1 prompt" or "1,200 prompts"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
