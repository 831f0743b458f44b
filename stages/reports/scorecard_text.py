"""A scorecard as text: Markdown tables whose columns also line up on a terminal."""

from __future__ import annotations

TRAINED_ON = " (trained on)"


def format_scorecard(scorecard: dict) -> str:
    """Models against metrics, then the paired differences; every interval is the 95 % one over prompts.

    scorecard: the content of scorecard.json.
    """
    models = [model["name"] for model in scorecard["models"]]
    cells = {(row["name"], row["model"]): _format_interval(row["mean"], row) for row in scorecard["metrics"]}
    metrics = {row["name"]: row["trained_on"] for row in scorecard["metrics"]}
    scores = [["metric", *map(_heading, scorecard["models"])]] + [
        [metric + TRAINED_ON * trained_on, *(cells.get((metric, model), "") for model in models)]
        for metric, trained_on in metrics.items()
    ]
    differences = [["difference", "metric", "mean, 95 % interval"]] + [
        [f"{row['a']} - {row['b']}", row["metric"], _format_interval(row["difference"], row, sign="+")]
        for row in scorecard["paired"]
    ]
    return "\n\n".join(format_table(rows) for rows in (scores, differences) if len(rows) > 1)


def format_table(rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def _heading(model: dict) -> str:
    guidance = f", CFG {model['guidance_scale']:g}" if model["guidance_scale"] > 1 else ""
    return f"{model['name']}: {model['steps']} step{'s' * (model['steps'] > 1)}, {model['nfe']} NFE{guidance}"


def _format_interval(mean: float | None, row: dict, sign: str = "") -> str:
    if mean is None:
        return "not a number"
    return f"{mean:{sign}.3f} [{row['low']:{sign}.3f}, {row['high']:{sign}.3f}]"
