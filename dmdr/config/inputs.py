"""The settings of what a run begins with: its teacher and its prompts. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dmdr.config.guidance import Scale, take_middle
from dmdr.config.section import Address, Positive, Section
from dmdr.config.worlds import World


class Teacher(Section):
    """The frozen multi-step model, and how evaluation samples it."""

    # a diffusers folder, hub:OWNER/NAME@COMMIT, a teacher of the lab such as lab:flow, or a .safetensors file in the
    # layout that SDXL and SD3 were published in
    path: Address
    # for a .safetensors file: a folder or hub:OWNER/NAME@COMMIT with its configuration, tokenizers and missing parts
    parts: Address | None = None
    # classifier-free guidance in the real score and in evaluation; 1 turns it off. A range such as [6.5, 7.5]: the real
    # score draws one scale an update, and everything else takes the middle
    guidance_scale: Scale
    # the conditioning of the half without a prompt, in the real score and in evaluation. pipeline: what the teacher's
    # own pipeline takes, which are zeros for SDXL-Base. encoded: the empty text, encoded. zeros: zeros.
    unconditional: Literal["pipeline", "encoded", "zeros"] = "pipeline"
    steps: Positive = 25  # sampling steps in evaluation ("DMDR, Table 1")
    # width and height of the images in pixels; None: the default of the model family
    resolution: Positive | None = None
    # the world of the lab that this teacher draws, which the lab's rewards and judges ask for. None: a teacher of the
    # lab draws its own, and so does a folder that `dmdr lab build` wrote; any other teacher draws none.
    world: World | None = None

    @model_validator(mode="after")
    def _check_unconditional(self) -> Teacher:
        if self.unconditional != "pipeline" and self.guidance_scale == 1.0:
            raise ValueError(
                f"teacher.unconditional is {self.unconditional} but teacher.guidance_scale 1 runs no half without a "
                "prompt; drop it, or raise the scale"
            )
        return self

    @property
    def guidance(self) -> float:
        """The guidance scale of evaluation: the middle of a range."""
        return take_middle(self.guidance_scale)


class Prompts(Section):
    """Where prompts come from.

    A source is a .txt, .jsonl, .json, .csv, .tsv or .parquet file, which may be gzipped (.csv.gz), all such files of a
    folder or of a pattern such as data/*.parquet, a public set by its name, such as set:geneval, or a list of the lab:
    lab:train, lab:held-out, fashion:train or fashion:held-out.
    """

    sources: tuple[Address, ...] = Field(min_length=1, strict=False)
    # the column or key that holds the prompt, in jsonl, csv, tsv and parquet files
    column: str = Field("prompt", min_length=1)
    evaluation: Address | None = None  # a source of evaluation prompts; None: a share of `sources` is held out
    evaluation_share: float = Field(0.1, gt=0, lt=1)  # the share that is held out; a hash of the prompt selects it
    folder: Address | None = None  # holds the files of the public sets, under their own names; None: download them
    shard_size: Positive = 1024  # prompts in a shard
    # stage: the stage prompts encodes them once and stores the states; other stages read those that they need.
    # on_the_fly: it stores the texts, and the other stages load the text encoders and encode the prompts of each batch.
    # auto: stage, if the states take at most 32 GiB
    encode: Literal["auto", "stage", "on_the_fly"] = "auto"
    # of the states. bfloat16 halves them, and changes nothing for networks in training with precision: bfloat16
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _check_folder(self) -> Prompts:
        public_sets = [source for source in (*self.sources, self.evaluation or "") if source.startswith("set:")]
        if self.folder is not None and not public_sets:
            raise ValueError("prompts.folder is set but only sources named set:NAME are read from it; drop it")
        return self
