"""What remembers a million prompts in few bytes: the hashes of those that were seen, and records that wait on disk."""

from __future__ import annotations

import random
import tracemalloc

from stages.prompt_sources.key_set import KeySet
from stages.prompt_sources.record_spool import RecordSpool

SEED = random.SystemRandom().randrange(2**32)


def test_a_key_set_is_a_set() -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    # few low bits, so that many keys want the same slot; 0, which marks a free one; and the greatest
    keys = [0, 2**64 - 1, *(rng.choice((rng.getrandbits(64), rng.getrandbits(4) << 60)) for _ in range(20_000))]
    found, naive = KeySet(), set()
    for key in keys:
        assert (key in found) == (key in naive)
        if rng.random() < 0.5:
            found.add(key)
            naive.add(key)
    assert len(found) == len(naive)
    assert all((key in found) == (key in naive) for key in keys)


def test_a_key_takes_at_most_24_bytes() -> None:
    rng = random.Random(SEED)
    tracemalloc.start()
    try:
        keys = KeySet()
        for _ in range(100_000):
            keys.add(rng.getrandbits(64))
        assert tracemalloc.get_traced_memory()[0] < 24 * 100_000
    finally:
        tracemalloc.stop()


def test_a_spool_gives_the_records_that_were_put_in() -> None:
    spool = RecordSpool()
    records = [{"prompt": f"line \u2028 {n} \U0001f98a", "include": [{"class": "a", "count": n}]} for n in range(50)]
    for record in records:
        spool.append(record)
    assert len(spool) == 50
    assert spool.select([3, 49, 3, 0]) == [records[n] for n in (3, 49, 3, 0)]
