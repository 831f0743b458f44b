"""The config of a run: its sections, and the combinations of settings that are refused. No torch."""

from __future__ import annotations

import difflib
from typing import Literal

from pydantic import Field, model_validator

from dmdr.config.batches import check_split
from dmdr.config.evaluation import JUDGES, Evaluate
from dmdr.config.execution import Execution
from dmdr.config.forms import Dtype, Form
from dmdr.config.inputs import Prompts, Teacher
from dmdr.config.lora import LoraForm, LoraForms
from dmdr.config.names import NAME
from dmdr.config.own_rewards import OwnReward, RewardName, check_reachable, refuse_taken_name
from dmdr.config.reward_weights import OF, OF_JUDGE, OF_REWARD, VERIFIERS
from dmdr.config.rl import AnyRL, Policy, ReFL, Weighting
from dmdr.config.section import Address, Section
from dmdr.config.stages import TABLE, StageName, list_compared, list_stages
from dmdr.config.student import FakeScore, Student
from dmdr.config.training import Joint, Training
from dmdr.config.worlds import name_world, refuse_other_worlds
from dmdr.errors import ConfigError

FrozenBase = Literal["fp8", "nf4"]


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
    # the linear layers of the frozen base in fewer bits, which a LoRA student has as its own. fp8: faster, on GPUs with
    # 8-bit units. nf4: a quarter of the memory, no faster; needs bitsandbytes. None: as `precision` says
    frozen_base: FrozenBase | None = None
    cold_start: Training | None  # None: joint training begins at student.start, without a cold start
    joint: Joint
    evaluate: Evaluate
    # name -> a reward of your own, which the other sections then name like any other
    rewards: dict[RewardName, OwnReward] = Field({})
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

    def list_rl(self) -> dict[StageName, AnyRL]:
        """The RL of each training stage that has it, in data order."""
        found = {stage: self.training_of(stage).rl for stage in self.training_stages}
        return {stage: rl for stage, rl in found.items() if rl is not None}

    @property
    def trained_rewards(self) -> dict[str, float]:
        """The rewards that the student is trained on -> their weights: those of joint where both stages have one."""
        return {name: weight for rl in self.list_rl().values() for name, weight in rl.rewards.items()}

    def list_rewards(self, stage: StageName) -> set[str]:
        """The rewards that a stage computes: training trains on some and watches one, evaluate reports some."""
        if stage in self.training_stages:
            rl = self.training_of(stage).rl
            return {*(rl.rewards if rl else ()), *self.list_watched(stage)}
        return set(self.evaluate.metrics).difference(JUDGES) if stage == "evaluate" else set()

    def list_watched(self, stage: StageName) -> tuple[str, ...]:
        """The held-out reward that a training stage watches, if it does."""
        watch = self.training_of(stage).watch
        return () if watch is None or watch.reward is None else (watch.reward,)

    def list_training_rewards(self) -> set[str]:
        """The rewards that some training stage computes."""
        return {name for stage in self.training_stages for name in self.list_rewards(stage)}

    def count_ranks(self, stage: StageName) -> int:
        """Processes that train: those of every node."""
        cluster = self.execution.cluster
        return self.execution.processes * (cluster.of(stage).nodes if cluster else 1)

    def metrics_with_weights(self, stage: StageName) -> set[str]:
        """The rewards of a stage that come with DMDR, and its other metrics that read weights or questions."""
        judges = set(OF_JUDGE).intersection(self.evaluate.metrics) if stage == "evaluate" else set()
        return (self.list_rewards(stage) | judges).difference(self.rewards)

    def list_uses(self) -> dict[str, tuple[str, ...]]:
        """The key of each section that names rewards or metrics -> their names."""
        return {
            **{f"{stage}.rl.rewards": tuple(rl.rewards) for stage, rl in self.list_rl().items()},
            **{f"{stage}.watch.reward": self.list_watched(stage) for stage in self.training_stages},
            "evaluate.metrics": self.evaluate.metrics,
        }

    @model_validator(mode="after")
    def _check_rewards(self) -> Config:
        judged = self.list_rewards("evaluate")
        for name in sorted(judged | self.list_training_rewards()):
            others = JUDGES if name in judged else VERIFIERS
            if name not in OF_REWARD and name not in self.rewards and (name in judged or name not in VERIFIERS):
                known = (*OF_REWARD, *others, *self.rewards)
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"DMDR has {', '.join(known)}"
                raise ValueError(f"unknown reward {name}; {hint}; one of your own stands in rewards.{name}")
        named = {name for stage in self.stages for name in self.metrics_with_weights(stage)}
        used = {weights for name in named for weights in OF[name]}
        unused = sorted(set(self.weights) - used)
        if unused:
            raise ValueError(
                f"weights.{unused[0]} is set but the rewards and metrics of this config read "
                f"{', '.join(sorted(used)) or 'no weights'}; drop it"
            )
        return self

    @model_validator(mode="after")
    def _check_own_rewards(self) -> Config:
        named = self.list_training_rewards() | self.list_rewards("evaluate")
        for name, reward in self.rewards.items():
            refuse_taken_name(name)
            if name not in named:
                raise ValueError(
                    f"rewards.{name} is set but nothing names it; name it in joint.rl.rewards, joint.watch.reward or "
                    "evaluate.metrics, or drop it"
                )
            if self.execution.cluster is not None:
                check_reachable(name, reward)
        return self

    @model_validator(mode="after")
    def _check_verifiers(self) -> Config:
        """ReFL follows a gradient, which no verifier and no service has. What decides may not be trained on."""
        services = {name for name, reward in self.rewards.items() if reward.url is not None}
        for stage, rl in self.list_rl().items():
            without = sorted((services | VERIFIERS.keys()).intersection(rl.rewards))
            if isinstance(rl, ReFL) and without:
                raise ValueError(
                    f"{stage}.rl.algorithm refl needs a gradient, and the reward {without[0]} has none; set algorithm: "
                    "es, grpo or dpo, or use another reward"
                )
            checker = sorted(name for name in rl.rewards if name.startswith("lab-checker"))
            if checker and "lab:held-out" in self.prompts.sources:
                raise ValueError(
                    f"{stage}.rl.rewards has {checker[0]} and prompts.sources has lab:held-out, whose verdict decides; "
                    "train on lab:train"
                )
        return self

    @model_validator(mode="after")
    def _check_watch(self) -> Config:
        watch = self.cold_start.watch if self.cold_start is not None else None
        if watch is not None and (watch.export == "best" or watch.keep_best):
            name = "export" if watch.export == "best" else "keep_best"
            raise ValueError(
                f"cold_start.watch.{name} is for joint training: a cold start goes towards its teacher, and no reward "
                "says which of its students is the best; drop it"
            )
        cold = self.cold_start.rl if self.cold_start is not None else None
        if cold is not None and self.joint.watch is not None and self.joint.watch.reward in cold.rewards:
            raise ValueError(
                f"joint.watch.reward {self.joint.watch.reward} is trained on; watch one that is not in "
                "cold_start.rl.rewards"
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
    def _check_frozen_base(self) -> Config:
        if self.frozen_base is None:
            return self
        if self.precision != "bfloat16":
            raise ValueError(
                f"frozen_base is {self.frozen_base}, whose products are rounded to bfloat16, but precision is "
                f"{self.precision}; set precision: bfloat16, or drop frozen_base"
            )
        if self.execution.sharding != "none":
            raise ValueError(
                f"frozen_base {self.frozen_base} cannot be split over processes and execution.sharding is "
                f"{self.execution.sharding}; set sharding: none, or drop frozen_base"
            )
        return self

    @model_validator(mode="after")
    def _check_recomputation(self) -> Config:
        keeps = self.execution.gradient_checkpointing == "attention"
        for name, rl in self.list_rl().items():
            if keeps and rl.weight_is == "matched" and not isinstance(rl, Policy):  # a policy has states of its own
                raise ValueError(
                    "execution.gradient_checkpointing attention keeps results for one backward pass, and "
                    f"{name}.rl.weight_is matched needs two; set gradient_checkpointing: blocks, or weight_is: fixed"
                )
        return self

    @model_validator(mode="after")
    def _check_steps(self) -> Config:
        for stage, rl in self.list_rl().items():
            if not isinstance(rl, Policy):
                continue
            if self.student.steps == 1:
                raise ValueError(
                    f"{stage}.rl.algorithm {rl.algorithm} learns from the renoising steps and student.steps 1 has "
                    "none; set algorithm: refl, or student.steps to 2 or more"
                )
            if self.student.eta == 0:
                raise ValueError(
                    f"{stage}.rl.algorithm {rl.algorithm} learns from the noise of the renoising steps and student.eta "
                    "0 adds none; set algorithm: refl, or student.eta above 0"
                )
        return self

    @model_validator(mode="after")
    def _check_decoupled(self) -> Config:
        for name in self.training_stages:
            if (decoupled := self.training_of(name).decoupled) is not None and self.teacher.guidance_scale == 1.0:
                raise ValueError(
                    f"{name}.decoupled is {decoupled} but teacher.guidance_scale 1 leaves no CFG to take apart; drop "
                    "it, or raise the scale"
                )
        return self

    @model_validator(mode="after")
    def _check_weighting(self) -> Config:
        for name, rl in self.list_rl().items():
            if isinstance(rl, Weighting) and rl.part == "guidance" and self.teacher.guidance_scale == 1.0:
                raise ValueError(
                    f"{name}.rl.part is guidance but teacher.guidance_scale 1 leaves no CFG to weigh; set part: all, "
                    "or raise the scale"
                )
        return self

    @model_validator(mode="after")
    def _check_batches(self) -> Config:
        """Here and not only in the stage: a cluster would start pods on all nodes to learn it."""
        for name in self.training_stages:
            check_split(
                name,
                self.training_of(name),
                self.training_of(name).rl,
                steps=self.student.steps,
                ranks=self.count_ranks(name),
                micro_batch=self.execution.micro_batch_size,
            )
        return self

    @model_validator(mode="after")
    def _check_sharding(self) -> Config:
        """Without a cluster, whoever starts the processes says on how many machines, and the stage looks at them."""
        cluster = self.execution.cluster
        for name in self.training_stages if self.execution.sharding == "hsdp" and cluster is not None else ():
            if self.count_ranks(name) == self.execution.processes:
                raise ValueError(
                    "execution.sharding is hsdp, which splits the weights within each of several machines, but "
                    f"execution.cluster gives {name} one; set fsdp, or nodes under execution.cluster.stages.{name}"
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
