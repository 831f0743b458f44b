"""The stage evaluate, end to end on a teacher that diffusers wrote and on lab prompts with GenEval's tasks."""

from __future__ import annotations

import json
import shutil
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dmdr.config.few_steps import FewSteps
from dmdr.config.load import load_config
from dmdr.config.run import Config
from dmdr.errors import InputMissing, Stopped
from dmdr.export.write import WEIGHTS
from dmdr.lab.prompts import lab_prompts
from dmdr.noise import noise_for
from dmdr.promptset import PromptSet
from dmdr.rewards.load import load_reward
from dmdr.rollout import sample_student, sample_teacher
from dmdr.teacher.load import load_network
from stages import evaluate
from stages.evaluation.drawing import sample_noises
from stages.store.inputs import fingerprint_inputs
from tests.support.tiny_configs import PROMPTS
from tests.support.tiny_teachers import copy_teacher
from tests.support.trained_run import context_for, run_stage, seal_stage, trained_run

METRICS = ["lab-mixer", "lab-conv"]


@pytest.fixture
def config(tiny_config) -> Config:
    return load_config(tiny_config(evaluate={"metrics": METRICS, "batch_size": 4}))


@pytest.fixture
def store(config: Config, tmp_path: Path) -> Path:
    store = trained_run(config, tmp_path / "store")
    seal_stage(config, store, "export")
    return store


def test_scorecard_of_a_tiny_run(config, store, tmp_path):
    folder = seal_stage(config, store, "evaluate")
    card = json.loads((folder / "scorecard.json").read_text())
    models = [model["name"] for model in card["models"]]
    assert (card["schema"], card["run"], card["prompts"]) == (2, "tiny", 6)
    assert {m["name"]: (m["steps"], m["nfe"], m["guidance_scale"]) for m in card["models"]} == {
        "student": (2, 2, 1.0),
        "teacher": (3, 6, 3.0),
        "naive teacher": (2, 2, 1.0),
        "cold start": (2, 2, 1.0),
    }
    assert [(m["name"], m["model"], m["n"], m["trained_on"]) for m in card["metrics"]] == [
        (metric, model, 6, metric == "lab-conv") for metric in METRICS for model in models
    ]
    assert [(p["metric"], p["a"], p["b"]) for p in card["paired"]] == [
        (metric, "student", model) for metric in METRICS for model in models[1:]
    ]
    assert card["tags"] == {}
    assert not list(folder.glob("results-*"))  # no prompt has a task

    expected = by_hand(config, store)
    for each in card["metrics"]:
        assert each["mean"] == pytest.approx(expected[each["name"]][each["model"]].mean(), abs=1e-4)
        assert each["low"] <= each["mean"] <= each["high"]
    for pair in card["paired"]:
        lead = expected[pair["metric"]]["student"] - expected[pair["metric"]][pair["b"]]
        assert pair["difference"] == pytest.approx(lead.mean(), abs=1e-4)
    assert Image.open(folder / "grid.png").width > 4 * 144
    html = (folder / "report.html").read_text()
    assert html.count("<img ") == count_images(expected, models)
    assert all(text in html for text in ("loss_dm", "cold start", "trained on", "student.steps", config.run))
    assert str(tmp_path) not in html


def by_hand(config: Config, store: Path) -> dict[str, dict[str, np.ndarray]]:
    """The same images drawn one prompt at a time, from the folders alone: metric -> model -> scores."""
    prompts = PromptSet(store / "tiny" / "prompts", "evaluation")
    backbone = copy_teacher(Path(config.teacher.path))
    student = load_network(store / "tiny" / "export" / "pipeline")
    cold = copy_teacher(Path(config.teacher.path)).network
    cold.load_state_dict(load_file(store / "tiny" / "cold_start" / WEIGHTS))
    empty = backbone.collate(backbone.encode([""])[0])
    images: dict[str, list[torch.Tensor]] = {"student": [], "teacher": [], "naive teacher": [], "cold start": []}
    for index in range(len(prompts)):
        noises = sample_noises(config.seed, [index], steps=2, shape=backbone.latent_shape)
        c = backbone.collate(backbone.encode([prompts.records([index])[0]["prompt"]])[0])
        times = backbone.student_times(FewSteps(2))
        images["student"].append(sample_student(backbone, student, c, times=times, noises=noises))
        images["cold start"].append(sample_student(backbone, cold, c, times=times, noises=noises))
        for name, steps, scale in (("teacher", 3, 3.0), ("naive teacher", 2, 1.0)):
            times = backbone.teacher_times(steps)
            images[name].append(sample_teacher(backbone, c, empty, guidance_scale=scale, times=times, noise=noises[0]))
    texts = [record["prompt"] for record in prompts.records(range(len(prompts)))]
    pictures = {name: eight_bits(backbone.decode(torch.cat(each))) for name, each in images.items()}
    return {
        metric: {name: load_reward(metric)(each, texts).numpy() for name, each in pictures.items()}
        for metric in METRICS
    }


def count_images(expected: dict[str, dict[str, np.ndarray]], models: list[str]) -> int:
    """The images of a page: three prompts that lead, by three models at most; wins and losses; all prompts; and the one
    that enlarges the others."""
    return 3 * min(3, len(models)) + (extremes(expected, models) + 6) * len(models) + 1


def extremes(expected: dict[str, dict[str, np.ndarray]], models: list[str]) -> int:
    """How many prompts are shown as largest wins and losses of the first model against the second, five of each."""
    if len(models) < 2:
        return 0
    leads = expected["lab-mixer"][models[0]] - expected["lab-mixer"][models[1]]
    return min(5, int((leads > 0).sum())) + min(5, int((leads < 0).sum()))


def eight_bits(images: torch.Tensor) -> torch.Tensor:
    """As a file holds them. Drawn in other batches, a value may be rounded to the one beside it: scores to 1e-4."""
    return (images.clamp(0, 1) * 255).round() / 255


@pytest.mark.parametrize(
    ("models", "needed"),
    [
        (["cold start"], {"prompts", "cold_start"}),
        (["teacher", "cold start"], {"prompts", "cold_start"}),
        (["naive teacher"], {"prompts"}),
        (["student", "teacher"], {"prompts", "export"}),
    ],
)
def test_a_part_of_the_models_needs_a_part_of_the_stages(tiny_config, tmp_path, models, needed):
    """The stages that are not read are not there at all; the figures are those of the whole comparison."""
    config = load_config(tiny_config(evaluate={"metrics": METRICS, "batch_size": 4, "models": models}))
    store = trained_run(config, tmp_path / "store")
    seal_stage(config, store, "export")
    expected = by_hand(config, store)
    for stage in {"cold_start", "joint", "export"} - needed:
        shutil.rmtree(store / "tiny" / stage)
    folder = run_stage(config, store, "evaluate")
    assert set(fingerprint_inputs(config, "evaluate", str(store), "tiny")) == {"teacher", *needed}
    card = json.loads((folder / "scorecard.json").read_text())
    assert [model["name"] for model in card["models"]] == models
    for each in card["metrics"]:
        assert each["mean"] == pytest.approx(expected[each["name"]][each["model"]].mean(), abs=1e-4)
        assert each["trained_on"] == (each["name"] == "lab-conv" and "student" in models)
    assert [(pair["a"], pair["b"]) for pair in card["paired"]] == [(models[0], b) for _ in METRICS for b in models[1:]]
    html = (folder / "report.html").read_text()
    assert html.count("<img ") == count_images(expected, models)
    assert ("The lead of the" in html) == (len(models) > 1)
    assert ("loss_dm" in html) == bool(needed & {"cold_start"})


def test_a_compared_model_must_be_there(config, store):
    shutil.rmtree(store / "tiny" / "cold_start")
    with pytest.raises(InputMissing, match="needs cold_start"):
        run_stage(config, store, "evaluate")


def test_scores_are_there_prompt_by_prompt(config, store):
    folder = seal_stage(config, store, "evaluate")
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    expected = by_hand(config, store)
    texts = PromptSet(store / "tiny" / "prompts", "evaluation").records(range(6))
    assert [(line["index"], line["prompt"]) for line in lines] == [(n, each["prompt"]) for n, each in enumerate(texts)]
    for metric, by_model in expected.items():
        for model, values in by_model.items():
            found = [line["scores"][model][metric] for line in lines]
            assert found == pytest.approx(values.tolist(), abs=1e-4)


def test_several_images_a_prompt(tiny_config, tmp_path):
    """Figures are means over a prompt's images, the first of which is the only one of a single seed."""
    pages = {}
    for seeds in (1, 3):
        settings = {"metrics": METRICS, "batch_size": 4, "models": ["student", "teacher"], "seeds": seeds}
        config = load_config(tiny_config(evaluate=settings))
        store = trained_run(config, tmp_path / f"store-{seeds}")
        seal_stage(config, store, "export")
        pages[seeds] = run_stage(config, store, "evaluate")
    lines = [json.loads(line) for line in (pages[3] / "scores.jsonl").read_text().splitlines()]
    for model in ("student", "teacher"):
        first, *more = drawn(config, store, model)
        expected = np.mean([load_reward("lab-conv")(each, PROMPTS[14:]).numpy() for each in (first, *more)], axis=0)
        assert [line["scores"][model]["lab-conv"] for line in lines] == pytest.approx(expected.tolist(), abs=1e-4)
        for n, line in enumerate(lines):  # distances, image by image
            trio = [images[n].clamp(0, 1) for images in (first, *more)]
            vectors = [load_reward("lab-mixer").embed_images(image[None])[0] for image in trio]
            pairs = [(0, 1), (0, 2), (1, 2)]
            pixels = np.mean([float(((trio[a] - trio[b]) ** 2).mean()) ** 0.5 for a, b in pairs])
            cosine = np.mean([1 - float(vectors[a] @ vectors[b]) for a, b in pairs])
            assert line["scores"][model]["diversity/pixels"] == pytest.approx(pixels, abs=1e-4)
            assert line["scores"][model]["diversity/lab-mixer"] == pytest.approx(cosine, abs=1e-4)
            assert "diversity/lab-conv" not in line["scores"][model]  # trained on
            shown = [folder / "images" / model / f"{n:05d}" / "samples" / "0000.png" for folder in pages.values()]
            want = (first[n].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
            for path in shown:  # drawn in other batches: a value may be rounded to the one beside it
                assert np.abs(np.asarray(Image.open(path), dtype=float) - want).max() <= 1
    card = json.loads((pages[3] / "scorecard.json").read_text())
    assert "3 images each" in (pages[3] / "report.html").read_text()
    assert {each["name"] for each in card["metrics"]} == {*METRICS, "diversity/pixels", "diversity/lab-mixer"}


def drawn(config: Config, store: Path, model: str) -> list[torch.Tensor]:
    """The images of all evaluation prompts, once for each of three seeds, from noise that is keyed here by hand."""
    prompts = PromptSet(store / "tiny" / "prompts", "evaluation")
    backbone = copy_teacher(Path(config.teacher.path))
    student = load_network(store / "tiny" / "export" / "pipeline")
    c = backbone.collate(prompts.items(range(6)))
    empty = backbone.collate(backbone.encode([""])[0])
    found = []
    for number in range(3):

        def noise(n: int, step: int, more: tuple[int, ...] = (number,) if number else ()) -> torch.Tensor:
            return noise_for(3, "evaluate", n, step, *more, shape=backbone.latent_shape)

        noises = torch.stack([torch.stack([noise(n, step) for n in range(6)]) for step in range(2)])
        if model == "student":
            x0 = sample_student(backbone, student, c, times=backbone.student_times(FewSteps(2)), noises=noises)
        else:
            times = backbone.teacher_times(3)
            x0 = sample_teacher(backbone, c, empty, guidance_scale=3.0, times=times, noise=noises[0])
        found.append(eight_bits(backbone.decode(x0)))
    return found


def test_geneval_tasks_on_the_lab_teacher(tiny_config, tmp_path):
    """32x32 images, prompts with metadata beside one without: strict, soft, tasks and GenEval's results."""
    records = [*lab_prompts("held-out")[:9], {"prompt": "a lighthouse at night"}]
    (tmp_path / "lab.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "more.txt").write_text("a red cross\ntwo black squares\n")
    config = load_config(
        tiny_config(
            teacher={"path": "lab:flow", "guidance_scale": 3.0, "steps": 4},
            prompts={"sources": [str(tmp_path / "more.txt")], "evaluation": str(tmp_path / "lab.jsonl")},
            evaluate={"metrics": ["lab-checker", "lab-mixer"], "batch_size": 4},
        )
    )
    store = trained_run(config, tmp_path / "store")
    seal_stage(config, store, "export")
    folder = run_stage(config, store, "evaluate")
    card = json.loads((folder / "scorecard.json").read_text())
    counts = {each["name"]: each["n"] for each in card["metrics"]}
    assert counts == {"strict": 9, "soft": 9, "lab-mixer": 10}
    for model in card["models"]:
        path = folder / f"results-{model['name'].replace(' ', '-')}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        keys = ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
        assert [list(line) for line in lines] == [keys] * 9
        assert [line["prompt"] for line in lines] == [record["prompt"] for record in records[:9]]
        tasks: dict[str, list[bool]] = {}
        for line in lines:
            tasks.setdefault(line["tag"], []).append(line["correct"])
        of_model = card["tags"]["strict"][model["name"]]
        assert of_model["overall"] == pytest.approx(np.mean([np.mean(each) for each in tasks.values()]), abs=1e-9)
        (strict,) = (m for m in card["metrics"] if (m["name"], m["model"]) == ("strict", model["name"]))
        assert strict["mean"] == pytest.approx(np.mean([line["correct"] for line in lines]))
    html = (folder / "report.html").read_text()
    assert all(tag in html for tag in {record.get("tag", "prompts") for record in records})
    reasons = {line["reason"] for line in lines if line["reason"]}  # of the last model
    assert reasons and all(f"why 0: {escape(reason)}" in html for reason in reasons)
    assert all(f'value="{number}"' in html for number in range(1, len(records) + 1))  # every prompt is in the list
    speed = json.loads((folder / "speed.json").read_text())
    assert speed["spread"].keys() == speed["seconds_per_image"].keys()
    for name, spread in speed["spread"].items():
        assert 0 < spread["least"] <= speed["seconds_per_image"][name] <= spread["greatest"] and spread["batches"] >= 3


def test_stage_stops_between_batches(config, store):
    answers = iter([False, True])
    context = context_for(config, store, "evaluate", stop=lambda: next(answers))
    with pytest.raises(Stopped):
        evaluate.run(context)
    assert not (context.out / "scorecard.json").exists()


def test_noise_is_each_prompts_own():
    shape = (2, 3, 3)
    together = sample_noises(5, [4, 7], steps=4, shape=shape)
    assert together.shape == (4, 2, *shape)
    assert torch.equal(together[:2, 1:], sample_noises(5, [7], steps=2, shape=shape))  # fewer steps start alike
    assert not torch.equal(together[:, 0], together[:, 1])


def test_of_an_export_only_the_pipeline_is_read(config, store):
    """On S3 the other forms would be downloaded for nothing; here, they may even be gone."""
    (store / "tiny" / "export" / "provenance.json").unlink()
    assert (run_stage(config, store, "evaluate") / "scorecard.json").is_file()
