"""What a device or a teacher cannot do, found before a training stage is put together."""

from __future__ import annotations

from dmdr.backbones.protocol import Backbone
from dmdr.config.rl import Weighting
from dmdr.config.run import Config
from dmdr.errors import ConfigError
from dmdr.kernels.attention import prepare_attention
from dmdr.kernels.compiled_blocks import check_compiler
from dmdr.kernels.frozen_base import check_frozen_base
from dmdr.shared_base import DTYPES, select_lora_targets


def check_lora_targets(config: Config, backbone: Backbone) -> None:
    """Check that the teacher, without adapters yet, has all modules that the LoRAs of a config adapt.

    Raises:
        ConfigError: it does not have one of them.
    """
    select_lora_targets(backbone, config.lora_forms)


def check_guidance(config: Config, backbone: Backbone) -> None:
    """Raises ConfigError if a training stage decouples or weighs the CFG of a teacher that has none."""
    for stage in config.training_stages:
        rl = config.training_of(stage).rl
        if isinstance(rl, Weighting) and rl.part == "guidance" and backbone.guidance_is_input:
            raise ConfigError(
                f"{stage}.rl.part is guidance, but this teacher's network takes the guidance scale as an input and has "
                "no CFG to weigh; set part: all"
            )
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
