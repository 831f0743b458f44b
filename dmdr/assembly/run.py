"""What stays the same through a training stage: prompts, times and its watch, beside its networks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dmdr.assembly.networks import Assembly
from dmdr.assembly.stage_config import StageConfig
from dmdr.backbones.protocol import Conditioning, Item
from dmdr.config.run import Config
from dmdr.draws import Run
from dmdr.metrics.verifier import load_any_reward
from dmdr.noise import RowNoise
from dmdr.promptset.prompts import Prompts
from dmdr.rewards.sources import RewardSources, list_sources
from dmdr.rollout import sample_teacher
from dmdr.shared_base import FAKE, SharedBase
from dmdr.watch.watcher import Watcher


def build_run(
    config: Config,
    stage: StageConfig,
    assembly: Assembly,
    *,
    prompts: Prompts,
    empty_prompt: Item,
    watch: Watcher | None = None,
) -> Run:
    """What stays the same through the stage. empty_prompt: the conditioning of the empty prompt."""
    backbone = assembly.base.backbone
    return Run(
        stage=stage.name,
        seed=config.seed,
        training=stage.training,
        base=assembly.base,
        prompts=prompts,
        unconditional=backbone.collate([empty_prompt]),
        times=backbone.student_times(config.student.few_steps).to(backbone.network.device),
        guidance_scale=config.teacher.guidance_scale,
        eta=config.student.eta,
        rl=assembly.rl,
        distribution_matching=stage.distribution_matching,
        watch=watch,
        micro_batch=config.execution.micro_batch_size,
        rollout_batch=config.execution.rollout_batch_size,
        fake_warmup=stage.fake_warmup,
        noise=RowNoise(backbone.network.device),
    )


def build_watcher(
    config: Config,
    stage: StageConfig,
    base: SharedBase,
    prompts: Prompts,
    *,
    empty_prompt: Item,
    say: Callable[[str], None],
    rewards: RewardSources | None = None,
) -> Watcher | None:
    """The watch of a stage that has one. say: takes an alarm's line. empty_prompt: as for `build_run`. rewards: as for
    `assemble`.

    Raises:
        ConfigError: no reward has that name.
        DataError, InputMissing: its weights are damaged or missing.
    """
    watch = stage.watch
    if watch is None:
        return None
    backbone = base.backbone
    device = backbone.network.device
    at_once = config.execution.micro_batch_size or stage.training.batch_size
    reward = None
    if watch.reward is not None:
        reward = load_any_reward(watch.reward, str(device), rewards or list_sources(config))
    teacher = TeacherSampler(config, base, backbone.collate([empty_prompt]))
    return Watcher(
        config=watch,
        base=base,
        reward=reward,
        prompts=prompts,
        times=backbone.student_times(config.student.few_steps).to(device),
        eta=config.student.few_steps.drawn_eta,
        seed=config.seed,
        at_once=max(1, at_once // watch.seeds),
        updates=stage.training.updates,
        say=say,
        stage=stage.name,
        rl=stage.rl,
        has_fake=stage.distribution_matching,
        draw_teacher=None if stage.name == "joint" else lambda c, noises: teacher.draw(c, noises[0]),
    )


class TeacherSampler:
    """Draws with the untouched teacher, as evaluation has it. unconditional: of the empty prompt, a batch of one."""

    def __init__(self, config: Config, base: SharedBase, unconditional: Conditioning) -> None:
        self.base, self.unconditional = base, unconditional
        self.guidance_scale = config.teacher.guidance
        self.times = base.backbone.teacher_times(config.teacher.steps).to(base.backbone.network.device)

    def draw(self, c: Conditioning, noise: torch.Tensor) -> torch.Tensor:
        """x0 (B, C, H, W) from noise of the same shape."""
        with self.base.use_adapter(FAKE, 0.0):
            return sample_teacher(
                self.base.backbone,
                c,
                self.unconditional,
                guidance_scale=self.guidance_scale,
                times=self.times,
                noise=noise,
            )
