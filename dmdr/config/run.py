"""What a run is: its sections, immutable and strict, and the combinations that are impossible. No torch."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dmdr.config.cluster import Cluster
from dmdr.config.forms import Form
from dmdr.config.reward_weights import OF, OF_JUDGE, OF_REWARD
from dmdr.config.section import Address, Positive, Rate, Section
from dmdr.config.stages import MODELS, ModelName, StageName

NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"  # of a run, as it stands in paths and in Kubernetes labels


class Teacher(Section):
    """The frozen multi-step model and how it is sampled when it is the yardstick."""

    # a diffusers folder, hub:OWNER/NAME@COMMIT, a teacher that ships with the lab, as lab:flow, or a .safetensors file
    path: Address  # in the layout that SDXL and SD3 were published in
    parts: Address | None = None  # of such a file: a folder or hub: with its configuration and what else it lacks
    guidance_scale: float = Field(ge=1.0)  # classifier-free guidance, in the real score and in evaluation; 1 is off
    steps: Positive = 25  # of evaluation ("DMDR, Table 1")
    resolution: Positive | None = None  # of the images, in pixels a side; None: the family's own


class Prompts(Section):
    """Where prompts come from: .txt, .jsonl, .csv, .tsv or .parquet files, public sets by name, as set:geneval, or the
    lists of the lab's two worlds: lab:train, lab:held-out, fashion:train and fashion:held-out."""

    sources: tuple[Address, ...] = Field(min_length=1, strict=False)
    column: str = Field("prompt", min_length=1)  # of jsonl, csv, tsv and parquet
    evaluation: Address | None = None  # None: `evaluation_share` of the sources, chosen by hash, is held out
    evaluation_share: float = Field(0.1, gt=0, lt=1)
    folder: Address | None = None  # with the files of the public sets by their names; None: they are fetched
    shard_size: Positive = 1024  # prompts a shard

    @model_validator(mode="after")
    def _folder_is_read(self) -> Prompts:
        named = [each for each in (*self.sources, self.evaluation or "") if each.startswith("set:")]
        if self.folder is not None and not named:
            raise ValueError("prompts.folder is set but no source is a set:NAME, which alone are read there; drop it")
        return self


class Student(Section):
    """The few-step model."""

    steps: Literal[1, 2, 4, 8]
    form: Literal["full", "lora"] = "full"
    lora_rank: Positive | None = None
    ema: float = Field(0.99, ge=0.0, lt=1.0)  # highest decay of the exported average; 0 exports the last weights

    @model_validator(mode="after")
    def _rank_fits_form(self) -> Student:
        if self.form == "full" and self.lora_rank is not None:
            raise ValueError("student.lora_rank is set but student.form is full; drop it, or set form: lora")
        if self.form == "lora" and self.lora_rank is None:
            raise ValueError("student.form is lora but student.lora_rank is missing; set one, for example 64")
        return self


class FakeScore(Section):
    """The LoRA on the shared base that follows the student's distribution."""

    lora_rank: Positive = 32  # "official demo"
    scale: float = Field(2.0, gt=0)  # of the LoRA, when it is the fake score ("official demo")


class Dynamic(Section):
    """DynaDG and DynaRS (DMDR, 3.3). `updates: 0` turns both off; constant keeps their start (Table 4, -Dynamic)."""

    updates: int = Field(0, ge=0)  # student updates until both have reached their end
    real_scale: float = Field(0.75, ge=0)  # DynaDG: LoRA scale of the real score at the start; 0 turns DynaDG off
    renoise: tuple[Rate, Rate] = Field((4.0, 1.5), strict=False)  # DynaRS: Beta(a, b) at the start; [1, 1] turns it off
    schedule: Literal["cosine", "constant"] = "cosine"


class Optimizer(Section):
    """AdamW for one of the two networks."""

    learning_rate: Rate
    final_learning_rate: Rate | None = None  # reached linearly at the stage's last update; left out: constant
    # fused: one kernel for all tensors; 8bit: moments of 8 bits, a quarter of their memory, by bitsandbytes
    kind: Literal["adamw", "fused", "8bit"] = "adamw"
    betas: tuple[float, float] = Field((0.0, 0.99), strict=False)
    weight_decay: float = Field(0.01, ge=0)  # "official demo"
    clip: Rate = 1.0  # gradient norm ("official demo")


class Training(Section):
    """What cold start and joint training share."""

    updates: Positive  # of the student
    batch_size: Positive  # prompts an update
    fake_updates: Positive = 5  # of the fake score for each of the student, the last of them fused with it
    student: Optimizer
    fake_score: Optimizer
    dynamic: Dynamic = Dynamic()
    renoise_range: tuple[float, float] = Field((0.02, 0.98), strict=False)  # levels t are kept inside ("DMD2")

    @model_validator(mode="after")
    def _range_is_one(self) -> Training:
        low, high = self.renoise_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"renoise_range must be 0 <= low < high <= 1, got {low}, {high}")
        return self


class RL(Section):
    """What the three algorithms share."""

    weight: float = Field(gt=0)  # of the RL loss beside distribution matching
    # fixed, or matched: times |gradient of distribution matching| / |gradient of RL| at the first joint update
    weight_is: Literal["fixed", "matched"] = "fixed"
    rewards: dict[str, float] = Field(min_length=1)  # reward name -> its share


class ReFL(RL):
    """Reward feedback learning: the reward's gradient through the decoder."""

    algorithm: Literal["refl"]
    # what of the reward is ascended: itself, or its log, for rewards that are probabilities (those of the lab are):
    # a probability is as flat where all is wrong as where all is right, its log only where all is right
    map: Literal["linear", "log"] = "linear"
    pretraining: float = Field(0.0, ge=0)  # weight of its usual regulariser, where distribution matching is off
    # what the gradient goes through: the teacher's decoder, whole or tile by tile, which holds one tile's activations,
    # or an AutoencoderTiny such as TAESD, in a folder or at hub:OWNER/NAME@COMMIT
    decoder: Literal["whole", "tiled", "tiny"] = "whole"
    tiny_decoder: Address | None = None

    @model_validator(mode="after")
    def _tiny_decoder_fits(self) -> ReFL:
        if self.decoder == "tiny" and self.tiny_decoder is None:
            raise ValueError("joint.rl.decoder is tiny but joint.rl.tiny_decoder is missing; give the folder of one")
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
    group_size: int = Field(8, ge=2)  # images of one prompt that are ranked
    beta: Rate = 100.0  # how close to the cold start's student, in mean log likelihoods of a latent's elements

    def needs_reference(self) -> bool:
        return True


class GRPO(RL):
    """Group relative policy optimization on the sampler's renoising steps."""

    algorithm: Literal["grpo"]
    group_size: int = Field(8, ge=2)  # images of one prompt that are compared
    inner_updates: Positive = 1  # student updates on one rollout; from the second on the clipped ratio matters
    clip_range: Rate = 1e-3  # of the ratio of mean likelihoods, with inner_updates above 1
    kl: float = Field(0.0, ge=0)  # weight of its usual regulariser, where distribution matching is off

    def needs_reference(self) -> bool:
        return self.kl > 0

    @model_validator(mode="after")
    def _clip_is_used(self) -> GRPO:
        if self.inner_updates == 1 and "clip_range" in self.model_fields_set:
            raise ValueError(
                "joint.rl.clip_range does nothing with inner_updates 1, where the ratio is 1; drop it, or set "
                "inner_updates to 2 or more"
            )
        return self


AnyRL = ReFL | DPO | GRPO


class Watch(Section):
    """The hacking alarm: what is looked at during joint training, on training prompts and fixed noise."""

    every: Positive = 50  # student updates; the start and the end of the stage are always looked at
    reward: str = Field(min_length=1)  # one that is not trained on
    prompts: Positive = 64  # training prompts, evenly spread; all of them where there are fewer
    seeds: int = Field(2, ge=2)  # images a prompt, for diversity
    on_alarm: Literal["off", "warn", "stop"] = "warn"  # off is silent; stop ends the stage and seals what there is
    # the last EMA, or of those looked at the one with the best held-out reward (and no image that is not a number)
    export: Literal["last", "best"] = "last"
    reward_drop: Rate = 0.05  # alarm when the held-out reward falls more than this below its best
    diversity_drop: float = Field(0.3, gt=0, lt=1)  # alarm when diversity loses more than this share of its start
    saturation_rise: Rate = 0.3  # alarm when colour saturation gains more than this share of its start


class Joint(Training):
    """DMD and RL at once. Without `rl` it is distillation only; without distribution matching, RL only (Table 5)."""

    rl: Annotated[AnyRL, Field(discriminator="algorithm")] | None = None
    distribution_matching: bool = True
    watch: Watch | None = None

    @model_validator(mode="after")
    def _something_is_trained(self) -> Joint:
        if self.rl is None:
            if not self.distribution_matching:
                raise ValueError(
                    "joint.distribution_matching is false and joint.rl is missing: nothing would be trained"
                )
            return self
        if self.rl.weight_is == "matched" and not self.distribution_matching:
            raise ValueError("joint.rl.weight_is matched needs distribution_matching; set it to fixed")
        if isinstance(self.rl, DPO) and self.batch_size % 2:
            raise ValueError(f"joint.batch_size is {self.batch_size}; DPO trains on pairs, so make it even")
        if self.watch and self.watch.reward in self.rl.rewards:
            raise ValueError(f"joint.watch.reward {self.watch.reward} is trained on; watch one that is held out")
        return self


JUDGES = ("lab-checker", "fashion-judge", *OF_JUDGE)  # metrics that are no reward
MODEL = r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,39}$"  # the name of another model on the scorecard


class Pipeline(Section):
    """A checkpoint of somebody else's on the scorecard, drawn by its own diffusers pipeline."""

    path: Address  # a diffusers folder, hub:OWNER/NAME@COMMIT, or lab:NAME
    steps: Positive
    guidance_scale: float = Field(1.0, ge=0.0)  # as its pipeline takes it


class Evaluate(Section):
    """The scorecard: held-out prompts, the same noise for student, teacher and naive teacher."""

    metrics: tuple[str, ...] = Field(min_length=1, strict=False)  # one of JUDGES, or the name of a reward
    limit: Positive | None = None  # prompts; None takes all of them
    batch_size: Positive = 64
    models: tuple[ModelName, ...] = Field(MODELS, min_length=1, strict=False)  # who is compared
    seeds: Positive = 1  # images a prompt; from 2 on, diversity is reported
    pipelines: dict[Annotated[str, Field(pattern=MODEL)], Pipeline] = Field({})  # by the name that the card has

    @model_validator(mode="after")
    def _lpips_has_pairs(self) -> Evaluate:
        if "lpips" in self.metrics and self.seeds == 1:
            raise ValueError("evaluate.metrics has lpips, a distance between a prompt's images, and seeds is 1; set 4")
        if self.metrics == ("lpips",):
            raise ValueError("evaluate.metrics has nothing but lpips, and varied is not good; add another metric")
        return self

    @model_validator(mode="after")
    def _names_are_new(self) -> Evaluate:
        if taken := sorted(set(self.pipelines).intersection(MODELS)):
            raise ValueError(
                f"evaluate.pipelines.{taken[0]}: {taken[0]} is one of evaluate.models; choose another name"
            )
        return self

    @model_validator(mode="after")
    def _each_once(self) -> Evaluate:
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"evaluate.models names one twice: {', '.join(self.models)}")
        return self


class Export(Section):
    """What is written of the student. Each form but lora is as large as the network or larger.

    pipeline: a diffusers folder, which evaluation draws from. lora: a LoRA student's LoRA alone. weights: the network
    alone under diffusers' names. single-file: network, VAE and text encoders as one file in the layout that SDXL and
    SD3 were published in, which ComfyUI reads.
    """

    forms: tuple[Form, ...] | None = Field(None, min_length=1, strict=False)  # None: pipeline, lora if it is

    @model_validator(mode="after")
    def _forms_fit(self) -> Export:
        if self.forms and len(set(self.forms)) < len(self.forms):
            raise ValueError(f"export.forms names one twice: {', '.join(self.forms)}")
        if self.forms and "single-file" in self.forms and "pipeline" not in self.forms:
            raise ValueError(
                "export.forms has single-file without pipeline, whose folder diffusers configures the file by; add it"
            )
        return self


class Execution(Section):
    """How a run is carried out. Nothing here changes the result, except that several processes, and parts of a batch,
    add in another order."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    processes: Positive = 1  # of a training stage or evaluation on this machine, one a GPU; they split the work
    # the most samples that the networks are given at once; the parts of a batch add up. null: the whole batch
    micro_batch_size: Positive | None = None
    # whether each process holds all weights, or its rows of them, which costs messages and saves memory
    sharding: Literal["none", "fsdp"] = "none"
    gradient_checkpointing: bool = False  # activations are computed again in the backward pass: less memory, more time
    checkpoint_every: Positive = 50  # student updates
    keep_checkpoints: int = Field(2, ge=2)  # the newest may be damaged
    cluster: Cluster | None = None  # the stages run as Jobs of Kubernetes there; None: as processes of this machine


class Config(Section):
    """A whole run."""

    run: str = Field(pattern=NAME)
    seed: int = Field(0, ge=0)
    teacher: Teacher
    prompts: Prompts
    student: Student
    fake_score: FakeScore = FakeScore()
    # of the networks while training: bfloat16 stores what is frozen in it and rounds what is trained, which is float32
    precision: Literal["float32", "bfloat16"] = "float32"
    cold_start: Training
    joint: Joint
    evaluate: Evaluate
    weights: dict[str, Address] = Field({})  # of reward models: a file, a folder or hub:OWNER/NAME@COMMIT[/FILE]
    export: Export = Export()
    execution: Execution = Execution()

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms that the export is written in."""
        if self.export.forms is not None:
            return self.export.forms
        return ("pipeline", "lora") if self.student.form == "lora" else ("pipeline",)

    def rewards(self, stage: StageName) -> set[str]:
        """The rewards that a stage runs: joint trains on some and watches one, evaluate reports some."""
        if stage == "joint":
            return {
                *(self.joint.rl.rewards if self.joint.rl else ()),
                *({self.joint.watch.reward} if self.joint.watch else ()),
            }
        return set(self.evaluate.metrics).difference(JUDGES) if stage == "evaluate" else set()

    def weighed(self, stage: StageName) -> set[str]:
        """`rewards`, and the other metrics that have weights."""
        return self.rewards(stage) | (
            set(OF_JUDGE).intersection(self.evaluate.metrics) if stage == "evaluate" else set()
        )

    @model_validator(mode="after")
    def _rewards_are_known(self) -> Config:
        asked = self.rewards("joint") | self.rewards("evaluate")
        for name in sorted(asked.difference(OF_REWARD)):
            known = (*OF_REWARD, *JUDGES) if name in self.evaluate.metrics else (*OF_REWARD,)
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"DMDR has {', '.join(known)}"
            raise ValueError(f"unknown reward {name}; {hint}")
        weighed = asked | self.weighed("evaluate")
        read = {weights for name in weighed for weights in OF[name]}
        idle = sorted(set(self.weights) - read)
        if idle:
            raise ValueError(
                f"weights.{idle[0]} is read by no reward of this config, which read "
                f"{', '.join(sorted(read)) or 'none'}; drop it"
            )
        return self

    @model_validator(mode="after")
    def _sampler_has_a_policy(self) -> Config:
        if self.student.steps == 1 and isinstance(self.joint.rl, DPO | GRPO):
            raise ValueError(
                f"joint.rl.algorithm {self.joint.rl.algorithm} learns from the renoising steps and student.steps 1 has "
                "none; set algorithm: refl, or 2 steps or more"
            )
        return self

    @model_validator(mode="after")
    def _student_has_the_forms(self) -> Config:
        if "lora" in self.forms and self.student.form == "full":
            raise ValueError("export.forms has lora but student.form is full; take lora out, or set form: lora")
        if "pipeline" not in self.forms and "student" in self.evaluate.models:
            raise ValueError(
                "export.forms lacks pipeline, which evaluate draws the student from; add it, or take student out of "
                "evaluate.models"
            )
        return self

    @model_validator(mode="after")
    def _file_has_parts(self) -> Config:
        is_file = self.teacher.path.endswith(".safetensors")
        if is_file and self.teacher.parts is None:
            raise ValueError(
                f"teacher.path {self.teacher.path} is one file and teacher.parts is missing; name the diffusers folder "
                "or hub:OWNER/NAME@COMMIT that gives its configuration, tokenizers and what the file lacks"
            )
        if not is_file and self.teacher.parts is not None:
            raise ValueError("teacher.parts is set but teacher.path is no .safetensors file; drop it")
        return self
