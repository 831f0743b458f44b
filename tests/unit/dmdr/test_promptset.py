"""The PromptSet: what was written comes back bit for bit, in any order, without reading the rest."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from dmdr.errors import DataError
from dmdr.promptset import PromptSet, write_shard, write_unconditional
from dmdr.promptset.layout import Layout, find_layout, name_files

SEED = random.SystemRandom().randrange(2**32)
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def random_tensor(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random bits, so NaNs with payloads, infinities and denormals too; a bool is 0 or 1."""
    size = torch.empty(shape, dtype=dtype)
    raw = bytearray(rng.randbytes(size.numel() * size.element_size()))
    if dtype == torch.bool:
        raw = bytearray(byte & 1 for byte in raw)
    return torch.frombuffer(raw, dtype=dtype).reshape(shape).clone() if raw else size


def random_text(rng: random.Random) -> str:
    return "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0xA0, 0xD800), 0x1F600])) for _ in range(20))


@pytest.mark.parametrize("layout", ["joined", "rows"])
@pytest.mark.parametrize("trial", range(4))
def test_items_and_records_come_back(trial: int, layout: Layout, tmp_path: Path) -> None:
    print(f"seed {SEED}, trial {trial}")
    rng = random.Random(SEED + trial)
    keys = {name: (rng.choice(DTYPES), rng.choice([(), (3,), (2, 5)])) for name in ("clip", "t5", "pooled", "t5.mask")}

    def item() -> dict[str, torch.Tensor]:
        return {k: random_tensor(rng, (rng.randrange(0, 6), *tail), dtype) for k, (dtype, tail) in keys.items()}

    written: dict[str, list] = {}
    for split in ("train", "evaluation"):
        sizes = [rng.randrange(1, 9) for _ in range(rng.randrange(1, 4))]
        shards = [[({"prompt": random_text(rng), "n": rng.random()}, item()) for _ in range(size)] for size in sizes]
        for number, shard in enumerate(shards):
            write_shard(tmp_path, split, number, [r for r, _ in shard], (i for _, i in shard), layout=layout)
        written[split] = [pair for shard in shards for pair in shard]
    assert find_layout(path.name for path in tmp_path.iterdir()) == layout
    for split, pairs in written.items():
        prompts = PromptSet(tmp_path, split)
        assert {path.name for path in tmp_path.glob(f"{split}-00000*")} == {*name_files(layout, split, 0)}
        assert len(prompts) == len(pairs)
        indices = [rng.randrange(len(pairs)) for _ in range(20)]  # any order, some twice
        assert prompts.records(indices) == [pairs[index][0] for index in indices]
        for found, index in zip(prompts.items(indices), indices, strict=True):
            assert {k: bits(v) for k, v in found.items()} == {k: bits(v) for k, v in pairs[index][1].items()}
        for beyond in (len(pairs), -1):
            with pytest.raises(IndexError):
                prompts.items([beyond])
    empty = item()
    write_unconditional(tmp_path, empty)
    assert {k: bits(v) for k, v in PromptSet.unconditional(tmp_path).items()} == {k: bits(v) for k, v in empty.items()}


def test_a_folder_that_is_no_prompt_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no train prompts"):
        PromptSet(tmp_path, "train")
    with pytest.raises(DataError, match=r"unconditional\.safetensors"):
        PromptSet.unconditional(tmp_path)
    write_shard(tmp_path, "train", 0, [{"prompt": "a"}], [{"x": torch.zeros(2, 2)}])
    shard = tmp_path / "train-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(DataError, match="train-00000"):
        PromptSet(tmp_path, "train")


def test_a_damaged_row_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    items = [{"x": random_tensor(rng, (4, 3), torch.bfloat16)} for _ in range(5)]
    write_shard(tmp_path, "train", 0, [{"prompt": str(n)} for n in range(5)], items, layout="rows")
    shard = tmp_path / "train-00000.items"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1  # in the third of five equal rows
    shard.write_bytes(data)
    prompts = PromptSet(tmp_path, "train")
    assert [bits(item["x"]) for item in prompts.items([4, 0, 4])] == [bits(items[n]["x"]) for n in (4, 0, 4)]
    for harmed in (bytes(data), bytes(data[: len(data) // 2])):
        shard.write_bytes(harmed)
        with pytest.raises(DataError, match=r"train-00000\.items is damaged from byte .* run the stage prompts again"):
            prompts.items([2])
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00000\.items is missing"):
        prompts.items([0])


def test_texts_need_no_items(tmp_path: Path) -> None:
    for number, count in enumerate((3, 2)):
        records = [{"prompt": f"shard {number}, line\u2028 {n}"} for n in range(count)]
        write_shard(tmp_path, "train", number, records, [], layout="text")
    prompts = PromptSet(tmp_path, "train")
    assert len(prompts) == 5
    assert prompts.records([4, 0]) == [{"prompt": "shard 1, line\u2028 1"}, {"prompt": "shard 0, line\u2028 0"}]
    assert len(PromptSet(tmp_path, "train", sizes=[3, 2])) == 5


@pytest.mark.parametrize(("count", "limit", "places"), [(10, 100, list(range(10))), (1000, 4, [0, 250, 500, 750])])
def test_a_limit_spreads_over_all_prompts(tmp_path, count, limit, places):
    records = [{"prompt": str(number)} for number in range(count)]
    write_shard(tmp_path, "train", 0, records, [{"context": torch.zeros(1, 2)} for _ in records])
    assert PromptSet(tmp_path, "train").spread(limit) == places
