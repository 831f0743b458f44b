"""Give a network the weights of a start: the whole of them, or what its LoRA adds to the network's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dmdr.errors import doing
from dmdr.teacher.start_files import StartSource
from dmdr.teacher.start_headers import read_header
from dmdr.teacher.start_lora import read_lora
from dmdr.teacher.start_network import check_network, read_network

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin


@torch.no_grad()
def turn_into_start(
    network: ModelMixin, source: StartSource, pipeline: type[DiffusionPipeline], *, scale: float = 1.0
) -> None:
    """Turn a network with the teacher's weights into the start, in place, in the network's own precision.

    pipeline: the teacher's class. scale: at which a LoRA is fused.

    Raises:
        DataError: the start is of another model.
    """
    with doing(f"loading the start {source.address}"):
        header = read_header(source)
        if not header.is_lora:
            check_network(source, header, network)
            held = network.state_dict()
            network.load_state_dict({**held, **read_network(source, network)}, strict=True)
            return
        weights = network.state_dict()
        for name, module in read_lora(source, network, pipeline, scale=scale).items():
            weight = weights[f"{name}.weight"]
            weight += module.compute_delta(weight.shape).to(weight)
