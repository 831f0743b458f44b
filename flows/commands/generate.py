"""`dmdr generate`: images of one prompt, drawn by the student of a run, and by its teacher beside it."""

from __future__ import annotations

import hashlib
import re
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dmdr.config.load import load_config
from dmdr.errors import ConfigError, Stopped
from stages.store.runs import follow_name

if TYPE_CHECKING:
    from stages.generation.drawing import DrawingModel, Drawn  # brings torch

LONGEST = 48  # characters of a prompt in the name of a file
CONFIG_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Request:
    """Images of a prompt, one of each seed, as files whose names begin with the run and the prompt."""

    run: str
    prompt: str
    seeds: range
    folder: Path

    def name_file(self, ending: object) -> Path:
        """The path of one image."""
        words = "-".join(re.findall(r"[a-z0-9]+", self.prompt.lower()))
        if not words or len(words) > LONGEST:  # a prompt whose words do not tell it from others
            words = f"{words[:LONGEST]}-{hashlib.sha256(self.prompt.encode()).hexdigest()[:8]}".strip("-")
        return self.folder / f"{self.run}-{words}-{ending}.png"


def generate_images(run: str, prompt: str, *, count: int, seed: int, compare: bool, out: str, store: str) -> int:
    """Draw, write PNG files, and print their paths and seconds; returns 0.

    run: its name, a name that it was promoted to, or its config. out: a folder, made if it is not there.

    Raises:
        ConfigError: the prompt is empty, or `out` is a file.
        InputMissing: there is no such run, it has no student yet, or its teacher is not found.
        DataError: something is damaged, or the teacher is another one.
        NonFinite: an image is not a number.
    """
    if not prompt.strip():
        raise ConfigError("the prompt is empty; say what the images show")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {out} is a file; name a folder for the images")
    config = load_config(run) if run.endswith(CONFIG_SUFFIXES) else None
    run = follow_name(store, config.run if config else run)
    from stages.generation.drawing import load_models
    from stages.generation.source import find_student

    source = find_student(store, run)
    with tempfile.TemporaryDirectory() as cache:
        student, teacher = load_models(source, config, Path(cache), compare=compare)
    print(f"student of {run}: {source.describe()}, {student.model.nfe} NFE an image")
    folder.mkdir(parents=True, exist_ok=True)
    request = Request(run, prompt, range(seed, seed + count), folder)
    try:
        if teacher is None:
            _draw_all(request, student, keep=True)
        else:
            _compare(request, student, teacher)
    except KeyboardInterrupt:
        print("dmdr: stopped; the images above are written", file=sys.stderr)
        return Stopped.exit_code
    return 0


def _draw_all(request: Request, model: DrawingModel, *, keep: bool) -> list[Drawn]:
    """Draw all seeds. keep: write and print each image at once."""
    from stages.generation.drawing import draw_image

    images: list[Drawn] = []
    for seed in request.seeds:
        images.append(draw_image(model, request.prompt, seed))
        if keep:
            path = request.name_file(seed)
            images[-1].image.save(path)
            print(f"{path}  {images[-1].seconds:.2f} s")
    return images


def _compare(request: Request, student: DrawingModel, teacher: DrawingModel) -> None:
    """Draw with both models, and write one picture with a row for each seed."""
    import numpy as np

    from stages.generation.drawing import warm_up
    from stages.reports.gallery import Row, build_grid

    models = {"student": student, "teacher": teacher}
    images: dict[str, list[Drawn]] = {}
    for name, model in models.items():
        warm_up(model, request.prompt)
        images[name] = _draw_all(request, model, keep=name == "student")
    seconds = {name: statistics.median(each.seconds for each in drawn) for name, drawn in images.items()}
    rows = [
        Row(f"{request.prompt} (seed {seed})", None, {name: np.asarray(images[name][row].image) for name in models})
        for row, seed in enumerate(request.seeds)
    ]
    headings = {name: f"{name}, {model.model.nfe} NFE, {seconds[name]:.2f} s" for name, model in models.items()}
    path = request.name_file("compare")
    build_grid(rows, headings).save(path)
    factor = seconds["teacher"] / seconds["student"]
    print(f"{path}  {headings['student']}; {headings['teacher']}: {factor:.1f} times as long")
