"""Put a training stage together from its config: shared base, RL and state. Trainer and planner both do so.

The teacher is loaded by the caller: with its weights to train, on the meta device to plan.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from dmdr import distributed
from dmdr.assembly.agreement import Probe, quantize_checked
from dmdr.assembly.checks import check_compiled, check_guidance
from dmdr.assembly.stage_config import EMA_FILE, FAKE_FILE, StageConfig
from dmdr.backbones.protocol import Backbone
from dmdr.config.run import Config
from dmdr.errors import ConfigError
from dmdr.kernels.frozen_base import quantize
from dmdr.rewards.sources import RewardSources, list_sources
from dmdr.rl.algorithms import build_algorithm
from dmdr.rl.objective import RLTerm
from dmdr.shared_base import DTYPES, FAKE, STUDENT, SharedBase
from dmdr.state import NOTHING, TrainState, fill_parameters
from dmdr.teacher.start_files import find_start


@dataclass(frozen=True)
class Assembly:
    """The networks of a training stage, and what changes while it trains.

    agreement: cosine between the gradients of distribution matching before and after the frozen base got fewer bits.
    """

    base: SharedBase
    rl: RLTerm | None
    state: TrainState
    agreement: float | None = None


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


def build_base(config: Config, backbone: Backbone) -> SharedBase:
    """The shared base of a config, its activations recomputed where the config says so.

    Raises:
        ConfigError: the teacher has no such unconditional row, no CFG to decouple, or lacks a module of a LoRA.
    """
    backbone.check_unconditional(config.teacher.unconditional)
    check_guidance(config, backbone)
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


def on_meta_if(backbone: Backbone) -> AbstractContextManager[object]:
    """Build new tensors on the meta device where the teacher lies there. Elsewhere adapters begin on the CPU, whose
    random numbers are the same on every machine."""
    return torch.device("meta") if backbone.network.device.type == "meta" else nullcontext()
