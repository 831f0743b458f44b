"""The sealed prompts of a run as its later stages read them: what is needed, when it is needed, in any layout."""

from __future__ import annotations

import torch

from dmdr.backbones.protocol import Backbone
from dmdr.promptset import PromptSet, Split
from dmdr.promptset.ahead import Ahead
from dmdr.promptset.on_the_fly import OnTheFly
from dmdr.promptset.prompts import Prompts
from dmdr.teacher.half_storage import store_in_half
from dmdr.teacher.load import find_teacher_of, load_teacher
from stages.runtime.context import Context
from stages.runtime.device import pick_device
from stages.store.artifacts import Artifact
from stages.store.records import Record
from stages.store.sealed_files import SealedFiles

GIB = 2**30


class PromptInputs:
    """The prompts that the first stage sealed.

    Raises:
        InputMissing: they are not sealed.
    """

    def __init__(self, context: Context) -> None:
        self._context, own = context, context.artifact
        limit = context.config.execution.prompt_cache * GIB
        artifact = Artifact(own.store, own.run, "prompts")
        self.files = SealedFiles(artifact, context.cache / "prompts", limit)
        size = self.files.count_bytes()
        if not self.files.is_local and self.open_split("train").layout == "joined" and size > limit:
            context.progress.say(
                f"the prompts take {size / GIB:,.0f} GiB, and execution.prompt_cache keeps {limit / GIB:,.0f} of them: "
                "shards will be fetched again and again; raise it"
            )

    def open_split(self, split: Split) -> PromptSet:
        """One split; its items can be read unless its layout is text.

        Raises:
            DataError: a file is damaged.
        """
        return PromptSet(self.files, split, sizes=_list_sizes(self.files.record, split))

    def load_teacher(self, device: str, *, weights: bool = True) -> Backbone:
        """The teacher's networks on a device; with its text encoders if the prompts have to be encoded on the fly.

        weights: False leaves the network on meta, and the decoder on the CPU.

        Raises:
            DataError: as `dmdr.teacher.load.load_teacher`.
        """
        config = self._context.config
        source, resolution = find_teacher_of(config.teacher), config.teacher.resolution
        if self.open_split("train").layout != "text":
            return load_teacher(source, device, text=False, resolution=resolution, weights=weights)
        backbone = load_teacher(source, resolution=resolution, weights=weights)
        text_device = "cpu" if config.execution.text_encoders == "cpu" else pick_device(config)
        for name, part in backbone.pipe.components.items():
            if isinstance(part, torch.nn.Module) and (weights or part is not backbone.network):
                is_text = name.startswith("text_encoder")
                if is_text:
                    store_in_half(part.requires_grad_(False))
                part.to(text_device if is_text else device)
        return backbone

    def open_encoded(self, split: Split, backbone: Backbone) -> Prompts:
        """One split whose items can be read: they are stored, or `backbone` from `load_teacher` encodes them.

        An Ahead, where getting them takes time that another device could use.
        """
        prompts = self.open_split(split)
        if prompts.layout == "text":
            encoded = OnTheFly(prompts, backbone, self._find_dtype())
            return Ahead(encoded) if self._context.config.execution.text_encoders == "cpu" else encoded
        reads_beside = pick_device(self._context.config) == "cuda" or not self.files.is_local
        return Ahead(prompts) if reads_beside else prompts

    def _find_dtype(self) -> torch.dtype:
        """The dtype of all items: that of the empty prompt's."""
        return next(each.dtype for each in PromptSet.unconditional(self.files).values() if each.is_floating_point())


def _list_sizes(record: Record, split: Split) -> list[int] | None:
    """The number of prompts in each shard of a split; None if the record does not tell."""
    count, size = record.facts.get(split), record.identity.get("prompts.shard_size")
    if not isinstance(count, int) or not isinstance(size, int):
        return None
    whole, rest = divmod(count, size)
    return [size] * whole + ([rest] if rest else [])
