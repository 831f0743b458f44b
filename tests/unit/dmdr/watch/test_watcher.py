"""A look at a student: its figures, that it leaves no trace, and that alarms ring."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from dmdr.config.few_steps import FewSteps
from dmdr.config.load import load_config
from dmdr.config.prompt_record import PromptRecord
from dmdr.config.training import Optimizer, Training
from dmdr.config.watch import Watch
from dmdr.noise import noise_for
from dmdr.promptset import PromptSet
from dmdr.rewards.load import load_reward
from dmdr.rollout import sample_student
from dmdr.shared_base import SharedBase
from dmdr.state import TrainState, fill_parameters
from dmdr.watch.alarms import find_alarms
from dmdr.watch.figures import (
    BLACK,
    DIVERSITY,
    FLAT,
    NON_FINITE,
    REWARD,
    SATURATION,
    SHARPNESS,
    WHITE,
    diversity,
    measure_prompt,
    saturation,
    score_images,
    select_looks,
    sharpness,
)
from dmdr.watch.watcher import Watcher
from tests.support.tiny_teachers import copy_teacher
from tests.support.trained_run import seal_stage

HELD_OUT, SEED, STEPS = "lab-mixer", 11, 2
DEAF = {"reward_drop": 9.0, "diversity_drop": 0.999, "saturation_rise": 999.0}  # no finite image sets these off


# The figures


def test_saturation_and_diversity_equal_numpy():
    images = torch.rand(5, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    each = images.double().numpy()
    spreads = [np.mean([max(p) - min(p) for p in image.reshape(3, -1).T]) for image in each]
    assert saturation(images).numpy() == pytest.approx(spreads)
    pairs = [np.sqrt(np.mean((a - b) ** 2)) for a, b in itertools.combinations(each, 2)]
    assert float(diversity(images)) == pytest.approx(np.mean(pairs))
    assert float(diversity(images[:1].expand(3, -1, -1, -1))) == 0.0
    opposite = torch.stack([torch.zeros(3, 6, 4), torch.ones(3, 6, 4)])
    assert float(diversity(opposite)) == pytest.approx(1.0)
    assert saturation(opposite).tolist() == [0.0, 0.0]


def test_blur_lowers_sharpness_and_less_contrast_does_not():
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    each = images.double().numpy()
    steps = [np.abs(np.diff(image, axis=axis)).mean() for image in each for axis in (2, 1)]
    spread = [np.mean([channel.std() for channel in image]) for image in each]
    assert sharpness(images).numpy() == pytest.approx(np.reshape(steps, (4, 2)).sum(1) / spread)
    pale = 0.5 + 0.1 * (images - 0.5)
    assert sharpness(pale).numpy() == pytest.approx(sharpness(images).numpy(), rel=1e-4)
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1)
    assert (sharpness(blurred) < 0.7 * sharpness(images)).all()
    assert sharpness(torch.full((1, 3, 16, 16), 0.3)).tolist() == [0.0]


def test_images_that_show_nothing_are_told_apart():
    scene = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    flat = torch.tensor([0.9, 0.2, 0.1])[:, None, None].expand(3, 16, 16)[None]
    images = torch.cat([scene, torch.zeros(1, 3, 16, 16), torch.ones(2, 3, 16, 16), flat])
    row = measure_prompt(images, None)
    assert (row[BLACK], row[WHITE], row[FLAT], row[NON_FINITE]) == (0.2, 0.4, 0.2, 0.0)


def test_a_broken_image_counts_for_nothing_else():
    reward, prompts = load_reward("lab-conv"), [PromptRecord(prompt="a red circle")] * 4
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    sound = images[[0, 2, 3]].clone()
    images[1, 0, 3, 3] = torch.nan
    row = measure_prompt(images, score_images(reward, images, prompts))
    assert row[NON_FINITE] == 0.25
    assert row[REWARD] == pytest.approx(float(reward(sound, ["a red circle"] * 3).mean()), abs=1e-6)
    assert row[DIVERSITY] == float(diversity(sound))
    assert row[SATURATION] == float(saturation(sound).mean())
    one = images[:2]
    assert measure_prompt(one, score_images(reward, one, prompts[:2])).keys() == {*row} - {DIVERSITY}
    unrewarded = measure_prompt(images, None)
    assert unrewarded == {name: value for name, value in row.items() if name != REWARD}
    assert measure_prompt(images[1:2], score_images(reward, images[1:2], prompts[:1])) == {NON_FINITE: 1.0}


class Bench:
    """A base, its state and the sealed prompts of a tiny run; `watcher` says into `said`."""

    def __init__(self, config_path: Path, store: Path, rank: int | None) -> None:
        self.config = load_config(config_path)
        self.folder = seal_stage(self.config, store, "prompts")
        backbone = copy_teacher(Path(self.config.teacher.path))
        self.base = SharedBase(backbone, fake_rank=2, fake_scale=1.0, student_rank=rank, seed=0)
        optimizer = Optimizer(learning_rate=1e-3)
        training = Training(updates=9, batch_size=1, student=optimizer, fake_score=optimizer)
        self.state = TrainState(self.base, training, ema=0.9)
        self.said: list[str] = []

    def watcher(self, *, batch_size: int = 5, **changes: object) -> Watcher:
        watch = Watch(**{"every": 1, "reward": HELD_OUT, "prompts": 4, "seeds": 3} | DEAF | changes)
        return Watcher(
            config=watch,
            base=self.base,
            reward=load_reward(watch.reward),
            prompts=PromptSet(self.folder, "train"),
            times=self.base.backbone.student_times(FewSteps(STEPS)),
            eta=1.0,
            seed=SEED,
            at_once=max(1, batch_size // watch.seeds),
            updates=9,
            say=self.said.append,
        )

    def look(self, watcher: Watcher) -> tuple[dict, bool]:
        """A look and, as the loop does, its row."""
        seen = watcher.look(self.state, last=False)
        self.state.rows.append({"update": self.state.update, **seen.figures})
        self.state.update += 1
        return self.state.rows[-1], seen.ends_stage


@pytest.fixture(params=[None, 4], ids=["full", "lora"])
def bench(request, tiny_config, tmp_path) -> Bench:
    return Bench(tiny_config(), tmp_path / "store", request.param)


def test_a_look_is_of_the_ema_and_leaves_no_trace(bench):
    """Against images drawn one by one, by a network that has the EMA for its weights."""
    generator = torch.Generator().manual_seed(4)
    for name, average in bench.state.ema.items():
        average.add_(0.05 * torch.randn(average.shape, generator=generator))
        bench.base.student_parameters[name].data.add_(0.05 * torch.randn(average.shape, generator=generator))
    before = {name: value.clone() for name, value in bench.state.tensors().items()}
    watcher = bench.watcher()
    found = watcher.look(bench.state, last=False).figures
    after = bench.state.tensors()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    fill_parameters(bench.base.student_parameters, bench.state.ema, "the EMA")
    backbone, prompts = bench.base.backbone, watcher.prompts
    times, by_prompt = backbone.student_times(FewSteps(STEPS)), []
    for index in [0, 3, 7, 10]:  # four of fourteen, evenly
        images = []
        for seed in range(3):
            noises = noise_for(SEED, "watch", index, seed, shape=(STEPS, *backbone.latent_shape))[:, None]
            c = backbone.collate(prompts.items([index]))
            with bench.base.use_adapter("student", float(bench.base.student_is_lora)) as network:
                network = network if bench.base.student_is_lora else bench.base.student_network
                images.append(backbone.decode(sample_student(backbone, network, c, times=times, noises=noises))[0])
        by_prompt.append((prompts.records([index])[0]["prompt"], torch.stack(images)))
    reward = load_reward(HELD_OUT)
    expected = {
        REWARD: np.mean([reward(images, [text] * 3).mean().item() for text, images in by_prompt]),
        DIVERSITY: np.mean([diversity(images).item() for _, images in by_prompt]),
        SATURATION: np.mean([saturation(images).mean().item() for _, images in by_prompt]),
        SHARPNESS: np.mean([sharpness(images).mean().item() for _, images in by_prompt]),
        **dict.fromkeys((NON_FINITE, BLACK, WHITE, FLAT), 0.0),
    }
    assert found == pytest.approx(expected, abs=1e-5)
    assert bench.watcher(batch_size=100).look(bench.state, last=True).figures == pytest.approx(found, abs=1e-5)


def test_the_student_is_itself_again_after_an_error(bench):
    for average in bench.state.ema.values():
        average.add_(1.0)
    before = {name: value.clone() for name, value in bench.state.tensors().items()}
    with pytest.raises(KeyError), bench.state.averaged():
        inside = bench.state.tensors()
        assert all(torch.equal(inside[f"student/param/{name}"], before[f"ema/{name}"]) for name in bench.state.ema)
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in bench.state.tensors().items())


# The alarms


PUSHES = {  # what the student is moved by: the loss, the setting that listens to it, and whether the figure falls
    REWARD: (lambda images, scores: scores.mean(), {"reward_drop": 0.02}, True),
    DIVERSITY: (lambda images, scores: images.var(0).mean(), {"diversity_drop": 0.2}, True),
    SATURATION: (lambda images, scores: -(images.amax(1) - images.amin(1)).mean(), {"saturation_rise": 0.03}, False),
}


@pytest.mark.parametrize("figure", PUSHES)
def test_a_student_moved_by_hand_sets_off_its_alarm_alone(bench, figure):
    loss_of, settings, falls = PUSHES[figure]
    watcher, backbone = bench.watcher(**settings), bench.base.backbone
    reward = watcher.reward
    reward.scale, reward.bias = 4.0, 0.0  # as shipped, it is sure that these images of an untrained teacher are wrong
    c = backbone.collate(watcher.prompts.items(range(8)))
    texts = [record["prompt"] for record in watcher.prompts.records(range(8))]
    optimizer = torch.optim.Adam(
        bench.base.student_parameters.values(), lr=2e-2 if bench.base.student_is_lora else 3e-3
    )
    first, stop = bench.look(watcher)
    assert not bench.said and not stop
    while not bench.said and bench.state.update < 80:
        noise = noise_for(1, bench.state.update, shape=(8, *backbone.latent_shape))
        images = backbone.decode(bench.base.student(noise, torch.ones(8), c))
        optimizer.zero_grad()
        loss_of(images, reward(images, texts)).backward()
        optimizer.step()
        fill_parameters(bench.state.ema, bench.base.student_parameters, "the student")
        row, stop = bench.look(watcher)
        (limit,) = settings.values()
        past = max(each[REWARD] for each in bench.state.rows[:-1]) if figure == REWARD else first[figure]
        bound = past - limit if figure == REWARD else past * (1 - limit if falls else 1 + limit)
        assert bool(bench.said) == (row[figure] < bound if falls else row[figure] > bound)
    (line,) = bench.said
    assert f"ALARM at update {bench.state.update - 1}:" in line and f"is {row[figure]:.4g}, it was {past:.4g}" in line
    assert "\n" not in line and "lower joint.student.learning_rate" in line
    bench.look(watcher)
    assert len(bench.said) == 1, "a breach that goes on is told once"


def test_images_that_are_not_numbers_are_an_alarm_not_an_error(bench):
    watcher = bench.watcher(export="best")
    bench.look(watcher)
    kept = {name: value.clone() for name, value in bench.state.best_ema.items()}
    next(iter(bench.state.ema.values())).fill_(torch.nan)
    row, _ = bench.look(watcher)
    assert row == {"update": 1, NON_FINITE: 1.0}
    assert len(bench.said) == 1 and "not numbers is 1, it was 0 at update 0" in bench.said[0]
    assert all(torch.equal(value, kept[name]) for name, value in bench.state.best_ema.items())


@pytest.mark.parametrize("on_alarm", ["off", "warn", "stop"])
def test_off_is_silent_warn_goes_on_stop_stops(bench, on_alarm):
    watcher = bench.watcher(on_alarm=on_alarm, every=2)
    assert bench.look(watcher)[1] is False
    next(iter(bench.state.ema.values())).fill_(torch.nan)
    assert bench.look(watcher) == ({"update": 1}, False), "no look was due"
    row, stop = bench.look(watcher)
    assert row[NON_FINITE] == 1.0 and stop == (on_alarm == "stop")
    assert len(bench.said) == (on_alarm != "off")
    assert [alarm.update for alarm in find_alarms(watcher.config, select_looks(bench.state.rows))] == [2]
