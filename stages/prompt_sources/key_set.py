"""A set of 64-bit hashes in one flat table: 12 to 24 bytes a hash, where a set of Python's integers takes 100."""

from __future__ import annotations

from array import array

FIRST = 1024  # slots of an empty table; always a power of two
FULL = 2 / 3  # the share of slots that are taken when the table is doubled


class KeySet:
    """Open addressing with linear probing. 0 marks a free slot, and the hash 0 is kept as 1.

    The hashes have to be spread evenly: their lowest bits choose the slot.
    """

    def __init__(self) -> None:
        self._table = array("Q", [0]) * FIRST
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: int) -> bool:
        return self._table[self._find(key or 1)] != 0

    def add(self, key: int) -> None:
        """Add a hash; it may be there already."""
        slot = self._find(key or 1)
        if self._table[slot]:
            return
        self._table[slot] = key or 1
        self._count += 1
        if self._count > FULL * len(self._table):
            self._double()

    def _find(self, key: int) -> int:
        """The slot of a hash, or the free one where it belongs."""
        table = self._table
        last = len(table) - 1
        slot = key & last
        while table[slot] not in (0, key):
            slot = (slot + 1) & last
        return slot

    def _double(self) -> None:
        old, self._table = self._table, array("Q", [0]) * (2 * len(self._table))
        for key in old:
            if key:
                self._table[self._find(key)] = key
