"""Short runs of a training stage, each from the same start, and what each student then draws.

1. A short run is the beginning of the whole stage: schedules keep their full length.
2. Prompts are those of training, as for the watch, and the noise is the same for every look. So two looks
   differ by the weights alone. Images come from the EMA, which is what a run exports.
3. The fake score is judged on images of the student itself, from noise that no update has seen.
4. A run ends early if a figure is not a number, if the loss of its fake score explodes, or if at half time its images
   have left the teacher's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from dmdr import losses
from dmdr.assembly.networks import Assembly
from dmdr.assembly.run import TeacherSampler, build_run
from dmdr.assembly.stage_config import StageConfig
from dmdr.backbones.protocol import Conditioning, Item
from dmdr.config.run import Config
from dmdr.draws import Run
from dmdr.errors import NonFinite
from dmdr.noise import noise_for
from dmdr.planning.stability import Cell, CellResult, Look, apply_cell
from dmdr.promptset import spread_evenly
from dmdr.promptset.ahead import Ahead
from dmdr.promptset.prompts import Prompts
from dmdr.rewards.protocol import Reward
from dmdr.shared_base import FAKE
from dmdr.state import TrainState, fill_parameters
from dmdr.train import train
from dmdr.update import roll_out
from dmdr.watch.figures import saturation, score_images

PROMPTS = 64  # that every look draws, an image each
FIRST = 5  # updates whose mean loss of the fake score is the measure of an explosion
EXPLOSION = 10.0  # times that mean
LUMINANCE = (0.2126, 0.7152, 0.0722)  # of R, G, B (Rec. 709)


class ShortRuns:
    """Short runs from the student and the fake score that `assembly` holds when this is made.

    prompts: of training. empty_prompt: its conditioning. reward: one that is not trained on.
    """

    def __init__(
        self,
        config: Config,
        stage: StageConfig,
        assembly: Assembly,
        *,
        prompts: Prompts,
        empty_prompt: Item,
        reward: Reward,
    ) -> None:
        self.config, self.stage, self.assembly = config, stage, assembly
        self.prompts, self.reward, self.base = prompts, reward, assembly.base
        self.empty_prompt, self.indices = empty_prompt, spread_evenly(len(prompts), PROMPTS)
        self.at_once = config.execution.micro_batch_size or stage.training.batch_size
        self.first = {
            "student": _copy(self.base.student_parameters),
            "fake score": _copy(self.base.fake_parameters),
        }

    def begin(self, cell: Cell) -> tuple[Run, TrainState]:
        """The run and the state of a cell before its first update."""
        fill_parameters(self.base.student_parameters, self.first["student"], "student")
        fill_parameters(self.base.fake_parameters, self.first["fake score"], "fake score")
        training = apply_cell(self.config, self.stage.name, cell)
        state = TrainState(self.base, training, ema=self.config.student.ema)
        run = build_run(
            self.config.model_copy(update={"seed": cell.seed}),
            replace(self.stage, training=training),
            Assembly(self.base, None if self.assembly.rl is None else self.assembly.rl.act_at_once(), state),
            prompts=self.prompts,
            empty_prompt=self.empty_prompt,
        )
        if isinstance(self.prompts, Ahead):
            run = replace(run, prepare=self.prompts.prepare)
        return run, state

    def run(
        self, cell: Cell, updates: int, *, tick: Callable[[int], None], find_drift: Callable[[Look], str]
    ) -> CellResult:
        """Train a cell for some updates and look at its student.

        tick: called with the updates that are done. find_drift: why a look is a reason to end; empty if it is none.
        """
        began = time.monotonic()
        run, state = self.begin(cell)
        ended, look = "", None
        try:
            for row in train(run, state, stop=lambda: state.update == updates):
                tick(state.update)
                ended = self._find_explosion(state, row.get("loss_fake"))
                if not ended and 0 < state.update == updates // 2:
                    ended = find_drift(self._look_at_average(run, state))
                if ended:
                    break
            if not ended:
                look = self._look_at_average(run, state)
                if self.stage.distribution_matching:  # without it, no fake score is trained
                    look = look.model_copy(update=self.measure_fake_score(run))
        except NonFinite as error:
            ended = str(error).split(";")[0]
        return CellResult(cell=cell, updates=state.update, seconds=time.monotonic() - began, ended=ended, look=look)

    def _look_at_average(self, run: Run, state: TrainState) -> Look:
        with state.averaged():
            return self.look(run)

    @staticmethod
    def _find_explosion(state: TrainState, loss: float | None) -> str:
        """Why a cell has to end; empty if it goes on."""
        first = [row["loss_fake"] for row in state.rows[:FIRST] if "loss_fake" in row]
        if loss is None or len(first) < FIRST:
            return ""
        usual = math.fsum(first) / FIRST
        if loss <= EXPLOSION * usual:
            return ""
        return f"the loss of the fake score is {loss:.3g} at update {state.update}, and was {usual:.3g}"

    @torch.no_grad()
    def look(self, run: Run) -> Look:
        """What the student draws with its present weights."""

        def draw(c: Conditioning, noises: torch.Tensor) -> torch.Tensor:
            eta = self.config.student.few_steps.drawn_eta
            return roll_out(self.base, c, times=run.times, noises=noises.to(run.times), eta=eta).x0[-1]

        return self._measure(draw, len(run.times) - 1)

    @torch.no_grad()
    def look_at_teacher(self, run: Run) -> Look:
        """What the teacher draws of the same prompts, as evaluation lets it draw."""
        teacher = TeacherSampler(self.config, self.base, run.unconditional)

        def draw(c: Conditioning, noises: torch.Tensor) -> torch.Tensor:
            return teacher.draw(c, noises[0].to(run.times))

        return self._measure(draw, len(run.times) - 1)

    def _measure(self, draw: Callable[[Conditioning, torch.Tensor], torch.Tensor], steps: int) -> Look:
        """draw: conditioning, noises (steps, B, C, H, W) -> latents."""
        rewards: list[float] = []
        colours, contrasts, broken = 0.0, 0.0, 0
        for indices in self._split():
            c = self.base.backbone.collate(self.prompts.items(indices))
            images = self.base.backbone.decode(draw(c, self._draw_noises("look", indices, steps))).float()
            rewards += score_images(self.reward, images, self.prompts.records(indices)).tolist()
            sound = images[images.isfinite().flatten(1).all(dim=1)]
            broken += len(images) - len(sound)
            if len(sound):
                colours += float(saturation(sound).sum())
                contrasts += float(measure_contrast(sound).sum())
        whole = max(1, len(rewards) - broken)
        return Look(
            rewards=tuple(value if math.isfinite(value) else None for value in rewards),
            saturation=colours / whole,
            contrast=contrasts / whole,
            broken=broken / len(rewards),
        )

    @torch.no_grad()
    def measure_fake_score(self, run: Run) -> dict[str, float]:
        """loss_fake and loss_teacher on fresh images of the student, at evenly spaced renoise levels.

        Raises:
            NonFinite: one of them is not a number.
        """
        sums, path, backbone = {"loss_fake": 0.0, "loss_teacher": 0.0}, self.base.backbone.path, self.base.backbone
        low, high = run.training.renoise_range
        done = 0
        for indices in self._split():
            c = backbone.collate(self.prompts.items(indices))
            noises = self._draw_noises("fresh", indices, len(run.times)).to(run.times)
            x0 = roll_out(self.base, c, times=run.times, noises=noises[:-1], eta=run.eta).x0[-1]
            places = torch.arange(done, done + len(indices), dtype=x0.dtype, device=x0.device)
            t = low + (high - low) * (places + 0.5) / len(self.indices)
            x_t, target = path.renoise(x0, noises[-1], t), path.target(x0, noises[-1], t)
            sums["loss_fake"] += float(losses.fake_score(self.base.fake(x_t, t, c), target)) * len(indices)
            with self.base.use_adapter(FAKE, 0.0) as network:
                bare = backbone.predict(network, x_t, t, c)
            sums["loss_teacher"] += float(losses.fake_score(bare, target)) * len(indices)
            done += len(indices)
        means = {name: total / done for name, total in sums.items()}
        for name, value in means.items():
            if not math.isfinite(value):
                raise NonFinite(f"{name} is {value} on fresh images; lower the learning rates")
        return means

    def _split(self) -> list[list[int]]:
        return [self.indices[start : start + self.at_once] for start in range(0, len(self.indices), self.at_once)]

    def _draw_noises(self, key: str, indices: list[int], count: int) -> torch.Tensor:
        """(count, B, C, H, W), a function of the config's seed, the key and the prompt alone."""
        shape = (count, *self.base.backbone.latent_shape)
        return torch.stack([noise_for(self.config.seed, "tune", key, index, shape=shape) for index in indices], dim=1)


def measure_contrast(images: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the luminance over the pixels: (B, 3, H, W) in [0, 1] -> (B,), float64."""
    weights = torch.tensor(LUMINANCE, dtype=torch.float64, device=images.device)
    return torch.einsum("bchw,c->bhw", images.double(), weights).flatten(1).std(dim=1, correction=0)


def _copy(parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Copies on the CPU, where they are in nobody's way."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
