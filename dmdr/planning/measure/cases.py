"""What is measured: training stages of published networks with random weights, put together by their own code.

1. Weights are N(0, 0.02^2), those of norms 1 more. Zeros would be too fast: a GPU slows down by what its bits switch.
2. A stage runs parts of `micro` samples. One rollout, one part of the fake score and one of the student tell the whole
   update, as in a plan.
3. `tiny` networks have the same classes, and run on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dmdr.assembly.networks import Assembly, assemble
from dmdr.assembly.run import build_run
from dmdr.assembly.stage_config import select_stage
from dmdr.backbones.protocol import Backbone, Item
from dmdr.config.load import validate
from dmdr.config.run import Config
from dmdr.draws import Run, draw_guidance, draw_levels, roll_out_prompts, select_batches
from dmdr.dyna import real_scale
from dmdr.planning.architectures import ARCHITECTURES
from dmdr.planning.small_stage import BlankPrompts
from dmdr.teacher.load import build_backbone
from dmdr.train import weigh_objective
from dmdr.update import Batch, RealScore, WeightedLoss, update_fake_score, update_student

SHARE, STEPS, K = 8, 4, 5  # samples of a GPU, N and K of the shipped configs
TINY_VAE = {
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
TINY_SD3 = {
    "sample_size": 8,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 8,
}
TINY_SDXL = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 2),
    "norm_num_groups": 4,
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 40,
}
TINY: Mapping[str, Mapping[str, object]] = {"SD3-Medium": TINY_SD3, "SD3.5-Large": TINY_SD3, "SDXL": TINY_SDXL}
TINY_RESOLUTION = 16


@dataclass(frozen=True)
class Shape:
    """A network of ARCHITECTURES, the side of its images in pixels, samples of a part, and how it is trained."""

    network: str
    resolution: int
    micro: int
    recompute: bool
    precision: str = "bfloat16"
    tiny: bool = False

    @property
    def name(self) -> str:
        recompute = "recomputed" if self.recompute else "kept"
        return f"{self.network} {self.resolution} px, parts of {self.micro}, activations {recompute}, {self.precision}"

    def shrink(self) -> Shape:
        """The same in small."""
        return replace(self, resolution=TINY_RESOLUTION, micro=min(self.micro, 2), tiny=True)


def build_teacher(shape: Shape, device: str) -> Backbone:
    """A teacher with random weights in float32, without text encoders."""
    architecture = ARCHITECTURES[shape.network]
    if shape.tiny:
        config = {**architecture.config, **TINY[shape.network]}
        architecture = replace(architecture, config=config, vae={**architecture.vae, **TINY_VAE})
    pipe = architecture.build_pipeline()
    for part in ("unet" if "unet" in pipe.components else "transformer", "vae"):
        module: torch.nn.Module = getattr(pipe, part)
        fill_randomly(module.to_empty(device=device), on_cpu=shape.tiny)
    return build_backbone(pipe, shape.resolution)


@torch.no_grad()
def fill_randomly(module: torch.nn.Module, *, std: float = 0.02, on_cpu: bool) -> None:
    """Draw all weights and buffers. on_cpu: by the CPU, the same numbers on every device; else fast."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        seed = sum(map(ord, name))
        generator = torch.Generator("cpu" if on_cpu else tensor.device).manual_seed(seed)
        noise = torch.randn(tensor.shape, generator=generator, device=generator.device)
        is_norm = tensor.dim() == 1 and name.endswith("weight")
        tensor.copy_(noise.mul_(std).add_(float(is_norm)))


def build_config(shape: Shape, *, batch: int, published: bool = False) -> Config:
    """The config of a joint stage at a shape. published: with the rewards that DMDR trains on, which only a plan needs;
    else with towers of their size."""
    tower = Path(__file__).with_name("tower.py")
    own = {name: {"file": f"{tower}:{'SmallTower' if shape.tiny else 'Tower'}"} for name in ("first", "second")}
    rates = {
        name: {"learning_rate": 1e-6, "kind": "adamw" if shape.tiny else "fused"} for name in ("student", "fake_score")
    }
    names = ("dfn-clip", "hpsv2.1") if published else tuple(own)
    training = {"updates": 2, "batch_size": batch, "fake_updates": K, **rates}
    rl = {"algorithm": "refl", "weight": 1.0, "weight_is": "matched", "rewards": dict.fromkeys(names, 1.0)}
    mapping = {
        "run": "measure",
        "seed": 0,
        "teacher": {"path": f"hub:{ARCHITECTURES[shape.network].hub}@{'0' * 40}", "guidance_scale": 5.0, "steps": 25},
        "prompts": {"sources": ["prompts.txt"]},
        "precision": shape.precision,
        "student": {"steps": STEPS, "form": "lora", "lora_rank": 4 if shape.tiny else 64},
        "fake_score": {"lora_rank": 4 if shape.tiny else 32},
        "cold_start": training,
        "joint": {**training, "rl": rl},
        "evaluate": {"metrics": ["clip-score"]},
        "execution": {"micro_batch_size": shape.micro, "gradient_checkpointing": shape.recompute},
        **({} if published else {"rewards": own}),
    }
    mapping["teacher"]["resolution"] = shape.resolution  # type: ignore[index]  # all of its values are mappings or texts
    return validate(mapping, Config, "dmdr.planning.measure")


class Stage:
    """A joint stage with real tensors. batch: samples of an update; None: one part."""

    def __init__(self, shape: Shape, device: str, *, batch: int | None = None) -> None:
        self.shape, self.device = shape, device
        config = build_config(shape, batch=batch or shape.micro)
        stage = select_stage(config, "joint")
        backbone = build_teacher(shape, device)
        self.assembly: Assembly = assemble(config, stage, backbone)
        self.base, self.state = self.assembly.base, self.assembly.state
        for parameters in (self.base.fake_parameters, self.base.student_parameters):
            move_from_start(parameters)
        item = draw_item(backbone)
        prompts = BlankPrompts(item)
        self.run: Run = build_run(config, stage, self.assembly, prompts=prompts, empty_prompt=item)
        self.config = config

    def roll_out(self) -> None:
        self.window, _ = roll_out_prompts(self.run, 0)
        self.batches = select_batches(self.run, self.window)

    def update_fake_score(self) -> dict[str, torch.Tensor]:
        parts = self.batches.fake_score[0]
        return update_fake_score(
            self.base, parts, draw_levels(self.run, 0, 0, self.batches.rows[0]), self.state.fake_score
        )

    def update_student(self, *, rewarded: bool) -> dict[str, torch.Tensor]:
        parts: list[Batch] = self.batches.student[0]
        run, training, rl = self.run, self.run.training, None
        if rewarded:
            rl = self.weigh()
        score = RealScore(run.unconditional, draw_guidance(run, 0), real_scale(0, training.dynamic))
        levels = draw_levels(run, 0, K - 1, self.batches.rows[K - 1])
        state = self.state
        return update_student(
            self.base, parts, levels, score, student=state.student, fake_score=state.fake_score, rl=rl
        )

    def weigh(self) -> WeightedLoss:
        """ReFL's loss beside distribution matching."""
        assert self.run.rl is not None
        objective = self.run.rl.algorithm.build_objective(self.window)
        (weighted,) = weigh_objective(self.run.rl, objective, self.state)
        return weighted

    @property
    def parts_of_a_share(self) -> float:
        return SHARE / self.shape.micro

    def find_gradient(self) -> torch.Tensor:
        """The gradient of the fake score's LoRA after its update, flat and in float64."""
        parameters = self.base.fake_parameters.values()
        return torch.cat([each.grad.detach().flatten().double().cpu() for each in parameters if each.grad is not None])


def draw_item(backbone: Backbone) -> Item:
    """A prompt's conditioning, random in the shape of a typical one."""
    generator = torch.Generator().manual_seed(2)
    return {key: torch.randn(value.shape, generator=generator) for key, value in backbone.blank().items()}


@torch.no_grad()
def move_from_start(parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Give a LoRA, which begins at 0, numbers that are not."""
    for name, parameter in parameters.items():
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        if ".lora_B." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.numel()))
