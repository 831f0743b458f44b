"""What a student starts from, apart from its teacher. No torch."""

from __future__ import annotations

from pydantic import Field

from dmdr.config.section import Address, Section


class Start(Section):
    """What the student starts from: a model of the teacher's architecture, full weights or a LoRA of the teacher.

    A LoRA is fused into a full student. A LoRA student continues it, where it has the student's rank and targets.
    """

    # a diffusers folder, the folder of a network or of a LoRA, a form of another run's export as `dmdr pull` copies it,
    # a .safetensors file of the network or of a LoRA, or hub:OWNER/NAME@COMMIT, or hub:OWNER/NAME@COMMIT/FILE
    path: Address
    scale: float = Field(1.0, gt=0)  # at which a LoRA runs, beside the alpha that its file has; 1 for full weights
