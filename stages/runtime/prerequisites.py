"""What the later stages need, checked by the first one: whatever can be known before training is refused before it.

1. The rewards that training computes are loaded once, on the CPU, and let go: their weights may be damaged or
   belong to another model. The weights of evaluation are only looked for, because its image may be another one.
2. A metric whose weights are missing is left out of the scorecard, as evaluation does. If all are missing, the run is
   refused.
3. On a cluster, a stage may have another image than this one, with weights inside. Then only that stage looks for them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from dmdr.config.evaluation import JUDGES
from dmdr.config.prompt_record import PromptRecord
from dmdr.config.reward_weights import OF
from dmdr.config.rl import ReFL
from dmdr.config.run import Config
from dmdr.config.stages import StageName
from dmdr.config.worlds import OF_METRIC, name_world, refuse_other_worlds
from dmdr.errors import ConfigError, InputMissing, doing
from dmdr.lab.origin import read_world
from dmdr.rewards.ocr_package import find_models
from dmdr.rewards.own_code import digest_code
from dmdr.rewards.sources import list_sources
from dmdr.rewards.weights import require_weights
from dmdr.rl import tiny_decoder
from dmdr.teacher import hub
from dmdr.teacher.distilled import warn_of_distilled, warn_of_name
from dmdr.teacher.load import find_diffusers_folder, find_teacher_of
from dmdr.teacher.single_file import SingleFile
from stages.store.artifacts import Artifact


def check_worlds(config: Config) -> None:
    """Refuse rewards and judges of the lab with a teacher that does not draw the lab's world.

    Raises:
        ConfigError: with one line.
    """
    if OF_METRIC.keys().isdisjoint(name for names in config.list_uses().values() for name in names):
        return
    world = name_world(config.teacher.path, config.teacher.world)
    if world is None:
        source = find_teacher_of(config.teacher)
        world = read_world(source.parts if isinstance(source, SingleFile) else source)
    try:
        refuse_other_worlds(config.list_uses(), config.teacher.path, world)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_training(config: Config) -> None:
    """Check that what the training stages read besides the prompts is there, and fetch nothing.

    Raises:
        ConfigError: an optimizer, a compiler or an attention kernel is not installed.
        InputMissing: the weights or the file of a reward, or the tiny decoder, are missing.
    """
    from dmdr.assembly.checks import prepare_kernels  # brings torch
    from dmdr.optimizers import check_optimizers
    from stages.runtime.device import pick_device

    if config.execution.cluster is None:  # there, the stage itself looks, on the node that it runs on
        prepare_kernels(config, pick_device(config))
    split = config.execution.sharding != "none" and config.student.form == "full"
    for stage in config.training_stages:
        check_optimizers(config.training_of(stage), stage, split=split)
    for rl in config.list_rl().values():
        if not isinstance(rl, ReFL) or rl.tiny_decoder is None:
            continue
        if hub.is_hub(rl.tiny_decoder):
            hub.require(tiny_decoder.KEY, rl.tiny_decoder)
        else:
            tiny_decoder.find_tiny_decoder(rl.tiny_decoder)
    for name in list_rewards_here(config):
        own = config.rewards.get(name)
        for weights in OF[name] if own is None else ():
            require_weights(weights, config.weights)
        if own is not None and own.url is None:
            digest_code(name, own)  # which looks for it
        if name == "ocr":
            find_models()


def warn_of_teacher(config: Config, say: Callable[[str], None], *, fetches: bool) -> None:
    """Say in one line if the teacher looks like a few-step model, or has its guidance distilled into it.

    fetches: whether a hub's teacher may be fetched; if not, its name alone is looked at.

    Raises:
        ConfigError, DataError, InputMissing: the teacher is not there, or its configuration cannot be read.
    """
    teacher = config.teacher
    if is_on_hub(config) and not fetches:
        warning = warn_of_name(teacher.path)
    else:
        source = find_teacher_of(teacher)
        folder, file = (source.parts, source.file) if isinstance(source, SingleFile) else (source, None)
        warning = warn_of_distilled(teacher.path, folder, file)
    if warning is not None:
        say(warning)


def check_teacher_settings(config: Config, *, fetches: bool) -> None:
    """Check what a config asks of its teacher's family, by configurations alone: the unconditional row, CFG to take
    apart or weigh, blocks to compile, and the modules that a LoRA adapts.

    fetches: whether a hub's teacher may be fetched; if not, such a teacher is not looked at.

    Raises:
        ConfigError: the family has no such row or no CFG, its blocks do not compile, or the network has no such module.
        DataError, InputMissing: as `find_teacher_of`.
    """
    named = [each.targets for each in (config.lora_forms.fake_score, config.lora_forms.student)]
    asks = config.teacher.unconditional != "pipeline" or any(isinstance(targets, tuple) for targets in named)
    asks = asks or config.execution.compile
    asks = asks or any(config.training_of(stage).takes_guidance_apart for stage in config.training_stages)
    if not asks or (is_on_hub(config) and not fetches):
        return
    from dmdr.assembly.checks import check_compiled, check_guidance, check_lora_targets  # brings torch
    from dmdr.planning.meta import build_meta_backbone

    backbone = build_meta_backbone(config.teacher)
    backbone.check_unconditional(config.teacher.unconditional)
    check_guidance(config, backbone)
    check_compiled(config, backbone)
    check_lora_targets(config, backbone)


def check_student_start(config: Config, say: Callable[[str], None], *, fetches: bool) -> None:
    """Check what the student starts from, by headers and configurations alone.

    fetches: whether a hub's start and teacher may be fetched; if not, such a start is not looked at.
    say: gets a line for what a user should know.

    Raises:
        ConfigError, DataError, InputMissing: as `check_start`.
    """
    start, joint = config.student.start, config.joint
    if start is None:
        return
    if fetches or not hub.is_hub(start.path):
        from dmdr.planning.meta import build_meta_backbone  # brings torch
        from dmdr.teacher.start_check import check_start

        teacher = None if is_on_hub(config) and not fetches else find_teacher_of(config.teacher)
        with doing(f"checking {start.path}, which the student starts from"):
            backbone = build_meta_backbone(config.teacher)
            for line in check_start(config.student, backbone, teacher, trains_at_once=config.cold_start is None):
                say(line)
    if config.cold_start is None and joint.distribution_matching and not joint.fake_warmup:
        say(
            "joint.fake_warmup is 0 and there is no cold start: the first student updates follow a fake score that is "
            "still the teacher's; 50 is a good beginning"
        )


def is_on_hub(config: Config) -> bool:
    """Whether files of the teacher lie on a model hub."""
    return hub.is_hub(config.teacher.path) or hub.is_hub(config.teacher.parts or "")


def load_rewards(config: Config) -> None:
    """Load each reward of the training stages once, and let it go. A service may start later: only the stage needs it.

    Raises:
        ConfigError: ReFL would train on a reward without a gradient.
        InputMissing, DataError: the weights of a reward are missing, damaged, or of another model; user's code raises.
    """
    from dmdr.metrics.verifier import load_any_reward  # brings torch
    from dmdr.rl.mixture import refuse_without_gradient

    followed = {name for rl in config.list_rl().values() if isinstance(rl, ReFL) for name in rl.rewards}
    for name in list_rewards_here(config):
        if name in config.rewards and config.rewards[name].url is not None:
            continue
        with doing(f"loading the reward {name}"):
            reward = load_any_reward(name, "cpu", list_sources(config))
        if name in followed:
            refuse_without_gradient({name: reward})


def check_evaluation(config: Config, records: list[PromptRecord], say: Callable[[str], None]) -> None:
    """Check that the metrics can judge the evaluation prompts, and that weights and pipelines are there.

    records: the evaluation prompts; none where no metric looks at them.
    say: gets a line for each metric that will be left out.

    Raises:
        ConfigError: a metric cannot judge these prompts.
        InputMissing: no metric has its weights, or a pipeline is not there.
        DataError: a pipeline has no model_index.json.
    """
    if records:
        from dmdr.metrics.load import check_metrics

        check_metrics(config.evaluate.metrics, records)
    missing: dict[str, str] = {}
    for name in config.evaluate.metrics:
        try:
            for weights in () if name in config.rewards else OF.get(name, ()):
                require_weights(weights, config.weights)
            if name == "ocr":
                find_models()
        except InputMissing as error:
            missing[name] = str(error)
    if not has_same_files(config, "evaluate"):
        missing = {}
    quality = [name for name in config.evaluate.metrics if name != "lpips"]
    if quality and missing.keys() >= set(quality):
        raise InputMissing(f"evaluate.metrics: no metric has its weights ({missing[quality[0]]})")
    for name, reason in missing.items():
        say(f"evaluate will leave {name} out: {reason}")
    for name, pipeline in config.evaluate.pipelines.items():
        key = f"evaluate.pipelines.{name}.path"
        if hub.is_hub(pipeline.path):
            hub.require(key, pipeline.path)
        else:
            find_diffusers_folder(key, pipeline.path)


def read_evaluation_prompts(config: Config, artifact: Artifact) -> list[PromptRecord]:
    """The prompts that evaluation will draw, of the sealed prompts of a run; none where no metric looks at them.

    artifact: of any stage of the run.
    """
    if not needs_records(config):
        return []
    from dmdr.promptset import spread_evenly

    sealed = Artifact(artifact.store, artifact.run, "prompts")
    with tempfile.TemporaryDirectory() as cache:
        folder = sealed.fetch(Path(cache), lambda name: name.startswith("evaluation-") and name.endswith(".jsonl"))
        files = sorted(folder.glob("evaluation-*.jsonl"))
        lines = [line for file in files for line in file.read_bytes().splitlines()]
    return [json.loads(lines[index]) for index in spread_evenly(len(lines), config.evaluate.limit or len(lines))]


def list_rewards_here(config: Config) -> list[str]:
    """The rewards of the training stages whose files this image has, by name."""
    here = [stage for stage in config.training_stages if has_same_files(config, stage)]
    return sorted({name for stage in here for name in config.list_rewards(stage)})


def has_same_files(config: Config, stage: StageName) -> bool:
    """Whether a later stage runs in the same image as the stage prompts, and so finds what we find."""
    cluster = config.execution.cluster
    return cluster is None or cluster.of(stage).image == cluster.of("prompts").image


def needs_records(config: Config) -> bool:
    """Whether some metric looks at what the source says about a prompt."""
    return not set(JUDGES).isdisjoint(config.evaluate.metrics)
