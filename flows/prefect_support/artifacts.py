"""What a finished run shows in Prefect's UI: scorecard, image grid and where the report lies; or a table's claims."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path

from prefect.artifacts import create_image_artifact, create_link_artifact, create_markdown_artifact

from stages.reports.card import read_figures
from stages.reports.scorecard_text import format_scorecard
from stages.store.artifacts import Artifact

LARGEST_IMAGE = 2**20  # bytes that go into Prefect's database; a larger grid is in the report


def publish_page(table: str, claims: str) -> None:
    """Publish what a table says of the paper's claims, and where its page lies."""
    create_markdown_artifact(claims, key=f"claims-{table}", description=f"Claims of {table}")


def publish_scorecard(run: str, store: str) -> None:
    """Publish the sealed evaluation of a run as Prefect artifacts."""
    artifact = Artifact(store, run, "evaluate")
    with tempfile.TemporaryDirectory() as cache:
        folder = artifact.fetch(Path(cache))
        figures = read_figures(folder, artifact.address)
        grid = (folder / "grid.png").read_bytes()
    create_markdown_artifact(
        f"# {run}\n\n{format_scorecard(figures)}\n", key="scorecard", description=f"Scorecard of {run}"
    )
    if len(grid) <= LARGEST_IMAGE:
        image = f"data:image/png;base64,{base64.b64encode(grid).decode()}"
        create_image_artifact(image, key="grid", description=f"Same prompts, same noise: {run}")
    report = f"{artifact.address}/report.html"
    link = report if "://" in report else Path(report).absolute().as_uri()
    create_link_artifact(link, "report.html", key="report", description=f"Report of {run}")
