"""A trial of a store says that it can be used, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmdr.errors import InputMissing, StoreError
from stages.store.address import open_place
from stages.store.trial import try_store


def test_nothing_stays(store: str):
    assert try_store(store) == f"{store} takes files, refuses to replace them and deletes them"
    assert open_place(store).names() == []


def test_folders_that_the_trial_made_are_gone_and_others_stay(tmp_path: Path):
    (tmp_path / "there" / "run").mkdir(parents=True)
    for store in (tmp_path / "new" / "runs", tmp_path / "there"):
        try_store(str(store))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["run", "there"]


def test_what_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot write in .*/file/runs/_check-.*: Not a directory"):
        try_store(str(tmp_path / "file" / "runs"))


@pytest.mark.usefixtures("s3")
@pytest.mark.process
def test_a_bucket_that_is_not_there_is_named():
    with pytest.raises(InputMissing, match="no-such-bucket"):
        try_store("s3://no-such-bucket/runs")
