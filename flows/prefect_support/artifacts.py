"""What Prefect's UI shows of a finished run: scorecard, image grid and where the report is; of a table, its claims."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path

from prefect.artifacts import create_image_artifact, create_markdown_artifact

from stages.reports.card import read_figures
from stages.reports.scorecard_text import format_scorecard
from stages.store.artifacts import Artifact

LARGEST_IMAGE = 2**20  # bytes, as it goes into Prefect's database; the report shows a larger grid


def publish_page(table: str, claims: str) -> None:
    """Publish a table's verdict on the paper's claims. claims: Markdown that also says where the page lies."""
    create_markdown_artifact(claims, key=f"claims-{table}", description=f"Claims of {table}")


def publish_scorecard(run: str, store: str) -> None:
    """Publish the sealed evaluation of a run as Prefect artifacts."""
    artifact = Artifact(store, run, "evaluate")
    with tempfile.TemporaryDirectory() as cache:
        folder = artifact.fetch(Path(cache))
        figures = read_figures(folder, artifact.address)
        grid = (folder / "grid.png").read_bytes()
    page = f"# {run}\n\n{format_scorecard(figures)}\n\n{describe_report(artifact.address, run, store)}\n"
    create_markdown_artifact(page, key="scorecard", description=f"Scorecard of {run}")
    if len(grid) <= LARGEST_IMAGE:
        image = f"data:image/png;base64,{base64.b64encode(grid).decode()}"
        create_image_artifact(image, key="grid", description=f"Same prompts, same noise: {run}")


def describe_report(address: str, run: str, store: str) -> str:
    """Where the report is, as Markdown. A browser opens no file and no s3:// address from a page of Prefect."""
    report = f"{address}/report.html"
    if address.startswith(("http://", "https://")):
        return f"[The report]({report}) has all images."
    return (
        f"The report has all images: `{report}`. `dmdr pull {run} evaluate report --store {store}` copies it to the "
        "folder `report` of another machine."
    )
