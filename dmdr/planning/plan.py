"""Plans a training stage: runs its code on the meta device and counts the memory and the work that it needs.

1. The stage's own code runs with the shapes of its config. `dmdr.assembly` builds networks, LoRAs, rewards, decoder and
   optimizers, and then one training step runs. Every tensor counts from its creation until it is freed.
2. We do not count the CUDA context, workspaces of kernels, and memory that an allocator cannot use because no free
   piece has the right size. `dmdr.planning.gpus` leaves room for them.
3. What activations are computed again for is counted apart, so that one run tells the work with and without it.
"""

from __future__ import annotations

from collections.abc import Callable

from dmdr.assembly.stage_config import select_stage
from dmdr.config.run import Config
from dmdr.config.stages import StageName
from dmdr.planning.cost import CostCounter
from dmdr.planning.meta import Arithmetic
from dmdr.planning.shapes import KnownShapes
from dmdr.planning.small_stage import SmallStage
from dmdr.planning.small_step import SmallStep
from dmdr.planning.stage_plan import StagePlan
from dmdr.shared_base import DTYPES


def plan_stage(config: Config, name: StageName, *, say: Callable[[str], None] = lambda line: None) -> StagePlan:
    """Compute what a training stage needs on each of its GPUs.

    say: called with the name of the part that is being counted, to show progress.

    Raises:
        ConfigError, InputMissing, DataError: the teacher's configuration is not available.
    """
    cost = CostCounter("meta")
    with KnownShapes(cost):
        small = SmallStage(config, select_stage(config, name), cost, ranks=config.count_ranks(name))
        base = small.base
        exempt = [] if small.decodes_in_bfloat16 else small.list_decoder_parameters()
        with Arithmetic(DTYPES[config.precision], exempt, again=cost.count_again) as arithmetic:
            base.recompute_activations(config.execution.gradient_checkpointing, arithmetic.recompute)
            decoder = base.backbone.vae.decoder  # whose tiles the backward pass computes again
            decoder.forward = arithmetic.enclose(decoder.forward)  # type: ignore[method-assign]
            SmallStep(small, say).measure()
    small.account_for_ranks()
    return small.plan
