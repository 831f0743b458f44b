"""The words of a page that a reader may not know, each explained where it stands.

templates/words.html.jinja shows a word as a button that opens its explanation, and all of them as a list at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmdr.metrics.scorecard import Figures
from stages.reports.table1 import list_figures


@dataclass(frozen=True)
class Word:
    """A word and what it means. key: its id on a page."""

    key: str
    word: str
    meaning: str


NFE = Word(
    "nfe",
    "NFE",
    "Number of function evaluations: how often the network runs for one image. It is what an image costs, whatever the "
    "hardware. Guidance (CFG) runs the network twice a step, unless it is an input of the network.",
)
HELD_OUT = Word(
    "held-out",
    "held out",
    "A measure that no compared model was trained to raise. Only these decide which model is better: whoever trains on "
    "a measure raises it, and may get worse images for it.",
)
TRAINED_ON = Word(
    "trained-on",
    "trained on",
    "The student was trained to raise this very number, so a gain in it proves little.",
)
INTERVAL = Word(
    "interval",
    "95 % interval",
    "The range in which the value lies with a confidence of 95 %, had other prompts of the same kind been drawn. A "
    "difference counts as shown where its interval does not contain 0.",
)
GUIDANCE = Word(
    "cfg",
    "CFG",
    "Classifier-free guidance: a step runs the network with and without the prompt and exaggerates the difference.",
)
OF_MODELS = {
    "student": Word("student", "student", "The model that this run trained. It draws in few steps, without guidance."),
    "teacher": Word("teacher", "teacher", "The model that the student learned from, with all its steps and guidance."),
    "naive teacher": Word(
        "naive-teacher",
        "naive teacher",
        "The untrained teacher in as few steps as the student and without guidance: what one gets for the same price "
        "without any training.",
    ),
    "cold start": Word(
        "cold-start",
        "cold start",
        "The student after the first training stage, which imitates the teacher and knows no reward yet.",
    ),
    "start": Word(
        "start",
        "start",
        "The few-step model that this run's student started from, before any training of this run.",
    ),
}
PREFERENCE = "how much people would prefer the image for this prompt, by a model that learned from their choices."
OF_FIGURES = {
    "strict": Word(
        "strict",
        "strict",
        "Pass or fail: 1 where the image shows all that the prompt asks for, by GenEval's rules, else 0.",
    ),
    "soft": Word("soft", "soft", "Partial credit from 0 to 1: how much of what the prompt asks for the image shows."),
    "color": Word("color", "color", "Pass or fail: 1 where what the image shows has the colour of the prompt, else 0."),
    "class": Word("class", "class", "Pass or fail: 1 where the image shows the kind of thing that the prompt names."),
    "geneval": Word(
        "geneval",
        "geneval",
        "GenEval: 1 where a detector finds the objects, counts, colours and positions of the prompt, else 0.",
    ),
    "ocr": Word("ocr", "ocr", "How well the text that the prompt quotes is read from the image: 1 where all of it is."),
    "dpg-bench": Word(
        "dpg-bench",
        "dpg-bench",
        "DPG-Bench: which part of the questions about a long prompt a model answers with yes when it sees the image.",
    ),
    "clip-score": Word("clip-score", "clip-score", "How close image and prompt are for CLIP, a model of both."),
    "dfn-clip": Word("dfn-clip", "dfn-clip", "How close image and prompt are for DFN-CLIP, a model of both."),
    "aesthetic": Word(
        "aesthetic",
        "aesthetic",
        "LAION's aesthetic score: how well people would like the look of the image, whatever the prompt.",
    ),
    "hpsv2.1": Word("hpsv2-1", "hpsv2.1", f"HPSv2.1: {PREFERENCE}"),
    "pickscore": Word("pickscore", "pickscore", f"PickScore: {PREFERENCE}"),
    "imagereward": Word("imagereward", "imagereward", f"ImageReward: {PREFERENCE}"),
    **{
        name: Word(name, name, "The probability that image and caption match, by a small network of the lab.")
        for name in ("lab-conv", "lab-mixer", "fashion-conv", "fashion-mixer")
    },
}


def list_words(card: Figures) -> list[Word]:
    """The words that a page about these models and figures uses."""
    models = [OF_MODELS[model.name] for model in card.models if model.name in OF_MODELS]
    figures = [OF_FIGURES[figure] for figure in list_figures(card) if figure in OF_FIGURES]
    return [NFE, HELD_OUT, TRAINED_ON, INTERVAL, GUIDANCE, *models, *figures]
