"""A run of the lab, all its stages, on S3 in trouble: byte for byte the run on a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from dmdr.config.stages import STAGES
from stages.store import records
from stages.store.artifacts import Artifact
from tests.support import program
from tests.support.s3_proxy import Faults
from tests.support.s3_server import BUCKET
from tests.support.stage_process import Process

ALL_STAGES = """
import sys
from dmdr.config.stages import STAGES
from stages.__main__ import main
for store in sys.argv[2:]:
    for stage in STAGES:
        if code := main([stage, "--config", sys.argv[1], "--store", store]):
            sys.exit(code)
"""


TIMES = {  # what is left of these files without the times they tell; the first group of each stays
    "provenance.json": r'("(?:duration_s|cpu_s|peak_memory_mib)": )[0-9.]+',
    "README.md": r"(\| stage .*, )[0-9]+ s",
    "SHA256SUMS": r"(?m)^()[0-9a-f]{64}(?=  (?:.*/)?(?:provenance.json|README.md)$)",
    "report.html": r'(?s)(<(?:span|svg) class="measured").*?</(?:span|svg)>',
    "speed.json": r"(: )[0-9.e-]+",
}


def timeless(artifact: Artifact, cache: Path) -> dict[str, bytes | str]:
    """What is in each file of an artifact: all its bytes, but for the ones that tell how long something took."""
    folder, found = artifact.fetch(cache), {}
    for name, about in artifact.record().files.items():
        times = TIMES.get(name.rsplit("/", 1)[-1])
        text = None if times is None else (folder / name).read_text(encoding="utf-8")
        found[name] = about.sha256 if text is None else re.sub(times, r"\1", text)
        assert text is None or found[name] != text, f"{name} tells no time"
    return found


def test_a_whole_run_through_trouble_is_the_run_on_a_folder(
    short_lab_config: Callable[..., Path], proxy: Faults, tmp_path: Path
) -> None:
    """Of the lab. Same fingerprints, and the same bytes in every file of every stage but for the times some tell."""
    proxy.busy, proxy.cut, proxy.lost = 0.3, 0.1, 0.02
    stores = (str(tmp_path / "runs"), f"s3://{BUCKET}/whole/runs")
    arguments = [program.__name__, ALL_STAGES, str(short_lab_config()), *stores]
    with Process(arguments, environment=os.environ) as stages:  # of the host that has what stages need
        _, said = stages.communicate(timeout=600)
    assert stages.returncode == 0, said
    assert len(proxy.seen) > 60
    proxy.busy = proxy.cut = proxy.lost = 0.0
    told = set()
    for stage in STAGES:
        folder, s3 = (Artifact(store, "lab-flow", stage) for store in stores)
        assert folder.record().fingerprint == s3.record().fingerprint, stage
        ours, theirs = timeless(folder, tmp_path), timeless(s3, tmp_path / "fetched" / stage)
        assert [name for name in ours | theirs if ours.get(name) != theirs.get(name)] == [], stage
        told |= {name.rsplit("/", 1)[-1] for name in ours}
    assert {*TIMES, "scorecard.json", "model_index.json"} <= told
    assert TIMES.keys() == records.TIMED - {"model.sig"}, "this run is not signed"
