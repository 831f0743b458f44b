"""Compile the blocks that a network repeats, each for itself, for the shapes that it meets (`execution.compile`).

1. Blocks of one kind share their compiled code. A kind is compiled for each adapter, each size of a part, and with and
   without a gradient: four variants in a training step (rollout, student, fake score, real score). The first block,
   whose input needs no gradient, and a last block of another form are kinds of their own.
2. Nothing that a schedule changes is compiled in: the scale of a LoRA is a tensor.
3. Shapes are compiled in. So parts of a batch should have one size, and a family whose blocks see as many tokens as the
   longest prompt has is refused.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec

import torch
from diffusers import ModelMixin

from dmdr.errors import ConfigError

MOST = 64  # variants of one kind of block's code; torch's own limit, 8, would run what comes after it uncompiled


def list_repeated_blocks(network: ModelMixin) -> list[torch.nn.Module]:
    """The blocks that a network repeats, by the names of diffusers. None contains another.

    FSDP2 gives a block a class of its own, below the one that it had.
    """
    names = network._repeated_blocks or network._no_split_modules or ()
    return [module for module in network.modules() if any(each.__name__ in names for each in type(module).__mro__)]


def compile_blocks(network: ModelMixin, *, backend: str = "inductor") -> None:
    """Compile a network's repeated blocks when they first run. Adapters are there already, shards dealt out.

    backend: torch.compile's.
    """
    torch._dynamo.config.recompile_limit = MOST
    for block in list_repeated_blocks(network):
        # the forward alone: hooks around it, such as those that gather a block's shards, run as they are
        block.forward = torch.compile(block.forward, dynamic=False, backend=backend)


def check_compiler(device: str) -> None:
    """Check that this machine can compile for a device.

    Raises:
        ConfigError: a compiler is missing.
    """
    missing = None
    if not any(shutil.which(name) for name in (("gcc", "clang") if device == "cuda" else ("g++", "clang++"))):
        missing = "a compiler, gcc or clang" if device == "cuda" else "a compiler, g++ or clang++"
    elif device == "cuda" and find_spec("triton") is None:
        missing = "triton"
    if missing is not None:
        raise ConfigError(
            f"execution.compile needs {missing}, which is not installed here; install it, or set execution.compile: "
            "false"
        )
