"""The config of a run: its sections, and the combinations of settings that are refused. No torch."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dmdr.config.cluster import Cluster
from dmdr.config.forms import Form
from dmdr.config.reward_weights import OF, OF_JUDGE, OF_REWARD
from dmdr.config.section import Address, Positive, Rate, Section
from dmdr.config.stages import MODELS, ModelName, StageName

NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"  # of a run; it becomes part of paths and of Kubernetes labels


class Teacher(Section):
    """The frozen multi-step model, and how evaluation samples it."""

    # a diffusers folder, hub:OWNER/NAME@COMMIT, a teacher of the lab such as lab:flow, or a .safetensors file in the
    # layout that SDXL and SD3 were published in
    path: Address
    # for a .safetensors file: a folder or hub:OWNER/NAME@COMMIT with its configuration, tokenizers and missing parts
    parts: Address | None = None
    # classifier-free guidance in the real score and in evaluation; 1 turns it off
    guidance_scale: float = Field(ge=1.0)
    steps: Positive = 25  # sampling steps in evaluation ("DMDR, Table 1")
    # width and height of the images in pixels; None: the default of the model family
    resolution: Positive | None = None


class Prompts(Section):
    """Where prompts come from.

    A source is a .txt, .jsonl, .csv, .tsv or .parquet file, a public set by its name, such as set:geneval, or a list of
    the lab: lab:train, lab:held-out, fashion:train or fashion:held-out.
    """

    sources: tuple[Address, ...] = Field(min_length=1, strict=False)
    # the column or key that holds the prompt, in jsonl, csv, tsv and parquet files
    column: str = Field("prompt", min_length=1)
    evaluation: Address | None = None  # a source of evaluation prompts; None: a share of `sources` is held out
    evaluation_share: float = Field(0.1, gt=0, lt=1)  # the share that is held out; a hash of the prompt selects it
    folder: Address | None = None  # holds the files of the public sets, under their own names; None: download them
    shard_size: Positive = 1024  # prompts in a shard

    @model_validator(mode="after")
    def _check_folder(self) -> Prompts:
        public_sets = [source for source in (*self.sources, self.evaluation or "") if source.startswith("set:")]
        if self.folder is not None and not public_sets:
            raise ValueError("prompts.folder is set but only sources named set:NAME are read from it; drop it")
        return self


class Student(Section):
    """The few-step model."""

    steps: Literal[1, 2, 4, 8]
    form: Literal["full", "lora"] = "full"
    lora_rank: Positive | None = None
    # highest decay of the averaged weights (EMA) that are exported; 0 exports the last weights
    ema: float = Field(0.99, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _check_rank(self) -> Student:
        if self.form == "full" and self.lora_rank is not None:
            raise ValueError("student.lora_rank is set but student.form is full; drop it, or set form: lora")
        if self.form == "lora" and self.lora_rank is None:
            raise ValueError("student.form is lora but student.lora_rank is missing; set one, for example 64")
        return self


class FakeScore(Section):
    """The LoRA on the shared base that learns the score of the student's distribution."""

    lora_rank: Positive = 32  # "official demo"
    scale: float = Field(2.0, gt=0)  # LoRA scale when the network acts as the fake score ("official demo")


class Dynamic(Section):
    """The schedules DynaDG and DynaRS (DMDR, 3.3). `updates: 0` turns both off."""

    updates: int = Field(0, ge=0)  # student updates until both schedules end
    real_scale: float = Field(0.75, ge=0)  # DynaDG: initial LoRA scale of the real score; 0 turns DynaDG off
    renoise: tuple[Rate, Rate] = Field((4.0, 1.5), strict=False)  # DynaRS: initial Beta(a, b); [1, 1] turns it off
    schedule: Literal["cosine", "constant"] = "cosine"  # constant keeps the initial values (Table 4, -Dynamic)


class Optimizer(Section):
    """AdamW for one of the two networks."""

    learning_rate: Rate
    # the rate falls linearly to this at the last update; None: the rate stays constant
    final_learning_rate: Rate | None = None
    # fused: one kernel updates all tensors. 8bit: bitsandbytes keeps the moments in 8 bits, a quarter of the memory.
    kind: Literal["adamw", "fused", "8bit"] = "adamw"
    betas: tuple[float, float] = Field((0.0, 0.99), strict=False)
    weight_decay: float = Field(0.01, ge=0)  # "official demo"
    clip: Rate = 1.0  # largest gradient norm ("official demo")


class Training(Section):
    """The settings that the cold start and joint training share."""

    updates: Positive  # student updates
    batch_size: Positive  # prompts in an update
    # fake score updates for each student update; the last of them shares the student update's images
    fake_updates: Positive = 5
    student: Optimizer
    fake_score: Optimizer
    dynamic: Dynamic = Dynamic()
    # lowest and highest renoise level t ("DMD2")
    renoise_range: tuple[float, float] = Field((0.02, 0.98), strict=False)

    @model_validator(mode="after")
    def _check_renoise_range(self) -> Training:
        low, high = self.renoise_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"renoise_range must be 0 <= low < high <= 1, got {low}, {high}")
        return self


class RL(Section):
    """The settings that the three RL algorithms share."""

    weight: float = Field(gt=0)  # of the RL loss; the weight of the distribution matching loss is 1
    # matched: multiply the weight by |gradient of distribution matching| / |gradient of RL| at the first joint update
    weight_is: Literal["fixed", "matched"] = "fixed"
    rewards: dict[str, float] = Field(min_length=1)  # reward -> its weight in the sum of rewards


class ReFL(RL):
    """Reward feedback learning: follow the gradient of the reward through the decoder."""

    algorithm: Literal["refl"]
    # Maximise the reward, or its logarithm. Use the logarithm for rewards that are probabilities, as those of the lab:
    # the gradient of a probability vanishes near 0 and near 1, that of its logarithm only near 1.
    map: Literal["linear", "log"] = "linear"
    pretraining: float = Field(0.0, ge=0)  # weight of the pretraining loss, for RL without distribution matching
    # The decoder that the gradient goes through. whole: the teacher's. tiled: the teacher's, tile by tile, which keeps
    # the activations of one tile in memory. tiny: an AutoencoderTiny such as TAESD.
    decoder: Literal["whole", "tiled", "tiny"] = "whole"
    tiny_decoder: Address | None = None  # for tiny: a folder, or hub:OWNER/NAME@COMMIT

    @model_validator(mode="after")
    def _check_tiny_decoder(self) -> ReFL:
        if self.decoder == "tiny" and self.tiny_decoder is None:
            raise ValueError(
                "joint.rl.decoder is tiny but joint.rl.tiny_decoder is missing; give a folder or hub:OWNER/NAME@COMMIT"
            )
        if self.decoder != "tiny" and self.tiny_decoder is not None:
            raise ValueError(
                f"joint.rl.tiny_decoder is set but joint.rl.decoder is {self.decoder}; drop it, or set decoder: tiny"
            )
        return self

    def needs_reference(self) -> bool:
        return self.pretraining > 0


class DPO(RL):
    """Direct preference optimization on the best and the worst of each group."""

    algorithm: Literal["dpo"]
    group_size: int = Field(8, ge=2)  # images of one prompt; the best and the worst become a pair
    # how close the student stays to the cold start; it multiplies log-likelihoods, which are means over the elements
    beta: Rate = 100.0

    def needs_reference(self) -> bool:
        return True


class GRPO(RL):
    """Group relative policy optimization. The actions of the policy are the renoising steps of the sampler."""

    algorithm: Literal["grpo"]
    group_size: int = Field(8, ge=2)  # images of one prompt; each is compared with their mean
    inner_updates: Positive = 1  # student updates on one rollout; clipping acts from the second on
    # largest change of the likelihood ratio, for inner_updates 2 or more; log-likelihoods are means over the elements
    clip_range: Rate = 1e-3
    kl: float = Field(0.0, ge=0)  # weight of the KL regulariser, for RL without distribution matching

    def needs_reference(self) -> bool:
        return self.kl > 0

    @model_validator(mode="after")
    def _check_clip_range(self) -> GRPO:
        if self.inner_updates == 1 and "clip_range" in self.model_fields_set:
            raise ValueError(
                "joint.rl.clip_range does nothing with inner_updates 1, because the ratio is always 1; drop it, or set "
                "inner_updates to 2 or more"
            )
        return self


AnyRL = ReFL | DPO | GRPO


class Watch(Section):
    """The hacking alarm: it evaluates the student during joint training, on training prompts and fixed noise."""

    every: Positive = 50  # student updates between evaluations; the first and the last student are always evaluated
    reward: str = Field(min_length=1)  # a held-out reward: one that joint.rl.rewards does not have
    prompts: Positive = 64  # how many training prompts, evenly spaced; all of them if there are fewer
    seeds: int = Field(2, ge=2)  # images of each prompt, between which diversity is measured
    # off: print nothing. stop: end the stage and seal the current result
    on_alarm: Literal["off", "warn", "stop"] = "warn"
    # last: the EMA weights at the end. best: of the EMA weights that were evaluated, those with the highest held-out
    # reward. Weights that produced an image that is not a number are never the best.
    export: Literal["last", "best"] = "last"
    reward_drop: Rate = 0.05  # alarm if the held-out reward falls by more than this below its best value
    diversity_drop: float = Field(0.3, gt=0, lt=1)  # alarm if diversity loses more than this share of its first value
    saturation_rise: Rate = 0.3  # alarm if colour saturation gains more than this share of its first value


class Joint(Training):
    """Distribution matching and RL at once.

    Without `rl` it is distillation only. Without distribution matching it is RL only (Table 5).
    """

    rl: Annotated[AnyRL, Field(discriminator="algorithm")] | None = None
    distribution_matching: bool = True
    watch: Watch | None = None

    @model_validator(mode="after")
    def _check_losses(self) -> Joint:
        if self.rl is None:
            if not self.distribution_matching:
                raise ValueError(
                    "joint.distribution_matching is false and joint.rl is missing: nothing would be trained; set one"
                )
            return self
        if self.rl.weight_is == "matched" and not self.distribution_matching:
            raise ValueError("joint.rl.weight_is matched needs distribution_matching; set it to fixed")
        if isinstance(self.rl, DPO) and self.batch_size % 2:
            raise ValueError(f"joint.batch_size is {self.batch_size}; DPO trains on pairs, so make it even")
        if self.watch and self.watch.reward in self.rl.rewards:
            raise ValueError(
                f"joint.watch.reward {self.watch.reward} is trained on; watch one that is not in joint.rl.rewards"
            )
        return self


JUDGES = ("lab-checker", "fashion-judge", *OF_JUDGE)  # metrics that are not rewards
MODEL = r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,39}$"  # the name of another model on the scorecard


class Pipeline(Section):
    """Another checkpoint for the scorecard. Its own diffusers pipeline samples it."""

    path: Address  # a diffusers folder, hub:OWNER/NAME@COMMIT, or lab:NAME
    steps: Positive
    guidance_scale: float = Field(1.0, ge=0.0)  # the argument of its pipeline


class Evaluate(Section):
    """The scorecard: models compared on held-out prompts. Student, teacher and naive teacher get the same noise."""

    metrics: tuple[str, ...] = Field(min_length=1, strict=False)  # names from JUDGES or names of rewards
    limit: Positive | None = None  # largest number of prompts; None: all
    batch_size: Positive = 64
    models: tuple[ModelName, ...] = Field(MODELS, min_length=1, strict=False)  # the models to compare
    seeds: Positive = 1  # images of each prompt; with 2 or more, diversity is reported
    pipelines: dict[Annotated[str, Field(pattern=MODEL)], Pipeline] = Field({})  # name on the scorecard -> checkpoint

    @model_validator(mode="after")
    def _check_lpips(self) -> Evaluate:
        if "lpips" in self.metrics and self.seeds == 1:
            raise ValueError(
                "evaluate.metrics has lpips, a distance between images of one prompt, but seeds is 1; set 4"
            )
        if self.metrics == ("lpips",):
            raise ValueError(
                "evaluate.metrics has only lpips, which measures diversity but not quality; add another metric"
            )
        return self

    @model_validator(mode="after")
    def _check_pipeline_names(self) -> Evaluate:
        if taken := sorted(set(self.pipelines).intersection(MODELS)):
            raise ValueError(
                f"evaluate.pipelines.{taken[0]} has the name of one of evaluate.models; choose another name"
            )
        return self

    @model_validator(mode="after")
    def _check_models(self) -> Evaluate:
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"evaluate.models names a model twice: {', '.join(self.models)}; name it once")
        return self


class Export(Section):
    """The forms in which the student is written. Each form but lora is at least as large as the network.

    pipeline: a diffusers folder, which evaluation samples. lora: only the LoRA of a LoRA student. weights: only the
    network, under diffusers' names. single-file: network, VAE and text encoders in one file, in the layout that SDXL
    and SD3 were published in; ComfyUI reads it.
    """

    # None: pipeline, and lora for a LoRA student
    forms: tuple[Form, ...] | None = Field(None, min_length=1, strict=False)

    @model_validator(mode="after")
    def _check_forms(self) -> Export:
        if self.forms and len(set(self.forms)) < len(self.forms):
            raise ValueError(f"export.forms names a form twice: {', '.join(self.forms)}; name it once")
        if self.forms and "single-file" in self.forms and "pipeline" not in self.forms:
            raise ValueError(
                "export.forms has single-file without pipeline, whose folder diffusers needs to load the file; add it"
            )
        return self


class Execution(Section):
    """How and where a run is executed. These settings do not change the result.

    One exception: several processes, or a batch in parts, add floating-point numbers in another order.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    processes: Positive = 1  # for training and evaluation on this machine, one on each GPU; they split the work
    # largest number of samples in one pass of a network; gradients of the parts are added. None: the whole batch
    micro_batch_size: Positive | None = None
    # none: each process holds all weights. fsdp: each holds some rows of them, which saves memory and costs messages.
    sharding: Literal["none", "fsdp"] = "none"
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, more time
    checkpoint_every: Positive = 50  # student updates
    keep_checkpoints: int = Field(2, ge=2)  # at least 2, because the newest may be damaged
    cluster: Cluster | None = None  # run the stages as Kubernetes Jobs; None: as processes on this machine


class Config(Section):
    """The config of a run."""

    run: str = Field(pattern=NAME)
    seed: int = Field(0, ge=0)
    teacher: Teacher
    prompts: Prompts
    student: Student
    fake_score: FakeScore = FakeScore()
    # of the networks in training. bfloat16: frozen weights are stored in it; trained weights stay float32 and are
    # rounded to it for each pass.
    precision: Literal["float32", "bfloat16"] = "float32"
    cold_start: Training
    joint: Joint
    evaluate: Evaluate
    # set of weights of a reward or judge -> a file, a folder or hub:OWNER/NAME@COMMIT[/FILE]
    weights: dict[str, Address] = Field({})
    export: Export = Export()
    execution: Execution = Execution()

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms in which the student is exported."""
        if self.export.forms is not None:
            return self.export.forms
        return ("pipeline", "lora") if self.student.form == "lora" else ("pipeline",)

    def rewards(self, stage: StageName) -> set[str]:
        """The rewards that a stage computes: joint trains on some and watches one, evaluate reports some."""
        if stage == "joint":
            return {
                *(self.joint.rl.rewards if self.joint.rl else ()),
                *({self.joint.watch.reward} if self.joint.watch else ()),
            }
        return set(self.evaluate.metrics).difference(JUDGES) if stage == "evaluate" else set()

    def metrics_with_weights(self, stage: StageName) -> set[str]:
        """The rewards of a stage, and its other metrics that read weights or questions."""
        judges = set(OF_JUDGE).intersection(self.evaluate.metrics) if stage == "evaluate" else set()
        return self.rewards(stage) | judges

    @model_validator(mode="after")
    def _check_rewards(self) -> Config:
        rewards = self.rewards("joint") | self.rewards("evaluate")
        for name in sorted(rewards.difference(OF_REWARD)):
            known = (*OF_REWARD, *JUDGES) if name in self.evaluate.metrics else (*OF_REWARD,)
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"DMDR has {', '.join(known)}"
            raise ValueError(f"unknown reward {name}; {hint}")
        used = {weights for name in rewards | self.metrics_with_weights("evaluate") for weights in OF[name]}
        unused = sorted(set(self.weights) - used)
        if unused:
            raise ValueError(
                f"weights.{unused[0]} is set but the rewards and metrics of this config read "
                f"{', '.join(sorted(used)) or 'no weights'}; drop it"
            )
        return self

    @model_validator(mode="after")
    def _check_steps(self) -> Config:
        if self.student.steps == 1 and isinstance(self.joint.rl, DPO | GRPO):
            raise ValueError(
                f"joint.rl.algorithm {self.joint.rl.algorithm} learns from the renoising steps and student.steps 1 has "
                "none; set algorithm: refl, or student.steps to 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _check_export(self) -> Config:
        if "lora" in self.forms and self.student.form == "full":
            raise ValueError("export.forms has lora but student.form is full; take lora out, or set form: lora")
        if "pipeline" not in self.forms and "student" in self.evaluate.models:
            raise ValueError(
                "export.forms lacks pipeline, which evaluate samples the student from; add it, or take student out of "
                "evaluate.models"
            )
        return self

    @model_validator(mode="after")
    def _check_parts(self) -> Config:
        is_file = self.teacher.path.endswith(".safetensors")
        if is_file and self.teacher.parts is None:
            raise ValueError(
                f"teacher.path {self.teacher.path} is one file and teacher.parts is missing; name the diffusers folder "
                "or hub:OWNER/NAME@COMMIT with its configuration, its tokenizers and the parts that the file lacks"
            )
        if not is_file and self.teacher.parts is not None:
            raise ValueError("teacher.parts is set but teacher.path is not a .safetensors file; drop it")
        return self
