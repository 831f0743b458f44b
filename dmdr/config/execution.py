"""How and where a run is executed, and what is shown of it. No torch."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from dmdr.config.cluster import Cluster
from dmdr.config.live import Live
from dmdr.config.notify import Notify
from dmdr.config.price import Price
from dmdr.config.section import Positive, Rate, Section

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
AttentionKernel = Literal["auto", "flash", "cudnn", "fa3"]
Recomputation = Literal["none", "attention", "blocks", "all"]


def _read_old_recomputation(value: object) -> object:
    """true and false, as configs had it before there were parts to choose."""
    return {True: "all", False: "none"}[value] if isinstance(value, bool) else value


OldRecomputation = Annotated[
    Recomputation,
    BeforeValidator(_read_old_recomputation),
    WithJsonSchema({"anyOf": [{"type": "string", "enum": [*get_args(Recomputation)]}, {"type": "boolean"}]}),
]


class Execution(Section):
    """How and where a run is executed. These settings do not change the result.

    One exception: several processes, or a batch in parts, add floating-point numbers in another order.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    signing_key: str | None = (
        None  # a file with a private key (PEM) that signs the export: dmdr pull --verify checks it
    )
    processes: Positive = 1  # for training and evaluation on this machine, one on each GPU; they split the work
    # largest number of samples in one pass of a network; gradients of the parts are added. None: the whole batch
    micro_batch_size: Positive | None = None
    # none: each process holds all weights. fsdp: each holds some rows of them, which saves memory and costs messages.
    # hsdp: each machine holds all weights, its processes some rows, so that no weights cross between machines
    sharding: Literal["none", "fsdp", "hsdp"] = "none"
    # largest number of samples in one pass that keeps nothing for a backward pass, in a rollout. None: micro_batch_size
    rollout_batch_size: Positive | None = None
    # largest number of images that ReFL decodes and scores at once, each with its gradient. None: as many as a part has
    decode_batch_size: Positive | None = None
    # what the backward pass computes again, for less memory and more time. all: the blocks of networks and decoder;
    # blocks: of networks only; attention: these without what attention returned. true is all, false none
    gradient_checkpointing: OldRecomputation = "none"
    # compile the networks' blocks: the same numbers to the rounding, faster after the first update, which takes
    # minutes more. Needs a compiler
    compile: bool = False
    # the kernel of attention in the networks. auto: torch's choice. cudnn, fa3 (FlashAttention 3): faster on new GPUs
    attention: AttentionKernel = "auto"
    # GiB of this machine's disk that each process may fill with encoded prompts of a remote store
    prompt_cache: Positive = 32
    # where the text encoders lie that encode prompts on the fly. device: beside the networks. cpu: it encodes the
    # prompts of the next update while the GPU works on this one
    text_encoders: Literal["device", "cpu"] = "device"
    checkpoint_every: Positive = 50  # student updates
    keep_checkpoints: int = Field(2, ge=2)  # at least 2, because the newest may be damaged
    # seconds without progress of a process, then the stage ends with exit code 70 and shows the stacks of all. Loading,
    # drawing and saving are progress; below 180, a store that is slow to answer is none
    watchdog: int = Field(600, ge=5, le=86400)
    live: Live | None = Live()  # what an open training stage shows while it runs; null: nothing
    # get curves, strips and settings of the training stages; each needs its package: pip install 'dmdr[tensorboard]'
    trackers: tuple[TrackerName, ...] = Field((), strict=False)
    # folder of what trackers write without a server: event files, offline runs, a database
    tracker_folder: str = Field("trackers", min_length=1)
    price: Price | None = None  # of devices; null: money is not counted
    # the most that the run may cost, in the currency of `price`. A training stage that reaches it writes a checkpoint
    # and ends with exit code 64; no further stage begins
    budget: Rate | None = None
    notify: tuple[Notify, ...] = Field((), strict=False)  # who hears of alarms, of the end of a run, and of trouble
    cluster: Cluster | None = None  # run the stages as Kubernetes Jobs; None: as processes on this machine

    @model_validator(mode="after")
    def _check_compile(self) -> Execution:
        if self.compile and self.gradient_checkpointing == "attention":
            raise ValueError(
                "execution.compile joins operators, and gradient_checkpointing: attention chooses single ones; set "
                "execution.gradient_checkpointing: none, blocks or all"
            )
        return self

    @model_validator(mode="after")
    def _check_trackers(self) -> Execution:
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"execution.trackers names one twice: {', '.join(self.trackers)}; name it once")
        if self.trackers and self.live is None:
            raise ValueError("execution.trackers is set but execution.live is null, which shows nothing; drop one")
        return self

    @model_validator(mode="after")
    def _check_budget(self) -> Execution:
        if self.budget is not None and self.price is None:
            raise ValueError(
                "execution.budget is set but execution.price is missing, so nobody knows what the run costs; "
                "set price: {hour: {H100: 2.49}}, for example"
            )
        return self
