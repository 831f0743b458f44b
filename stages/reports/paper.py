"""The numbers that the paper prints for its own models, in Tables 1, 2 and 3, as a reference beside ours.

Table 1 was measured on prompts of ShareGPT-4o-Image, ours is not; its Aesthetic, Pick and HP scores have the scale of
ours. In Tables 2 and 3 the paper took the teachers' rows from the literature (for SDXL from GenEval's own paper).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dmdr.metrics.scorecard import MetricFacts

TABLES = {
    "clip-score": "Table 1",
    "aesthetic": "Table 1",
    "pickscore": "Table 1",
    "hpsv2.1": "Table 1",
    "dpg-bench": "Table 2",
    "geneval": "Table 3",
}
SCALES = {"clip-score": 100.0, "hpsv2.1": 100.0, "dpg-bench": 100.0, "geneval": 1.0}  # the paper's highest score
TASKS = {
    "dpg-bench": ("global", "entity", "attribute", "relation", "other"),
    "geneval": ("single_object", "two_object", "counting", "colors", "position", "color_attr"),
}  # in the order of the columns of Tables 2 and 3


@dataclass(frozen=True)
class Printed:
    """One row of the paper. figures: metric -> number; tasks: metric -> task -> number."""

    label: str
    steps: int
    nfe: int
    figures: dict[str, float]
    tasks: dict[str, dict[str, float]]


def _build_row(
    label: str,
    steps: int,
    nfe: int,
    table_1: tuple[float, ...],
    dpg: tuple[float, ...] = (),
    geneval: tuple[float, ...] = (),
) -> Printed:
    """Build a row. table_1: in the order of TABLES. dpg, geneval: the overall score first, then the tasks."""
    figures = dict(zip(TABLES, table_1, strict=False))
    tasks: dict[str, dict[str, float]] = {}
    for metric, numbers in (("dpg-bench", dpg), ("geneval", geneval)):
        if numbers:
            figures[metric] = numbers[0]
            tasks[metric] = dict(zip(TASKS[metric], numbers[1:], strict=True))
    return Printed(label, steps, nfe, figures, tasks)


ROWS = {
    "SDXL-Base": [
        _build_row(
            "teacher, CFG 7",
            25,
            50,
            (34.7588, 5.6480, 22.1085, 27.1477),
            (74.65, 83.27, 82.43, 80.91, 86.76, 80.41),
            (0.55, 0.98, 0.74, 0.39, 0.85, 0.15, 0.23),
        ),
        _build_row("LCM, CFG 8", 1, 2, (28.4664, 5.1026, 20.0603, 17.6837)),
        _build_row("Lightning", 1, 1, (32.0283, 5.6761, 21.4868, 26.3615)),
        _build_row("DMD2, 1 step", 1, 1, (34.3046, 5.6238, 21.7293, 26.5986)),
        _build_row("DMDR, 1 step", 1, 1, (35.4835, 6.0483, 22.5424, 31.1442)),
        _build_row("DMD2", 4, 4, (34.5169, 5.7043, 22.1546, 28.5655)),
        _build_row(
            "DMDR",
            4,
            4,
            (35.2940, 5.9857, 22.6268, 32.8678),
            (76.44, 83.70, 82.54, 83.66, 84.75, 83.49),
            (0.56, 0.99, 0.76, 0.42, 0.84, 0.11, 0.24),
        ),
    ],
    "SD3-Medium": [
        _build_row(
            "teacher, CFG 7",
            25,
            50,
            (34.9025, 5.5942, 22.1801, 28.4021),
            (84.08, 87.90, 91.01, 88.83, 80.70, 88.68),
            (0.62, 0.98, 0.74, 0.63, 0.67, 0.34, 0.36),
        ),
        _build_row("Hyper-SD, CFG 5", 4, 8, (32.0234, 5.2489, 20.2831, 22.4544)),
        _build_row("DMD2, by the paper", 4, 4, (33.9421, 5.6137, 21.7688, 27.3675)),
        _build_row("Flash", 4, 4, (34.2634, 5.6702, 21.5921, 26.6542)),
        _build_row("TDM", 4, 4, (34.0301, 5.6250, 22.0010, 27.7522)),
        _build_row(
            "DMDR",
            4,
            4,
            (34.9542, 5.8462, 22.3578, 31.8979),
            (84.96, 90.46, 90.05, 90.52, 87.12, 91.23),
            (0.64, 0.99, 0.84, 0.54, 0.81, 0.25, 0.44),
        ),
    ],
    "SD3.5-Large": [
        _build_row(
            "teacher, CFG 3.5",
            25,
            50,
            (35.5509, 5.7014, 22.4856, 28.8135),
            (84.12, 91.48, 90.22, 87.81, 91.20, 89.49),
            (0.71, 0.98, 0.89, 0.73, 0.83, 0.34, 0.47),
        ),
        _build_row("LADD", 4, 4, (35.0480, 5.4514, 22.2451, 27.8470)),
        _build_row(
            "DMDR",
            4,
            4,
            (35.8647, 6.0284, 22.8859, 32.4724),
            (85.30, 90.46, 90.50, 90.66, 87.40, 90.18),
            (0.72, 0.99, 0.93, 0.68, 0.80, 0.30, 0.59),
        ),
    ],
}


def base_model(network: str, config: Mapping[str, object]) -> str | None:
    """The paper's name for the base model that a teacher's network has, or None where the paper has no row for it.

    network: its class; config: its diffusers config. A fine-tune has its base's architecture, and so its base's rows.
    """
    if network == "SD3Transformer2DModel" and config["caption_projection_dim"] == 1536 and not config["qk_norm"]:
        return "SD3-Medium"  # 3.5-Medium is as wide and has qk_norm
    if network == "SD3Transformer2DModel" and config["caption_projection_dim"] == 2432:
        return "SD3.5-Large"
    if network == "UNet2DConditionModel" and config["cross_attention_dim"] == 2048:
        return "SDXL-Base"
    return None


def column_of(metric: str, figures: list[str]) -> str | None:
    """The figure of a scorecard that a metric of the paper belongs to, or None where the scorecard has none."""
    official = f"{metric} (official)"  # counted by the script that the paper names
    return next((figure for figure in (official, metric) if figure in figures), None)


def format_as_printed(value: float, metric: str) -> str:
    """A number with the paper's decimals: four in Table 1, two elsewhere; four as well after a change of scale."""
    return f"{value:.4f}" if TABLES[metric] == "Table 1" or round(value, 2) != value else f"{value:.2f}"


def convert_scale(value: float, metric: str, about: MetricFacts) -> float:
    """Bring a number of the paper to a scorecard's scale. about: what the scorecard says about the figure."""
    scale, printed = about.get("scale"), SCALES.get(metric)
    return value if printed is None or not isinstance(scale, int | float) else value * scale / printed


def sort_tasks(tasks: list[str]) -> list[str]:
    """Sort categories: the paper's first, in its order; then the others, as DPG-Bench's finer ones."""
    printed: tuple[str, ...] = next((names for names in TASKS.values() if set(names) <= set(tasks)), ())
    return [*printed, *(task for task in tasks if task not in printed)]


def find_rows(
    base: str | None, figures: list[str], about: Mapping[str, MetricFacts]
) -> list[tuple[Printed, dict[str, str]]]:
    """The rows of a base model, each with figure -> its number as text. A row without a number is left out.

    figures: those of the scorecard; about: what the scorecard says about each.
    """
    columns = {metric: column_of(metric, figures) for metric in TABLES}
    rows = []
    for row in ROWS[base] if base is not None else []:
        cells: dict[str, str] = {}
        for metric, value in row.figures.items():
            figure = columns[metric]
            if figure is not None:
                cells[figure] = format_as_printed(convert_scale(value, metric, about.get(figure, {})), metric)
        if cells:
            rows.append((row, cells))
    return rows


def find_tasks(
    base: str | None, figure: str, figures: list[str], about: Mapping[str, MetricFacts]
) -> dict[str, dict[str, float]]:
    """The paper's numbers under one figure: label of the row -> task, or "overall" -> number.

    figures: those of the scorecard that have categories; about: what the scorecard says about each.
    """
    by_label: dict[str, dict[str, float]] = {}
    for row in ROWS[base] if base is not None else []:
        for metric, tasks in row.tasks.items():
            if column_of(metric, figures) == figure:
                numbers = {"overall": row.figures[metric], **tasks}
                by_label[row.label] = {
                    task: convert_scale(value, metric, about.get(figure, {})) for task, value in numbers.items()
                }
    return by_label
