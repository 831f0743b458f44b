"""`dmdr init`: a first config for a model family, a GPU, a teacher and a file of prompts.

1. It looks before it writes: at the teacher's model_index.json, at the prompts, and for the weights of rewards.
2. Its memory and hours are the planner's, counted for the very config that it prints.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dmdr.config.families import FACTS, Family, FamilyFacts
from dmdr.config.inputs import Prompts, Teacher
from dmdr.config.load import parse_mapping, validate
from dmdr.config.reward_weights import OF_REWARD, PINNED
from dmdr.config.run import Config
from dmdr.config.worlds import OF_METRIC
from dmdr.errors import ConfigError, DataError
from dmdr.planning.gpus import GIB, GPUS, Gpu, advise
from dmdr.planning.roofline import estimate_stage
from dmdr.teacher import hub
from dmdr.teacher.index import read_index
from flows.commands.first_config import FirstConfig, Rewards, Size, Source
from flows.commands.schema import SCHEMA
from stages.store.layout import RECORD
from stages.store.published_teachers import TeacherAddress, is_name

if TYPE_CHECKING:
    from dmdr.planning.stage_plan import StagePlan

COLUMNS = ("prompt", "caption", "text", "Prompt", "TEXT")  # that hold the prompt, in files of others
TO_TRAIN_ON, TO_WATCH = ("dfn-clip", "hpsv2.1"), ("pickscore", "imagereward", "clip-score", "aesthetic")
METRICS = ("clip-score", "aesthetic", "pickscore", "hpsv2.1")  # DMDR, Table 1
SMALL = 10**8  # parameters; a network below is one to try things out with
HELD_OUT = 200  # prompts that are held out where there are enough


def print_config(family: Family, gpu: str, teacher: str | None, prompts: str | None) -> int:
    """Print the config to stdout; returns 0.

    Raises:
        ConfigError: the teacher is of another family.
        DataError, InputMissing: the teacher or the prompts cannot be read.
    """
    facts, card = FACTS[family], GPUS[gpu]
    address = teacher or facts.teacher
    parameters = check_teacher(family, facts, address)
    source = Source("prompts.txt", 0.1, note="one prompt a line: put yours there") if prompts is None else read(prompts)
    small = parameters is not None and parameters < SMALL
    resolution = read_resolution(address) if small else None
    rewards = find_rewards(few=card.memory < 30 * GIB)
    size = choose_small(rewards) if small else choose_size(facts, card)
    first = FirstConfig(f"my-{family}", facts, address, source, rewards, size, resolution)
    config = validate(parse_mapping(first.to_yaml([]), "dmdr init"), Config, "dmdr init")
    lines = describe_cost(plan(config, facts), config, card)
    print(first.to_yaml(write_head(facts, card, gpu, lines, needs_prompts=prompts is None)), end="")
    return 0


def write_head(facts: FamilyFacts, card: Gpu, gpu: str, cost: list[str], *, needs_prompts: bool) -> list[str]:
    """The comment at the top of the config. cost: what the planner says."""
    before = ["Before:  write your prompts into prompts.txt, one a line, or name another file below"]
    return [
        f"yaml-language-server: $schema={SCHEMA}",
        f"{facts.title} to a student of 4 steps on one {card.name}; written by dmdr init, yours to change.",
        *(before if needs_prompts else []),
        "Check:   dmdr run THIS-FILE --dry-run",
        "Run:     dmdr run THIS-FILE        the same command goes on where it stopped",
        f"Plan:    dmdr plan THIS-FILE --gpu {gpu}",
        *cost,
    ]


def check_teacher(family: Family, facts: FamilyFacts, address: str) -> int | None:
    """Refuse a teacher of another family; returns the parameters of its network, or None where only the hub has it.

    Raises:
        ConfigError: it is of another family.
        DataError, InputMissing: it cannot be read.
    """
    if address == facts.teacher:
        return None
    if address.endswith(".safetensors"):
        raise ConfigError(
            f"--teacher {address} is one file, and dmdr init needs the folder of its configuration; give that folder, "
            "then set teacher.path to the file and teacher.parts to the folder"
        )
    if is_published(address):
        kind, layers, parameters = _read_published(address), None, None
    else:
        from dmdr.planning.meta import build_from_configs, find_configs  # brings torch

        folder = find_configs(Teacher(path=address, guidance_scale=facts.guidance))
        kind, layers = read_index(folder).family, _count_layers(folder)
        network = build_from_configs(folder).network
        parameters = sum(each.numel() for each in network.parameters())
    siblings = [other for other in FACTS if FACTS[other].kind == kind and FACTS[other].layers in (None, layers)]
    fitting = siblings or [other for other in FACTS if FACTS[other].kind == kind]
    if family not in fitting:
        raise ConfigError(
            f"--teacher {address} is of the family {kind}, not {family}: dmdr init {' or '.join(fitting)}"
        )
    return parameters


def read_resolution(address: str) -> int | None:
    """The size of images that the autoencoder of a small teacher was made for, where its network names no size."""
    from dmdr.planning.meta import find_configs  # brings torch

    folder = find_configs(Teacher(path=address, guidance_scale=1.0))
    if read_index(folder).family not in ("z-image", "flux"):
        return None
    size = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8")).get("sample_size")
    return size if isinstance(size, int) else None


def read(path: str) -> Source:
    """Read a file of prompts, or a named set, and choose the share that is held out.

    Raises:
        ConfigError, DataError, InputMissing: it cannot be read, or has fewer than two prompts.
    """
    problem: ConfigError | DataError | None = None
    for column in COLUMNS:
        prompts = Prompts(sources=(path,), column=column)
        try:
            count = sum(_count_prompts(prompts).values())
        except (ConfigError, DataError) as error:
            problem = problem or error
            continue
        share = min(0.5, max(0.01, HELD_OUT / count)) if count else 0.5
        for held_out in (round(share, 2), 0.5):
            if len(_count_prompts(prompts.model_copy(update={"evaluation_share": held_out}))) == 2:
                return Source(path, held_out, None if column == "prompt" else column, f"{count:,} different prompts")
        raise DataError(f"{path} has {count} different prompts, too few to hold some out; give more")
    assert problem is not None
    raise problem


def _count_prompts(prompts: Prompts) -> Counter[str]:
    """The number of different prompts of each split. Raises as `read`."""
    from stages.prompt_sources.report import Tally
    from stages.prompts import select_records  # brings torch

    return Counter(split for split, _ in select_records(prompts, Tally(), lambda line: None))


def find_rewards(*, few: bool) -> Rewards:
    """The rewards whose weights are in the cache of the hub's library, or can be fetched now.

    few: train on one and watch none, to save memory.
    """
    first = hub.pin("weights", PINNED[TO_TRAIN_ON[0]])
    is_reachable = hub.find_problem(first["repo"], first["commit"], first["file"]) is None

    def is_found(name: str) -> bool:
        parts = [hub.pin("weights", PINNED[each]) for each in OF_REWARD[name]]
        return is_reachable or all(hub.is_cached(each["repo"], each["commit"], each["file"]) for each in parts)

    found = [name for name in OF_REWARD if name not in OF_METRIC and is_found(name)]
    train = [name for name in TO_TRAIN_ON if name in found] or [name for name in TO_WATCH if name in found][:1]
    watch = [name for name in TO_WATCH if name in found and name not in train]
    if few:
        train, watch = train[-1:], []
    return Rewards(
        tuple(train), watch[0] if watch and train else None, tuple(name for name in METRICS if name in found)
    )


def choose_size(facts: FamilyFacts, card: Gpu) -> Size:
    """How much to train on one GPU, and how to make it fit."""
    if card.memory < 60 * GIB:
        return Size(1000, 16, 64, "bfloat16", 1, checkpointing=True, tiled=True, note="the paper's length is 2000")
    micro = 1 if facts.is_large else 2
    return Size(2000, 32, 64, "bfloat16", 2 * micro if card.memory > 120 * GIB else micro, checkpointing=True)


def choose_small(rewards: Rewards) -> Size:
    """For a network that is there to try things out with: short stages, and no tricks to save memory."""
    note = "few, for a small network; the paper's length is 2000"
    return Size(50, 8, 8, "float32", tiled=bool(rewards.train), rate=3e-5, note=note)


def plan(config: Config, facts: FamilyFacts) -> StagePlan:
    """Count an update of joint training, the dearer of the two stages. A teacher that only a store has is planned as
    the published one of its family."""
    from dmdr.planning.plan import plan_stage  # brings torch

    if is_published(config.teacher.path):
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"path": facts.teacher})})
    return plan_stage(config, "joint", say=_show_progress)


def is_published(address: str) -> bool:
    """Whether an address is that of a published teacher: PREFIX/NAME/REVISION, in a folder or in a store."""
    return "://" in address or Path(address, RECORD).is_file()


def _show_progress(part: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[Kplanning: {part}", end="", file=sys.stderr, flush=True)


def describe_cost(joint: StagePlan, config: Config, card: Gpu) -> list[str]:
    """Memory and hours, for people; and what to change if it does not fit."""
    work = {name: each for name, each in joint.work.items() if name != "reward"}
    tallies = {name: each for name, each in joint.tallies.items() if name != "reward"}
    cold = replace(joint, updates=config.training_of("cold_start").updates, work=work, tallies=tallies)
    total = sum(estimate_stage(plan, card) for plan in (joint, cold)) / 3600
    need = max(joint.peak, joint.load)
    fits, *remedies = advise(config, [joint], card)
    lines = [
        f"Memory:  {format_memory(need)} of {format_memory(card.free)}, by the planner",
        f"Time:    {format_hours(total)} of training, estimated from its operators; prompts, export and",
        "         evaluation come on top, and so does the watched reward",
    ]
    if "does not fit" in fits:
        lines += ["DOES NOT FIT on this GPU. What to change, cheapest first:", *(remedies)]
    return lines


def format_memory(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"


def format_hours(hours: float) -> str:
    return f"{hours:,.0f} hours" if hours >= 10 else f"{hours:.1f} hours" if hours >= 0.1 else "minutes"


def _read_published(address: str) -> str:
    """The family of a published teacher. Raises InputMissing if none is there."""
    parts = address.rstrip("/").rsplit("/", 2)
    if len(parts) < 3 or not (is_name(parts[1]) and is_name(parts[2])):
        raise ConfigError(f"--teacher {address} is not PREFIX/NAME/REVISION; dmdr teachers list --at PREFIX names them")
    from dmdr.teacher.index import FAMILIES

    return FAMILIES[str(TeacherAddress(*parts).sealed().identity["class"])]


def _count_layers(folder: Path) -> int | None:
    """The layers of a transformer, by its config; None where it says nothing, as a UNet."""
    path = folder / "transformer" / "config.json"
    value = json.loads(path.read_text(encoding="utf-8")).get("num_layers") if path.is_file() else None
    return value if isinstance(value, int) and value in {each.layers for each in FACTS.values()} else None
