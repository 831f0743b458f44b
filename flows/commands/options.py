"""The arguments and options of `dmdr`: how each is named, explained and read. Imports only what a help text needs."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from dmdr.config.families import FAMILIES, Family
from dmdr.config.forms import FORMS, Form
from dmdr.config.stages import STAGES, StageName
from dmdr.planning.gpus import GPUS

A_PIPELINE = "a diffusers folder, hub:OWNER/NAME@COMMIT or lab:NAME"
ONE_STAGE = f"one of {', '.join(STAGES)}"
STORE = "where artifacts lie: a folder or any fsspec URL such as s3://BUCKET/PREFIX"
TABLE_CONFIG = "a config, perhaps of another teacher, instead of the table's own"
TABLE_PAGE = "the page (default: tables/NAME.html); the configs of its runs lie beside it"
TABLE_SEEDS = "one or several seeds, instead of the table's three"


def parse_seed(text: str) -> int:
    """A seed of the command line."""
    if not text.isdecimal():
        raise typer.BadParameter(f"a seed is a whole number from 0 on, not {text!r}")
    return int(text)


def parse_count(value: str | int) -> int:
    """A number of steps, or the number of an attempt. A default value comes as a number."""
    if not str(value).isdecimal() or int(value) < 1:
        raise typer.BadParameter(f"it is a whole number from 1 on, not {value!r}")
    return int(value)


def parse_first_seed(value: str | int) -> int:
    """A seed that torch takes, with room for those of more images. A default value comes as a number."""
    if not str(value).isdecimal() or int(value) >= 2**62:
        raise typer.BadParameter(f"a seed is a whole number from 0 to 2**62, not {value!r}")
    return int(value)


def parse_gpu(text: str) -> str:
    """The name of a GPU that the planner knows."""
    if text not in GPUS:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(GPUS)}")
    return text


def list_gpus() -> list[str]:
    """What the shell offers to complete --gpu with."""
    return list(GPUS)


# Of several commands
Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="a YAML file, or a config that comes with DMDR, such as quickstart")
]
OwnName = Annotated[str | None, typer.Option("--run", metavar="NAME", help="name of the run (default: the config's)")]
AnyName = Annotated[str, typer.Argument(metavar="RUN", help="name of the run, or a name that it was promoted to")]
Store = Annotated[str, typer.Option("--store", metavar="URL", help=STORE)]
Pipeline = Annotated[str, typer.Option("--pipeline", metavar="FOLDER-OR-ID", help=A_PIPELINE)]

# run
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="change a setting, for example joint.updates=500; repeatable"),
]
Until = Annotated[StageName | None, typer.Option("--until", metavar="STAGE", help=f"stop after it: {ONE_STAGE}")]
FromColdStart = Annotated[
    str | None,
    typer.Option("--from-cold-start", metavar="RUN", help="copy prompts and cold start of that run of the same store"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="only say what would run, be skipped or be refused")]

# init
FAMILY_OR_REWARD = f"one of {', '.join(FAMILIES)}; or reward, for a reward of your own"
FamilyName = Annotated[Literal[Family, "reward"], typer.Argument(metavar="FAMILY", help=FAMILY_OR_REWARD)]
OwnTeacher = Annotated[
    str | None,
    typer.Option("--teacher", metavar="PATH", help=f"{A_PIPELINE} (default: the family's published one)"),
]
PromptFile = Annotated[
    str | None,
    typer.Option("--prompts", metavar="FILE", help="a .txt, .jsonl, .csv, .tsv or .parquet file, or set:NAME"),
]

# check-reward, serve-reward
A_REWARD = "the name of a reward, FILE.py:CLASS, or the name of an entry point of the group dmdr.rewards"
CheckedReward = Annotated[str, typer.Argument(metavar="REWARD", help=f"{A_REWARD}; or the address of a service")]
ServedReward = Annotated[str, typer.Argument(metavar="REWARD", help=A_REWARD)]
RewardWeights = Annotated[
    list[str] | None,
    typer.Option("--weights", metavar="NAME=ADDRESS", help="where a set of weights lies, as in a config; repeatable"),
]
CheckPrompts = Annotated[
    str | None, typer.Option("--prompts", metavar="FILE", help="prompts that the reward can score (default: two)")
]
RewardDevice = Annotated[Literal["cpu", "cuda"], typer.Option("--device", metavar="DEVICE", help="cpu or cuda")]
Host = Annotated[str, typer.Option("--host", metavar="HOST", help="0.0.0.0 serves other machines, too")]
Port = Annotated[int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="0 takes a free one")]

# rm
Removed = Annotated[
    StageName | None, typer.Argument(metavar="[STAGE]", help=f"{ONE_STAGE}, with those made from it (default: all)")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="do not ask")]

# export
ExportForm = Annotated[Form, typer.Option("--form", metavar="FORM", help=f"one of {', '.join(FORMS)}")]
ExportTo = Annotated[
    str, typer.Option("--out", metavar="DIR", help="where the form is written: a new or an empty folder")
]
ExportUpdate = Annotated[
    int | None,
    typer.Option("--update", min=0, metavar="N", help="a student that joint.watch.keep_best kept, by its update"),
]
ExportTeacher = Annotated[
    str | None, typer.Option("--teacher", metavar="PATH", help="the teacher of the run, if it was a folder")
]

# tables
Spec = Annotated[str, typer.Argument(metavar="SPEC", help="a YAML file, for example configs/tables/table-5-refl.yaml")]
Seeds = Annotated[list[int] | None, typer.Option("--seeds", metavar="N...", parser=parse_seed, help=TABLE_SEEDS)]
Base = Annotated[str | None, typer.Option("--base", metavar="CONFIG", help=TABLE_CONFIG)]
TablePage = Annotated[str | None, typer.Option("--out", metavar="PAGE", help=TABLE_PAGE)]

# evaluate
Judge = Annotated[str, typer.Argument(metavar="CONFIG", help="config of the run that gives prompts, noise and metrics")]
Steps = Annotated[int, typer.Option("--steps", metavar="N", parser=parse_count, help="sampling steps of the pipeline")]
Guidance = Annotated[float, typer.Option("--guidance", metavar="G", help="guidance scale of the pipeline")]
CardName = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="name on the scorecard (default: the folder's or repository's)"),
]

# plan
Gpu = Annotated[
    str,
    typer.Option("--gpu", metavar="GPU", parser=parse_gpu, autocompletion=list_gpus, help=f"one of {', '.join(GPUS)}"),
]
Nodes = Annotated[
    int,
    typer.Option("--nodes", metavar="N", parser=parse_count, help="also say what up to N times the machines bring"),
]

# tune
TunedStage = Annotated[
    Literal["cold_start", "joint"], typer.Option("--stage", metavar="STAGE", help="cold_start or joint")
]
Grid = Annotated[
    list[str] | None,
    typer.Option(
        "--grid", metavar="AXIS=V,V", help="values of student, fake or ratio, crossed (default: a dozen cells)"
    ),
]
ShortUpdates = Annotated[
    int, typer.Option("--updates", metavar="N", parser=parse_count, help="student updates of each short run")
]
TuneFolder = Annotated[
    str | None, typer.Option("--out", metavar="DIR", help="folder of the results (default: tuning/RUN-STAGE)")
]

# signal
SignalUpdates = Annotated[
    int, typer.Option("--updates", metavar="N", parser=parse_count, help="batches that each row is measured on")
]
SignalFit = Annotated[
    int, typer.Option("--fit", metavar="N", parser=parse_count, help="batches that a surrogate learns from first")
]

# render
ClusterConfig = Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file with execution.cluster")]
StageOption = Annotated[StageName, typer.Option("--stage", metavar="STAGE", help=ONE_STAGE)]
PodStore = Annotated[str, typer.Option("--store", metavar="URL", help="where artifacts lie, as s3://BUCKET/PREFIX")]
Attempt = Annotated[int, typer.Option("--attempt", metavar="N", parser=parse_count, help="number of the attempt")]

# watch
LivePage = Annotated[str | None, typer.Option("--html", metavar="PAGE", help="write a page instead, with all images")]
Every = Annotated[int, typer.Option("--every", metavar="SECONDS", parser=parse_count, help="seconds between two looks")]
Once = Annotated[bool, typer.Option("--once", help="look once, and end")]

# automate
Block = Annotated[
    str, typer.Argument(metavar="TYPE/NAME", help="a notification block of Prefect, for example slack-webhook/team")
]
Events = Annotated[
    list[str] | None,
    typer.Option("--event", metavar="EVENT", help="alarm, sealed, finished, failed, waiting or budget (default: all)"),
]

# compare
Names = Annotated[
    list[str], typer.Argument(metavar="RUN...", help="names of runs, or names that they were promoted to")
]
ComparisonPage = Annotated[str, typer.Option("--out", metavar="PAGE", help="the page")]

# promote
RunName = Annotated[str, typer.Argument(metavar="RUN", help="name of the run")]
PromotedRun = Annotated[str | None, typer.Argument(metavar="RUN", help="name of the run (none: the name's history)")]
Alias = Annotated[str, typer.Option("--as", metavar="NAME", help="the new name, for example production")]
IfBetter = Annotated[
    str | None,
    typer.Option(
        "--if-better",
        metavar="METRIC[,METRIC...]",
        help="only if its student is better than that of the run which has the name, in one of these metrics of the "
        "scorecard, and worse in none",
    ),
]
Undo = Annotated[bool, typer.Option("--undo", help="go back to the run that had the name before")]
PromotedConfig = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="CONFIG",
        help="of the run, for --if-better: with it the other student is drawn where the two evaluations differ, and "
        "execution.notify hears of it",
    ),
]

# pull
StageArgument = Annotated[StageName, typer.Argument(metavar="STAGE", help=ONE_STAGE)]
Target = Annotated[str, typer.Argument(metavar="DIR", help="the copy: a new or an empty folder")]
FormOption = Annotated[
    Form | None, typer.Option("--form", metavar="FORM", help=f"copy only this form of an export: {', '.join(FORMS)}")
]

ToHub = Annotated[
    str | None,
    typer.Option("--to-hub", metavar="OWNER/NAME", help="upload the export to this repository of the model hub"),
]

PublicKey = Annotated[
    str | None,
    typer.Option("--verify", metavar="KEY", help="check that the owner of this public key (PEM) signed the export"),
]

# teachers
Repository = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="a model of the hub, as its page is called")]
Teacher = Annotated[str, typer.Argument(metavar="FOLDER", help=A_PIPELINE)]
TeacherName = Annotated[str, typer.Option("--as", metavar="NAME", help="name of the teacher, for example sd35")]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="its revision (default: the start of its sha256)")
]
To = Annotated[str, typer.Option("--to", metavar="URL", help="a folder or s3://BUCKET/PREFIX that holds only teachers")]
At = Annotated[str, typer.Option("--at", metavar="URL", help="where teachers are published")]

# generate
RUN_OR_CONFIG = "name of the run, or its config (a .yaml file), which knows where a teacher's folder lies"
RunOrConfig = Annotated[str, typer.Argument(metavar="RUN", help=RUN_OR_CONFIG)]
PromptText = Annotated[str, typer.Argument(metavar="PROMPT", help="what the images show")]
Count = Annotated[
    int, typer.Option("--n", metavar="N", parser=parse_count, help="number of images, each of its own seed")
]
FirstSeed = Annotated[
    int, typer.Option("--seed", metavar="SEED", parser=parse_first_seed, help="seed of the first image")
]
Compare = Annotated[bool, typer.Option("--compare", help="draw with the teacher as well, both in one picture")]
Images = Annotated[str, typer.Option("--out", metavar="DIR", help="folder of the images")]
