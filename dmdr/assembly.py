"""Put a training stage together from its config: shared base, RL, state, then the run. Trainer and planner both do so.

The teacher is loaded by the caller: with its weights to train, on the meta device to plan.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from dmdr import distributed
from dmdr.agreement import Probe, quantize_checked
from dmdr.backbones.protocol import Backbone, Conditioning, Item
from dmdr.config.guidance import take_middle
from dmdr.config.rl import AnyRL
from dmdr.config.run import Config
from dmdr.config.stages import StageName
from dmdr.config.training import Joint, Training
from dmdr.config.watch import Watch
from dmdr.draws import Run
from dmdr.errors import ConfigError
from dmdr.kernels.attention import prepare_attention
from dmdr.kernels.compiled_blocks import check_compiler
from dmdr.kernels.frozen_base import check_frozen_base, quantize
from dmdr.metrics.verifier import load_any_reward
from dmdr.noise import RowNoise
from dmdr.promptset.prompts import Prompts
from dmdr.rewards.sources import RewardSources, list_sources
from dmdr.rl.algorithms import build_algorithm
from dmdr.rl.objective import RLTerm
from dmdr.rollout import sample_teacher
from dmdr.shared_base import DTYPES, FAKE, STUDENT, SharedBase, select_lora_targets
from dmdr.state import NOTHING, TrainState, fill_parameters
from dmdr.teacher.start_files import find_start
from dmdr.watch.watcher import Watcher

PROBED = 8  # samples on which a frozen base in fewer bits is compared with what it was
STUDENT_FILE, EMA_FILE, FAKE_FILE = "student.safetensors", "student_ema.safetensors", "fake_score.safetensors"
KEPT = "kept"  # the folder of the students of the best looks


def name_kept(update: int) -> str:
    """The file of the student that the watch kept before an update."""
    return f"{KEPT}/update-{update:08d}.safetensors"


@dataclass(frozen=True)
class StageConfig:
    """The settings of one training stage. A cold start always matches distributions."""

    name: StageName
    training: Training
    rl: AnyRL | None = None
    distribution_matching: bool = True
    watch: Watch | None = None
    fake_warmup: int = 0


@dataclass(frozen=True)
class Assembly:
    """The networks of a training stage, and what changes while it trains.

    agreement: cosine between the gradients of distribution matching before and after the frozen base got fewer bits.
    """

    base: SharedBase
    rl: RLTerm | None
    state: TrainState
    agreement: float | None = None


def select_stage(config: Config, stage: StageName) -> StageConfig:
    """The settings of `cold_start` or `joint`."""
    training: Training | None = config.joint if stage == "joint" else config.cold_start
    assert training is not None, "a run without a cold start has no such stage"
    if isinstance(training, Joint):
        return StageConfig(
            stage, training, training.rl, training.distribution_matching, training.watch, training.fake_warmup
        )
    return StageConfig(stage, training, training.rl, watch=training.watch)


def is_sharded(config: Config) -> bool:
    """Whether the ranks hold rows of the weights instead of all of them."""
    return config.execution.sharding != "none" and distributed.ranks() > 1


def find_group(config: Config) -> int | None:
    """How many ranks share the rows of the weights: those of a machine (HSDP); None: all.

    Raises:
        ConfigError: there is one machine.
    """
    if config.execution.sharding != "hsdp":
        return None
    if distributed.ranks() == config.execution.processes:
        raise ConfigError(
            "execution.sharding is hsdp, which splits the weights within each of several machines, but this stage runs "
            "on one; set fsdp"
        )
    return config.execution.processes


def assemble(
    config: Config,
    stage: StageConfig,
    backbone: Backbone,
    *,
    before: Path | None = None,
    device: str | None = None,
    rewards: RewardSources | None = None,
    probe: Probe | None = None,
) -> Assembly:
    """Build the shared base, the RL algorithm and the state of a training stage.

    Args:
        before: the output of the stage whose student goes on here. None begins at the config's student.start, or at the
            teacher. On meta, where weights have no values, neither changes anything.
        device: where the ranks' shards go; needed only where the weights are sharded. There the first rank's networks
            count, and the others' may lie on meta.
        rewards: where they lie; None: where the config says, and nobody hears of one that is waited for.
        probe: on what a frozen base in fewer bits is compared with what it was; None: it is not.

    Raises:
        ConfigError: a reward is unknown or broken, the frozen base in fewer bits leads elsewhere, or sharding is hsdp
            on one machine.
        RewardUnavailable: the service of a reward does not answer.
        DataError, InputMissing: the start is of another model; weights of a reward are damaged or missing.
    """
    base = build_base(config, backbone)
    has_values = backbone.network.device.type != "meta"
    group = find_group(config) if has_values or is_sharded(config) else None
    start = config.student.start
    if before is not None and has_values:
        student = base.from_diffusers(STUDENT, load_file(before / EMA_FILE))
        fill_parameters(base.student_parameters, student, f"student of {before.name}")
        fake_score = base.from_diffusers(FAKE, load_file(before / FAKE_FILE))
        fill_parameters(base.fake_parameters, fake_score, f"fake score of {before.name}")
    elif start is not None and has_values:
        base.begin_at(find_start(start, config.student.form), scale=start.scale)
    if stage.rl is not None and stage.rl.needs_reference():
        with on_meta_if(backbone):
            base.keep_reference()  # before a checkpoint moves the student on
    agreement = None
    if config.frozen_base is not None:
        if probe is None:
            quantize(backbone.network, config.frozen_base)
        else:
            agreement = quantize_checked(base, config.frozen_base, probe)
    if is_sharded(config):
        assert device is not None, "shards need a device"
        base.split(device, group=group)
    rl, beside = None, NOTHING
    if stage.rl is not None:
        algorithm = build_algorithm(stage.rl, base, rewards or list_sources(config), seed=config.seed)
        rl, beside = RLTerm(algorithm, stage.rl), algorithm.trained
    state = TrainState(base, stage.training, ema=config.student.ema, beside=beside)
    return Assembly(base, rl, state, agreement)


def build_probe(
    config: Config, stage: StageConfig, backbone: Backbone, prompts: Prompts, empty_prompt: Item
) -> Probe | None:
    """On what a frozen base in fewer bits is compared with what it was: a few training prompts; None: it is as it was.

    empty_prompt: the conditioning of the empty prompt.
    """
    if config.frozen_base is None:
        return None
    count = min(PROBED, len(prompts), config.execution.micro_batch_size or PROBED)
    return Probe(
        c=backbone.collate(prompts.items(list(range(count)))),
        unconditional=backbone.collate([empty_prompt]),
        time=float(backbone.student_times(config.student.few_steps)[0]),
        guidance_scale=take_middle(config.teacher.guidance_scale),
        seed=config.seed,
        training=stage.training,
    )


def build_base(config: Config, backbone: Backbone) -> SharedBase:
    """The shared base of a config, its activations recomputed where the config says so.

    Raises:
        ConfigError: the teacher has no such unconditional row, no CFG to decouple, or lacks a module of a LoRA.
    """
    backbone.check_unconditional(config.teacher.unconditional)
    check_decoupled(config, backbone)
    check_compiled(config, backbone)
    with on_meta_if(backbone):
        base = SharedBase(
            backbone,
            fake_rank=config.fake_score.lora_rank,
            fake_scale=config.fake_score.scale,
            student_rank=config.student.lora_rank,
            seed=config.seed,
            compute=DTYPES[config.precision],
            lora=config.lora_forms,
        )
    backbone.attention, backbone.decoded_at_once = config.execution.attention, config.execution.decode_batch_size
    base.recompute_activations(config.execution.gradient_checkpointing)
    return base


def check_lora_targets(config: Config, backbone: Backbone) -> None:
    """Check that the teacher, without adapters yet, has all modules that the LoRAs of a config adapt.

    Raises:
        ConfigError: it does not have one of them.
    """
    select_lora_targets(backbone, config.lora_forms)


def check_decoupled(config: Config, backbone: Backbone) -> None:
    """Raises ConfigError if a training stage decouples the CFG of a teacher that has none."""
    for stage in config.training_stages:
        if (decoupled := config.training_of(stage).decoupled) is not None and backbone.guidance_is_input:
            raise ConfigError(
                f"{stage}.decoupled is {decoupled}, but this teacher's network takes the guidance scale as an input "
                "and has no CFG to take apart; drop it"
            )


def check_compiled(config: Config, backbone: Backbone) -> None:
    """Raises ConfigError if a config compiles blocks that see another number of tokens in each batch."""
    if config.execution.compile and not backbone.fixed_tokens:
        raise ConfigError(
            f"execution.compile compiles for one number of tokens, and a {backbone.family} sees as many as the longest "
            "prompt of a batch has; set execution.compile: false"
        )


def prepare_kernels(config: Config, device: str) -> None:
    """Check that what `execution` asks of a device is there, and computes what it should.

    Raises:
        ConfigError: a compiler or an attention kernel is not there, the kernel is wrong on this device, or it cannot
            compute with a frozen base in fewer bits.
    """
    check_frozen_base(config.frozen_base, device)
    if config.execution.compile:
        check_compiler(device)
    prepare_attention(config.execution.attention, device, DTYPES[config.precision])


def on_meta_if(backbone: Backbone) -> AbstractContextManager[object]:
    """Build new tensors on the meta device where the teacher lies there. Elsewhere adapters begin on the CPU, whose
    random numbers are the same on every machine."""
    return torch.device("meta") if backbone.network.device.type == "meta" else nullcontext()


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
