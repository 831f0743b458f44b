"""Counts what the CPU of one rank does for an update, in bytes: noise drawn, prompts read, numbers of other ranks.

Each rank draws, reads and keeps for its own samples only. So with as many samples on each GPU, any number of GPUs costs
each of them the same, but for the scores of RL, a few bytes an image, which all ranks hear of all images.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmdr.assembly.stage_config import StageConfig, select_stage
from dmdr.backbones.protocol import Backbone
from dmdr.config.batches import count_rl
from dmdr.config.deal import share_evenly
from dmdr.config.rl import AnyRL, EvolutionStrategies, Policy, Surrogate, Weighting
from dmdr.config.run import Config
from dmdr.config.shares import Share, deal_states, deal_to_rl, find_share
from dmdr.config.stages import StageName
from dmdr.config.training import Training
from dmdr.promptset.encode import DTYPES, count_numbers

FLOAT = 4  # bytes


@dataclass(frozen=True)
class HostWork:
    """Bytes of one update on the rank that has most of them.

    noise: drawn, and copied to its GPU. prompts: conditioning that is read or encoded, collated, and copied to the GPU.
    scores: that it gets from all ranks. samples: of a batch on a rank.
    """

    ranks: int
    samples: int
    noise: int
    prompts: int
    scores: int

    @property
    def total(self) -> int:
        return self.noise + self.prompts + self.scores


def count_host_work(config: Config, stage: StageName, backbone: Backbone, *, ranks: int) -> HostWork:
    """The host's work of a training stage on `ranks` GPUs, each with as many samples as the config gives to one.

    backbone: the teacher, on meta or not (`planning.meta.build_meta_backbone`).
    """
    scaled = scale_stage(select_stage(config, stage), ranks, config.count_ranks(stage))
    steps, training, rl = config.student.steps, scaled.training, scaled.rl
    channels, height, width = backbone.latent_shape
    latent = channels * height * width * FLOAT
    conditioning = count_numbers(backbone.blank()) * DTYPES[config.prompts.dtype].itemsize
    shares = [
        find_share(training, rl, steps, matches=scaled.distribution_matching, ranks=ranks, rank=rank)
        for rank in range(ranks)
    ]
    mine = [_count_latents(scaled, share, steps, (ranks, rank)) for rank, share in enumerate(shares)]
    group = count_rl(rl, steps).group
    read = [len(share.matching.all) + len(share.own.numbers) // group for share in shares]
    return HostWork(
        ranks=ranks,
        samples=-(-training.batch_size // ranks),
        noise=max(mine) * latent + _count_beside(rl, (channels, height, width), ranks),
        prompts=max(read) * conditioning,
        scores=_count_scored(scaled, steps) * len(rl.rewards if rl else ()) * FLOAT,
    )


def scale_stage(stage: StageConfig, ranks: int, own: int) -> StageConfig:
    """The same stage for another number of ranks, with as many samples on each as on each of its `own` ranks."""

    def scale(count: int) -> int:
        return -(-count // own) * ranks

    changes: dict[str, object] = {"batch_size": scale(stage.training.batch_size)}
    rl: AnyRL | None = stage.rl
    if isinstance(rl, Policy):
        groups = {"batch": scale(rl.batch // rl.group_size) * rl.group_size}
        rl = rl.model_copy(update={"states": scale(rl.states)} if rl.branches else groups)
    elif isinstance(rl, Surrogate):
        rl = rl.model_copy(update={"samples": scale(rl.samples)})
    elif isinstance(rl, EvolutionStrategies):
        rl = rl.model_copy(update={"states": scale(rl.states)})
    training: Training = stage.training.model_copy(update={**changes, "rl": rl})
    return StageConfig(stage.name, training, rl, stage.distribution_matching, stage.watch, stage.fake_warmup)


def _count_latents(stage: StageConfig, share: Share, steps: int, at: tuple[int, int]) -> int:
    """The latents of noise that a rank draws for an update: of rollouts, renoising and branches. at: ranks, rank."""
    training, deal, asked = stage.training, deal_states(stage.training, stage.rl, steps), count_rl(stage.rl, steps)
    rolled_out = steps * (len(share.matching.all) + len(share.own.numbers))
    branching = len(share_evenly(asked.states, *at)) * (asked.branches + steps) if asked.branches else 0
    if not stage.distribution_matching:
        return rolled_out + branching
    mine, inner = share_evenly(deal.states, *at), asked.inner_updates
    fake = sum(len(deal.list_rows(mine, batch)) for batch in range(training.fake_updates - 1))
    student = max(len(deal.list_rows(mine, batch)) for batch in range(deal.batches)) * inner
    return rolled_out + branching + fake + student * (1 if training.decoupled is None else 2)


def _count_beside(rl: AnyRL | None, shape: tuple[int, int, int], ranks: int) -> int:
    """The bytes of noise that evolution strategies draw on a rank, one number for each cell of each channel."""
    if not isinstance(rl, EvolutionStrategies):
        return 0
    channels, height, width = shape
    side = rl.find_cell(height)
    return len(share_evenly(rl.states, ranks, 0)) * rl.pairs * channels * -(-height // side) * -(-width // side) * FLOAT


def _count_scored(stage: StageConfig, steps: int) -> int:
    """The images whose scores every rank gets."""
    asked = count_rl(stage.rl, steps)
    if asked.branches:
        return asked.states * asked.branches
    if isinstance(stage.rl, EvolutionStrategies):
        return stage.rl.images
    if isinstance(stage.rl, Weighting):
        return stage.training.batch_size
    dealt = deal_to_rl(stage.rl, steps, deal_states(stage.training, stage.rl, steps).trajectories)
    return asked.trajectories or (dealt.states if dealt else 0)
