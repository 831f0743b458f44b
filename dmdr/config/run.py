"""The config of a run: its sections, and the combinations of settings that are refused. No torch."""

from __future__ import annotations

import difflib
import itertools
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dmdr.config.batches import check_split
from dmdr.config.cluster import Cluster
from dmdr.config.few_steps import FewSteps
from dmdr.config.forms import Dtype, Form
from dmdr.config.guidance import Scale, take_middle
from dmdr.config.lora import Init, LoraForm, LoraForms, Targets
from dmdr.config.names import NAME
from dmdr.config.reward_weights import OF, OF_JUDGE, OF_REWARD
from dmdr.config.section import Address, Positive, Rate, Section
from dmdr.config.stages import MODELS, TABLE, ModelName, StageName, list_compared, list_stages
from dmdr.config.start import Start
from dmdr.config.training import DPO, GRPO, Joint, Training
from dmdr.config.worlds import World, name_world, refuse_other_worlds
from dmdr.errors import ConfigError


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


class Student(Section):
    """The few-step model."""

    steps: Literal[1, 2, 4, 8]
    form: Literal["full", "lora"] = "full"
    lora_rank: Positive | None = None
    lora_alpha: Rate | None = None  # the LoRA counts lora_alpha / lora_rank times; None: the rank, so once
    # The modules that the LoRA adapts. attention: the projections of all attentions. wide: all linear layers of the
    # blocks; of SDXL the authors' list, which has its convolutions too. Or names, or endings of names.
    lora_targets: Targets = "attention"
    # How the LoRA's A begins; B is zero. gaussian: standard deviation 1 / lora_rank (the authors' code, t2i), whose
    # first steps are longer than those of kaiming at the same learning rate.
    lora_init: Init = "kaiming"
    # highest decay of the averaged weights (EMA) that are exported; 0 exports the last weights
    ema: float = Field(0.99, ge=0.0, lt=1.0)
    start: Start | None = None  # what the student starts from; None: the teacher
    # share of fresh noise in each renoising step. 1: all of it. 0: none, the deterministic (Euler) step of the same
    # path. Between them only the rollouts of training mix, and the exported student is deterministic.
    eta: float = Field(1.0, ge=0.0, le=1.0)
    # the times at which the student is called, as its network is told them: 1000 is noise. [399] lets a 1-step SDXL
    # student predict from an easier level. None: the family's own, from the teacher's scheduler
    timesteps: tuple[float, ...] | None = Field(None, strict=False)
    shift: Rate | None = None  # of a flow model's times; None: that of the teacher's scheduler

    @property
    def few_steps(self) -> FewSteps:
        """How the student samples."""
        return FewSteps(self.steps, self.eta, self.timesteps, self.shift)

    @model_validator(mode="after")
    def _check_times(self) -> Student:
        if self.timesteps is not None and self.shift is not None:
            raise ValueError("student.timesteps and student.shift both set the student's times; drop one")
        if self.eta < 1 and self.steps == 1:
            raise ValueError("student.eta does nothing with student.steps 1, which never renoises; drop it")
        if self.timesteps is None:
            return self
        if len(self.timesteps) != self.steps:
            raise ValueError(
                f"student.timesteps has {len(self.timesteps)} of them and student.steps is {self.steps}; give one for "
                "each step"
            )
        if any(later >= earlier for earlier, later in itertools.pairwise(self.timesteps)):
            raise ValueError(f"student.timesteps {_list(self.timesteps)} must descend, from noise to data")
        if not 0 < self.timesteps[-1] <= self.timesteps[0] <= 1000:
            raise ValueError(f"student.timesteps {_list(self.timesteps)} must lie above 0 and be at most 1000")
        return self

    @model_validator(mode="after")
    def _check_rank(self) -> Student:
        if self.form == "full" and self.lora_rank is not None:
            raise ValueError("student.lora_rank is set but student.form is full; drop it, or set form: lora")
        if self.form == "lora" and self.lora_rank is None:
            raise ValueError("student.form is lora but student.lora_rank is missing; set one, for example 64")
        if self.form == "full" and self.lora_form != LoraForm():
            changed = next(name for name in ("targets", "init", "alpha") if f"lora_{name}" in self.model_fields_set)
            raise ValueError(f"student.lora_{changed} is set but student.form is full; drop it, or set form: lora")
        return self

    @property
    def lora_form(self) -> LoraForm:
        """What a LoRA student adapts, how it begins, and its alpha."""
        return LoraForm(self.lora_targets, self.lora_init, self.lora_alpha)


def _list(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


class FakeScore(Section):
    """The LoRA on the shared base that learns the score of the student's distribution."""

    lora_rank: Positive = 32  # "official demo"
    scale: float = Field(2.0, gt=0)  # LoRA scale when the network acts as the fake score ("official demo")
    lora_targets: Targets = "attention"  # as for student
    lora_init: Init = "kaiming"  # as for student


JUDGES = ("lab-checker", "fashion-judge", *OF_JUDGE)  # metrics that are not rewards
MODEL = r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,39}$"  # the name of another model on the scorecard


class Pipeline(Section):
    """Another checkpoint for the scorecard. Its own diffusers pipeline samples it."""

    path: Address  # a diffusers folder, hub:OWNER/NAME@COMMIT, or lab:NAME
    steps: Positive
    guidance_scale: float = Field(1.0, ge=0.0)  # the argument of its pipeline


class Evaluate(Section):
    """The scorecard: models compared on held-out prompts. Student, teacher and naive teacher get the same noise."""

    # names from JUDGES or names of rewards; may be empty where seeds is 2 or more: then only diversity is measured
    metrics: tuple[str, ...] = Field(strict=False)
    limit: Positive | None = None  # largest number of prompts; None: all
    batch_size: Positive = 64
    # the models to compare. A run without a cold start compares its student's start in the place of the cold start.
    models: tuple[ModelName, ...] = Field(list_compared(cold_start=True), min_length=1, strict=False)
    seeds: Positive = 1  # images of each prompt; with 2 or more, diversity is reported
    pipelines: dict[Annotated[str, Field(pattern=MODEL)], Pipeline] = Field({})  # name on the scorecard -> checkpoint

    @model_validator(mode="after")
    def _check_lpips(self) -> Evaluate:
        if "lpips" in self.metrics and self.seeds == 1:
            raise ValueError(
                "evaluate.metrics has lpips, a distance between images of one prompt, but seeds is 1; set 4"
            )
        if not self.metrics and self.seeds == 1:
            raise ValueError(
                "evaluate.metrics is empty; name a metric, or set evaluate.seeds to 2 to measure diversity"
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
    # of the files' weights; training is not affected. float16 holds no weight above 65504, bfloat16 rounds more
    dtype: Dtype = "bfloat16"

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
    signing_key: str | None = (
        None  # a file with a private key (PEM) that signs the export: dmdr pull --verify checks it
    )
    processes: Positive = 1  # for training and evaluation on this machine, one on each GPU; they split the work
    # largest number of samples in one pass of a network; gradients of the parts are added. None: the whole batch
    micro_batch_size: Positive | None = None
    # none: each process holds all weights. fsdp: each holds some rows of them, which saves memory and costs messages.
    sharding: Literal["none", "fsdp"] = "none"
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, more time
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
    cold_start: Training | None  # None: joint training begins at student.start, without a cold start
    joint: Joint
    evaluate: Evaluate
    # set of weights of a reward or judge -> a file, a folder or hub:OWNER/NAME@COMMIT[/FILE]
    weights: dict[str, Address] = Field({})
    export: Export = Export()
    execution: Execution = Execution()

    @model_validator(mode="before")
    @classmethod
    def _compare_start(cls, data: object) -> object:
        """A run without a cold start compares the student's start in its place, where evaluate.models is not set."""
        if not isinstance(data, dict) or "cold_start" not in data or data["cold_start"] is not None:
            return data
        evaluate = data.get("evaluate")
        if not isinstance(evaluate, dict) or "models" in evaluate:
            return data
        return {**data, "evaluate": {**evaluate, "models": list_compared(cold_start=False)}}

    @property
    def stages(self) -> tuple[StageName, ...]:
        """The stages of this run, in data order."""
        return list_stages(cold_start=self.cold_start is not None)

    @property
    def training_stages(self) -> tuple[StageName, ...]:
        """The stages of this run that train the student, in data order."""
        return tuple(stage for stage in self.stages if TABLE[stage].trains)

    def require_stage(self, stage: StageName | None, option: str) -> None:
        """Refuse a stage that this run lacks. option: that named it, for the message.

        Raises:
            ConfigError: it has no cold start.
        """
        if stage is not None and stage not in self.stages:
            raise ConfigError(f"{option}: this config has cold_start: null, so its run has no stage {stage}")

    def training_of(self, stage: StageName) -> Training:
        """The settings of a training stage that this run has."""
        training = self.joint if stage == "joint" else self.cold_start
        assert training is not None, "callers go through training_stages"
        return training

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms in which the student is exported."""
        if self.export.forms is not None:
            return self.export.forms
        return ("pipeline", "lora") if self.student.form == "lora" else ("pipeline",)

    @property
    def lora_forms(self) -> LoraForms:
        """What the LoRAs of fake score and student adapt, and how they begin."""
        return LoraForms(LoraForm(self.fake_score.lora_targets, self.fake_score.lora_init), self.student.lora_form)

    def rewards(self, stage: StageName) -> set[str]:
        """The rewards that a stage computes: joint trains on some and watches one, evaluate reports some."""
        if stage == "joint":
            return {
                *(self.joint.rl.rewards if self.joint.rl else ()),
                *({self.joint.watch.reward} if self.joint.watch else ()),
            }
        return set(self.evaluate.metrics).difference(JUDGES) if stage == "evaluate" else set()

    def count_ranks(self, stage: StageName) -> int:
        """Processes that train: those of every node."""
        cluster = self.execution.cluster
        return self.execution.processes * (cluster.of(stage).nodes if cluster else 1)

    def metrics_with_weights(self, stage: StageName) -> set[str]:
        """The rewards of a stage, and its other metrics that read weights or questions."""
        judges = set(OF_JUDGE).intersection(self.evaluate.metrics) if stage == "evaluate" else set()
        return self.rewards(stage) | judges

    def list_uses(self) -> dict[str, tuple[str, ...]]:
        """The key of each section that names rewards or metrics -> their names."""
        return {
            "joint.rl.rewards": tuple(self.joint.rl.rewards) if self.joint.rl else (),
            "joint.watch.reward": (self.joint.watch.reward,) if self.joint.watch else (),
            "evaluate.metrics": self.evaluate.metrics,
        }

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
    def _check_worlds(self) -> Config:
        """A teacher on a hub is none of the lab's. What a folder holds, `stages.runtime.prerequisites` reads."""
        world = name_world(self.teacher.path, self.teacher.world)
        if world is not None or self.teacher.path.startswith("hub:"):
            refuse_other_worlds(self.list_uses(), self.teacher.path, world)
        return self

    @model_validator(mode="after")
    def _check_steps(self) -> Config:
        if self.student.steps == 1 and isinstance(self.joint.rl, DPO | GRPO):
            raise ValueError(
                f"joint.rl.algorithm {self.joint.rl.algorithm} learns from the renoising steps and student.steps 1 has "
                "none; set algorithm: refl, or student.steps to 2 or more"
            )
        if self.student.eta == 0 and isinstance(self.joint.rl, DPO | GRPO):
            raise ValueError(
                f"joint.rl.algorithm {self.joint.rl.algorithm} learns from the noise of the renoising steps and "
                "student.eta 0 adds none; set algorithm: refl, or student.eta above 0"
            )
        return self

    @model_validator(mode="after")
    def _check_batches(self) -> Config:
        """Here and not only in the stage: a cluster would start pods on all nodes to learn it."""
        for name in self.training_stages:
            check_split(
                name,
                self.training_of(name),
                self.joint.rl if name == "joint" else None,
                steps=self.student.steps,
                ranks=self.count_ranks(name),
                micro_batch=self.execution.micro_batch_size,
            )
        return self

    @model_validator(mode="after")
    def _check_start(self) -> Config:
        """A student that starts at its teacher needs a cold start: at few steps it would draw what the naive teacher
        draws, and joint training has no schedule that brings it from there."""
        if "start" in self.evaluate.models and self.student.start is None:
            raise ValueError("evaluate.models has start but student.start is not set; take it out")
        if self.cold_start is not None:
            if self.joint.fake_warmup:
                raise ValueError(
                    "joint.fake_warmup is set but the cold start has trained the fake score already; drop it, or set "
                    "cold_start: null"
                )
            return self
        if self.student.start is None:
            raise ValueError(
                "cold_start is null but student.start is not set: a student that starts at its teacher needs a cold "
                "start; give the few-step model to start from, or a cold_start"
            )
        if "cold start" in self.evaluate.models:
            raise ValueError("evaluate.models has cold start but cold_start is null; take it out, or compare start")
        if self.execution.cluster is not None and "cold_start" in self.execution.cluster.stages:
            raise ValueError("execution.cluster.stages.cold_start is set but cold_start is null; drop it")
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
