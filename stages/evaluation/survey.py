"""Looks at every image once: keeps those that a page shows large, all of them in small, and counts the broken ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dmdr.metrics.faults import Fault, find_fault
from dmdr.metrics.scorecard import ModelOnCard
from stages.evaluation.evaluation_set import Attempt, images_file
from stages.evaluation.samples import Sample, unpack
from stages.reports.broken_images import BrokenImages, count_faults
from stages.reports.explorer import choose_pictured, choose_side
from stages.reports.pictures import Picture, describe_image, embed_image

Samples = dict[str, dict[int, Sample]]  # model -> place -> the prompt's images


@dataclass(frozen=True)
class Survey:
    """What was seen. pictures: model -> place -> its first image in small; faulty: places with a broken image."""

    samples: Samples
    pictures: dict[str, dict[int, Picture]]
    broken: list[BrokenImages]
    faulty: set[int]


def survey_images(attempt: Attempt, models: Sequence[ModelOnCard], shown: set[int]) -> Survey:
    """Look at the images of all models. shown: places whose images are kept as they are."""
    pictured = choose_pictured(len(attempt.evaluation_set.records), len(models))
    side = choose_side(len(pictured) * len(models))
    survey = Survey({}, {}, [], set())
    for model in models:
        samples, pictures = survey.samples.setdefault(model.name, {}), survey.pictures.setdefault(model.name, {})
        found: Counter[Fault] = Counter()
        images = 0
        for number in range(len(attempt.evaluation_set.shards())):
            for sample in unpack(attempt.shards.require(images_file(model.name, number)).file):
                faults = [
                    fault for fault in map(find_fault, sample.images, sample.finite.tolist()) if fault is not None
                ]
                found.update(faults)
                images += len(sample.images)
                if faults:
                    survey.faulty.add(sample.place)
                if sample.place in shown:
                    samples[sample.place] = sample
                if sample.place in pictured:
                    alt = describe_image(model.label, sample.record["prompt"])
                    pictures[sample.place] = embed_image(sample.images[0], alt, side)
        survey.broken.append(count_faults(model.label, images, found))
    return survey
