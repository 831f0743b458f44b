"""What a report says of the fake score's updates alone, and of the licence of a student that started elsewhere."""

from __future__ import annotations

import pytest

from stages.reports.export_facts import LicenceFacts, StartFacts
from stages.reports.fake_warmup import WarmupFacts, describe_warmup, summarize_warmup
from stages.reports.model_card import join_licences

TEACHER = LicenceFacts(license="openrail++")


def rows(losses: list[float], teacher: float = 1.0) -> list[dict[str, float]]:
    warmup = [{"update": n - len(losses), "loss_fake": x, "loss_teacher": teacher} for n, x in enumerate(losses)]
    return [*warmup, {"update": 0, "loss_fake": 9.0, "loss_dm": 1.0}]


def test_the_last_quarters_are_compared() -> None:
    facts = summarize_warmup(rows([1.0, 1.0, 0.9, 0.9, 0.7, 0.7, 0.5, 0.5]))
    assert facts == WarmupFacts(updates=8, loss_fake=0.5, loss_teacher=1.0, earlier_fake=0.7, earlier_teacher=1.0)
    assert facts.gain == pytest.approx(0.5) and facts.still_gains == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([1.0, 0.6, 0.5, 0.5], "it follows the student"),
        ([1.0, 0.9, 0.8, 0.6], "a higher joint.fake_warmup may help"),
        ([1.0, 1.1, 1.2, 1.3], "it does not follow the student"),
        ([1.0], "does not follow"),
    ],
)
def test_the_line_says_what_to_do(losses: list[float], words: str) -> None:
    line = describe_warmup(summarize_warmup(rows(losses)))
    assert words in line and "\n" not in line


@pytest.mark.parametrize(
    ("start", "license", "name"),
    [
        (None, "openrail++", None),
        (StartFacts(name="a", digest="0"), "openrail++", None),
        (StartFacts(name="a", digest="0", licence=TEACHER), "openrail++", None),
        (StartFacts(name="a", digest="0", licence=LicenceFacts(license="cc-by-nc-4.0")), "other",
         "openrail++-and-cc-by-nc-4.0"),
    ],
)  # fmt: skip
def test_both_licences_hold(start: StartFacts | None, license: str, name: str | None) -> None:
    joined = join_licences(TEACHER, start)
    assert (joined.license, joined.license_name) == (license, name)
