"""What Prefect's UI shows of a finished run: scorecard, image grid, where the report is, whether it was promoted; of a
table, its claims."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path

from prefect.artifacts import create_image_artifact, create_markdown_artifact

from stages.reports.card import read_figures
from stages.reports.scorecard_text import format_scorecard
from stages.reports.verdict import format_number
from stages.store.artifacts import Artifact
from stages.store.records import Decision

LARGEST_IMAGE = 2**20  # bytes, as it goes into Prefect's database; the report shows a larger grid


def publish_page(table: str, claims: str) -> None:
    """Publish a table's verdict on the paper's claims. claims: Markdown that also says where the page lies."""
    create_markdown_artifact(claims, key=f"claims-{table}", description=f"Claims of {table}")


def publish_promotion(decision: Decision) -> None:
    """Publish whether a run was promoted, with the figures that decided."""
    rows = [
        f"| {each.metric} | {format_number(each.difference, '+')} | {format_number(each.low, '+')} | "
        f"{format_number(each.high, '+')} | {each.n} |"
        for each in decision.metrics
    ]
    head = [f"| metric | {decision.run} less {decision.over} | low | high | prompts |", "|---|---|---|---|---|"]
    page = "\n".join([f"# {decision.name}", "", decision.text, "", *(head if rows else []), *rows])
    create_markdown_artifact(page, key="promotion", description=f"Whether {decision.run} became {decision.name}")


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
