"""The commands of `dmdr`: what each is called, what it takes, and its help.

Only what the help shows is imported here. Each command imports what it needs when it runs, so that the help is quick.
"""

from __future__ import annotations

import typer

from dmdr.errors import ConfigError, describe_exit_codes
from flows.commands import options

EXIT_CODES = describe_exit_codes()
PASS_ALL_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}

app = typer.Typer(
    help="Distil a text-to-image teacher into a few-step student by distribution matching and RL at once.",
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
teachers = typer.Typer(help="Publish teachers, for retraining to find, and list them.", rich_markup_mode=None)


@app.command(epilog=EXIT_CODES)
def run(
    config: options.Config,
    run: options.OwnName = None,
    store: options.Store = "runs",
    changes: options.Set = None,
    until: options.Until = None,
    from_cold_start: options.FromColdStart = None,
    dry_run: options.DryRun = False,
) -> int:
    """Run all stages of a config.

    A sealed stage is skipped. An open one continues.
    """
    from flows.commands.run import RunOptions, run_config

    return run_config(config, RunOptions(run, store, tuple(changes or ()), until, from_cold_start, dry_run))


@app.command()
def init(
    family: options.FamilyName,
    gpu: options.Gpu = "h100-80",
    teacher: options.OwnTeacher = None,
    prompts: options.PromptFile = None,
) -> int:
    """Print a config for a model family and a GPU, or a reward, to begin with.

    example: dmdr init sdxl --gpu rtx-4090 --teacher ./my-sdxl --prompts prompts.txt > my.yaml
    """
    if family == "reward":
        from flows.commands.own_reward import print_template

        return print_template()
    from flows.commands.init import print_config

    return print_config(family, gpu, teacher, prompts)


@app.command()
def schema() -> int:
    """Print the JSON schema of a config, by which editors complete and check it."""
    from flows.commands.schema import print_schema

    return print_schema()


@app.command(epilog=EXIT_CODES)
def tables(
    spec: options.Spec,
    seeds: options.Seeds = None,
    base: options.Base = None,
    out: options.TablePage = None,
    store: options.Store = "runs",
) -> int:
    """Run a table of the paper over several seeds, and write its page.

    The same command again continues.
    """
    from flows.commands.run import run_tables

    return run_tables(spec, seeds or None, store, base, out)


@app.command(epilog=EXIT_CODES)
def evaluate(
    config: options.Judge,
    pipeline: options.Pipeline,
    steps: options.Steps,
    guidance: options.Guidance = 1.0,
    name: options.CardName = None,
    run: options.OwnName = None,
    store: options.Store = "runs",
) -> int:
    """Put any checkpoint that diffusers loads on a run's scorecard."""
    from flows.commands.config_file import find_config
    from flows.commands.evaluate import evaluate_pipeline

    return evaluate_pipeline(find_config(config), pipeline, steps, guidance, name=name, run=run, store=store)


@app.command()
def plan(
    config: options.Config,
    gpu: options.Gpu = "h100-80",
    nodes: options.Nodes = 1,
    changes: options.Set = None,
) -> int:
    """Print the memory, work and hours of a config on a GPU.

    Nothing is trained for that, and no weights are loaded.
    """
    from flows.commands.config_file import change_config, find_config
    from flows.commands.plan import print_plan

    with change_config(find_config(config), tuple(changes or ())) as changed:
        return print_plan(changed, gpu, nodes)


@app.command(epilog=EXIT_CODES)
def check(
    config: options.Config,
    run: options.OwnName = None,
    store: options.Store = "runs",
    changes: options.Set = None,
) -> int:
    """Check in minutes all that a run of a config will meet, before it starts.

    One line a check: ok, or what to do. It tries store, prompts, teacher, rewards, memory, an update of each training
    stage, images and export. Nothing stays in the store.
    """
    from flows.commands.check import check_config

    return check_config(config, run=run, store=store, changes=tuple(changes or ()))


@app.command("check-reward", epilog=EXIT_CODES)
def check_reward(
    reward: options.CheckedReward,
    weights: options.RewardWeights = None,
    prompts: options.CheckPrompts = None,
    device: options.RewardDevice = "cpu",
) -> int:
    """Check that a reward keeps what training needs of it.

    One line a check: shapes, numbers, range, the same scores again, alone and in a batch, the gradient against finite
    differences. The code of a file runs.

    example: dmdr check-reward my_rewards.py:Sharpness
    """
    from flows.commands.own_reward import check_reward

    return check_reward(reward, weights=weights or [], prompts=prompts, device=device)


@app.command("serve-reward", epilog=EXIT_CODES)
def serve_reward(
    reward: options.ServedReward,
    weights: options.RewardWeights = None,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    device: options.RewardDevice = "cpu",
) -> int:
    """Host a reward in a process of its own, for the joint stage of a run elsewhere.

    It asks for no password: let only those reach it that may.

    example: dmdr serve-reward my_rewards.py:Sharpness --port 8000
    """
    from flows.commands.own_reward import serve_reward

    return serve_reward(reward, weights=weights or [], host=host, port=port, device=device)


@app.command(epilog=EXIT_CODES)
def tune(
    config: options.Config,
    stage: options.TunedStage = "joint",
    grid: options.Grid = None,
    updates: options.ShortUpdates = 50,
    out: options.TuneFolder = None,
    store: options.Store = "runs",
    changes: options.Set = None,
) -> int:
    """Find learning rates by short runs on a grid, from the same start.

    It reads the run's sealed prompts and cold start, and changes nothing of the run. It says first what it costs. The
    same command again goes on. At the end it prints a table, the lines to paste, and where the map lies.

    example: dmdr tune my.yaml --grid student=1e-6,1e-5 --grid fake=1e-5 --grid ratio=5,10
    """
    from flows.commands.tune import TuneOptions, parse_grid, tune_config

    short = TuneOptions(stage, parse_grid(grid or []), updates, out, store, tuple(changes or ()))
    return tune_config(config, short)


@app.command("signal", epilog=EXIT_CODES)
def measure_signal(
    config: options.Config,
    updates: options.SignalUpdates = 8,
    fit: options.SignalFit = 64,
    store: options.Store = "runs",
    changes: options.Set = None,
) -> int:
    """Measure in minutes whether an RL setting carries anything, before you pay for it.

    For ReFL, GRPO, DPO, evolution strategies and the surrogate, and for the config's own settings: the cosine of the
    gradient that it gives the student with the reward's own, step by step, with standard errors. If a reward has no
    gradient, the cosine of two halves of a batch. A surrogate is fitted first, and its held-out fit stands beside it.
    It reads the run's sealed prompts and cold start, and trains and writes nothing.

    example: dmdr signal my.yaml --updates 16
    """
    from flows.commands.signal import print_signal

    return print_signal(config, updates=updates, fit=fit, store=store, changes=tuple(changes or ()))


@app.command()
def render(
    config: options.ClusterConfig,
    stage: options.StageOption,
    store: options.PodStore,
    run: options.OwnName = None,
    attempt: options.Attempt = 1,
) -> int:
    """Print the Kubernetes Job of a stage, for kubectl create."""
    from flows.commands.config_file import find_config
    from flows.commands.render import print_job

    return print_job(find_config(config), stage, run, store, attempt)


@app.command()
def status(run: options.AnyName, store: options.Store = "runs") -> int:
    """List the stages of a run: sealed, open or not started."""
    from flows.commands.store import print_status

    return print_status(run, store)


@app.command(epilog=EXIT_CODES)
def watch(
    run: options.AnyName,
    html: options.LivePage = None,
    every: options.Every = 5,
    once: options.Once = False,
    store: options.Store = "runs",
) -> int:
    """Watch a run: stages, curves, images, alarms, time left, cost.

    It reads the store alone, so it works from any machine, whoever runs the stages. With --html it writes a page that
    loads itself again in a browser. It ends with the run, or by Ctrl-C, which stops nothing else.
    """
    from flows.commands.watch import WatchOptions, watch_run

    return watch_run(run, WatchOptions(store, html, every, once))


@app.command(epilog=EXIT_CODES)
def automate(block: options.Block, events: options.Events = None) -> int:
    """Let Prefect send events of runs to a notification block: mail, chat, webhook.

    The same command again changes the automation. Without a Prefect server, execution.notify of a config does it.

    example: dmdr automate slack-webhook/team --event failed --event alarm
    """
    from flows.commands.automate import create_automation

    return create_automation(block, events or [])


@app.command()
def runs(store: options.Store = "runs") -> int:
    """List the runs of a store with their teachers and scores."""
    from flows.commands.store import print_runs

    return print_runs(store)


@app.command()
def compare(runs: options.Names, out: options.ComparisonPage = "comparison.html", store: options.Store = "runs") -> int:
    """Compare evaluated runs: write a page and print its tables."""
    from flows.commands.compare import compare_runs

    return compare_runs(runs, store, out)


@app.command(epilog=EXIT_CODES)
def promote(
    name: options.Alias,
    run: options.PromotedRun = None,
    if_better: options.IfBetter = None,
    undo: options.Undo = False,
    config: options.PromotedConfig = None,
    store: options.Store = "runs",
) -> int:
    """Give the export of a run a name that dmdr pull follows.

    With --if-better, the run gets the name only if it is better than the run that has it. A metric that either run was
    trained on does not count. A name keeps its history: without RUN it is printed.

    example: dmdr promote my-run --as production --if-better strict
    """
    from flows.commands.promote import PromoteOptions, promote_result

    return promote_result(run, name, PromoteOptions(store, if_better, undo, config))


@app.command()
def pull(
    run: options.AnyName,
    stage: options.StageArgument,
    folder: options.Target,
    form: options.FormOption = None,
    to_hub: options.ToHub = None,
    verify: options.PublicKey = None,
    store: options.Store = "runs",
) -> int:
    """Copy the files of a sealed stage to a folder, verified.

    The same command again continues a copy that was cut off, and an upload.
    """
    from flows.commands.pull import pull_stage

    return pull_stage(run, stage, folder, store, form, hub=to_hub, key=verify)


@app.command()
def export(
    run: options.AnyName,
    form: options.ExportForm,
    out: options.ExportTo,
    update: options.ExportUpdate = None,
    teacher: options.ExportTeacher = None,
    store: options.Store = "runs",
) -> int:
    """Write the student of a finished run in another form.

    What the run has sealed stays as it is. A form that it has is copied.

    example: dmdr export my-run --form lora --update 350 --out my-lora
    """
    from flows.commands.export import export_form

    return export_form(run, form, out, teacher=teacher, store=store, update=update)


@app.command()
def rm(
    run: options.RunName, stage: options.Removed = None, yes: options.Yes = False, store: options.Store = "runs"
) -> int:
    """Remove a run, or one of its stages and what was made from it."""
    from flows.commands.store import remove_result

    return remove_result(run, stage, store, is_agreed=yes)


app.add_typer(teachers, name="teachers")


@teachers.command("publish")
def publish(
    folder: options.Teacher, name: options.TeacherName, to: options.To, revision: options.Revision = None
) -> int:
    """Copy a teacher to a store, verified, and tell Prefect.

    The same command again continues a copy that was cut off.
    """
    from flows.commands.teachers import publish_folder

    return publish_folder(folder, name, revision, to)


@teachers.command("list")
def list_published(at: options.At) -> int:
    """List published teachers with their revisions and addresses."""
    from flows.commands.teachers import print_published

    return print_published(at)


@app.command(epilog=EXIT_CODES)
def generate(
    run: options.RunOrConfig,
    prompt: options.PromptText,
    n: options.Count = 1,
    seed: options.FirstSeed = 0,
    compare: options.Compare = False,
    out: options.Images = "generated",
    store: options.Store = "runs",
) -> int:
    """Draw a prompt with the student of a run, which may still be training.

    One that is not exported yet draws with its newest checkpoint.
    """
    from flows.commands.generate import generate_images

    return generate_images(run, prompt, count=n, seed=seed, compare=compare, out=out, store=store)


@teachers.command("resolve")
def resolve(repository: options.Repository) -> int:
    """Print the address of a model on the hub with its newest commit."""
    from flows.commands.teachers import print_resolved

    return print_resolved(repository)


@app.command(context_settings=PASS_ALL_ON, add_help_option=False)
def stage(context: typer.Context) -> int:
    """Run one stage, as a container does; see dmdr stage --help."""
    from stages.__main__ import main as run_stage

    return run_stage(context.args)


@app.command(context_settings=PASS_ALL_ON, add_help_option=False)
def lab(context: typer.Context) -> int:
    """Build models of the lab; see dmdr lab build --help."""
    from dmdr.lab.build import main as build

    if context.args[:1] != ["build"]:
        raise ConfigError("the lab has one command: dmdr lab build WHAT --out DIR; see dmdr lab build --help")
    return build(context.args[1:])
