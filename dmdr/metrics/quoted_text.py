"""The text that a prompt puts in quotation marks, and how much of it was read. Nothing is read here.

1. Letters count without their case, and spaces not at all: a drawn text has no reliable ones.
2. The score is 1 - edits / (characters of the longer text). So text that nobody asked for costs as much as text that
   is missing. Flow-GRPO divides by the prompt's characters alone, and lets text around the asked one pass.
3. Several quotes may be read in any order, up to MOST_ORDERED of them.
"""

from __future__ import annotations

import itertools
import re
import unicodedata

QUOTES = re.compile(
    r"\"([^\"]*)\"|“([^”]*)”|„([^“”]*)[“”]|«([^»]*)»|‘([^’]*)’|(?<!\w)'([^']*)'(?!\w)"  # an apostrophe stands in a word
)
MOST_ORDERED = 4
LONGEST = 1000  # characters that are compared; a page of them is no caption


def list_quotes(prompt: str) -> list[str]:
    """The texts in quotation marks, in their order, without those that have no letter or digit."""
    found = ("".join(groups) for groups in QUOTES.findall(prompt))
    return [text for text in found if normalise(text)]


def score_text(quotes: list[str], lines: list[str]) -> float:
    """How well the lines that were read are the quoted texts, in [0, 1]."""
    read = normalise("".join(lines))[:LONGEST]
    wanted = [normalise(text) for text in quotes]
    orders = itertools.permutations(wanted) if len(wanted) <= MOST_ORDERED else [tuple(wanted)]
    return max(compare("".join(order)[:LONGEST], read) for order in orders)


def compare(wanted: str, read: str) -> float:
    """1 - edit distance / the length of the longer text."""
    return 1 - count_edits(wanted, read) / max(len(wanted), len(read), 1)


def normalise(text: str) -> str:
    """Letters, digits and signs in one form, without case and spaces."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def count_edits(a: str, b: str) -> int:
    """The least number of characters to insert, delete or replace that make a into b (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]
