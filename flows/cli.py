"""The console command `dmdr`."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from dmdr.config.run import FORMS
from dmdr.config.stages import STAGES
from dmdr.errors import ConfigError, DataError, InputMissing
from dmdr.planning.gpus import GPUS

EXIT = {
    ConfigError: 64,
    DataError: 65,
    InputMissing: 66,
}  # as in stages/__main__.py, whose import takes over the signals
STORE_FAILED = 74
DESCRIPTION = "Distil a text-to-image teacher into a few-step student by distribution matching and RL at once."
EPILOG = (
    "exit codes: 0 sealed; 64 config, 65 data, 66 input missing, 70 internal, 74 store, 75 stopped: repeat the command"
)
STORE = "where artifacts lie: a folder or any fsspec URL such as s3://BUCKET/PREFIX (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose usage errors exit with 64, like a bad config."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(64, f"{self.prog}: {message}\n")


def seed(text: str) -> int:
    """A seed of the command line."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a seed is a whole number from 0 on, not {text!r}")
    return int(text)


def count(text: str) -> int:
    """A number of steps, or which attempt it is."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it is a whole number from 1 on, not {text!r}")
    return int(text)


def parser() -> Parser:
    """The commands, with help that a newcomer can act on."""
    top = Parser(prog="dmdr", description=DESCRIPTION, epilog=EPILOG)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    run = commands.add_parser(
        "run", help="run all stages of a config; what is sealed is skipped, what is open goes on", epilog=EPILOG
    )
    run.add_argument("config", metavar="CONFIG", help="a YAML file, for example configs/lab-flow.yaml")
    run.add_argument("--run", metavar="NAME", help="name of the run (default: the config's own)")
    run.add_argument("--store", default="runs", metavar="URL", help=STORE)

    tables = commands.add_parser(
        "tables", help="run a table of the paper over several seeds and write its page; again: go on", epilog=EPILOG
    )
    tables.add_argument("spec", metavar="SPEC", help="a YAML file, for example configs/tables/table-5-refl.yaml")
    tables.add_argument("--seeds", nargs="+", type=seed, metavar="N", help="in the place of the table's own (three)")
    tables.add_argument("--base", metavar="CONFIG", help="a config in the place of the table's own, of another teacher")
    tables.add_argument("--out", metavar="PAGE", help="the page (default: tables/NAME.html); configs lie beside it")
    tables.add_argument("--store", default="runs", metavar="URL", help=STORE)

    evaluate = commands.add_parser(
        "evaluate", help="put any checkpoint that diffusers loads on the scorecard of a run", epilog=EPILOG
    )
    evaluate.add_argument("config", metavar="CONFIG", help="of the run: its prompts, noise and metrics judge")
    evaluate.add_argument(
        "--pipeline",
        required=True,
        metavar="FOLDER-OR-ID",
        help="a diffusers folder, hub:OWNER/NAME@COMMIT or lab:NAME",
    )
    evaluate.add_argument("--steps", required=True, type=count, metavar="N", help="of its sampler")
    evaluate.add_argument("--guidance", type=float, default=1.0, metavar="G", help="its scale (default: %(default)s)")
    evaluate.add_argument("--name", metavar="NAME", help="on the card (default: the folder's or repository's)")
    evaluate.add_argument("--run", metavar="NAME", help="name of the run (default: the config's own)")
    evaluate.add_argument("--store", default="runs", metavar="URL", help=STORE)

    plan = commands.add_parser("plan", help="what a config needs of a GPU, memory, work, hours, without running it")
    plan.add_argument("config", metavar="CONFIG", help="a YAML file, for example configs/sd35-large.yaml")
    plan.add_argument("--gpu", default="h100-80", metavar="GPU", choices=GPUS, help=f"one of {', '.join(GPUS)}")

    render = commands.add_parser("render", help="print the Job that a stage would be on a cluster, for kubectl create")
    render.add_argument("config", metavar="CONFIG", help="a YAML file with execution.cluster")
    render.add_argument("--stage", required=True, metavar="STAGE", choices=STAGES, help=f"one of {', '.join(STAGES)}")
    render.add_argument("--run", metavar="NAME", help="name of the run (default: the config's own)")
    render.add_argument("--store", required=True, metavar="URL", help="where artifacts lie, as s3://BUCKET/PREFIX")
    render.add_argument("--attempt", type=count, default=1, metavar="N", help="which attempt it is (default: 1)")

    status = commands.add_parser("status", help="list the stages of a run: sealed, open or not started")
    status.add_argument("run", metavar="RUN", help="name of the run, or what it was promoted as")
    status.add_argument("--store", default="runs", metavar="URL", help=STORE)

    runs = commands.add_parser("runs", help="list the runs of a store with their teachers and scores")
    runs.add_argument("--store", default="runs", metavar="URL", help=STORE)

    compare = commands.add_parser("compare", help="put evaluated runs side by side: one page, and tables here")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="names of runs, or what they were promoted as")
    compare.add_argument("--out", default="comparison.html", metavar="PAGE", help="the page (default: %(default)s)")
    compare.add_argument("--store", default="runs", metavar="URL", help=STORE)

    promote = commands.add_parser("promote", help="let a name mean the export of a run; dmdr pull follows it")
    promote.add_argument("run", metavar="RUN", help="name of the run")
    promote.add_argument("--as", dest="name", required=True, metavar="NAME", help="for example production")
    promote.add_argument("--store", default="runs", metavar="URL", help=STORE)

    pull = commands.add_parser("pull", help="copy the files of a sealed stage to a folder, verified; again: go on")
    pull.add_argument("run", metavar="RUN", help="name of the run, or what it was promoted as")
    pull.add_argument("stage", metavar="STAGE", choices=STAGES, help=f"one of {', '.join(STAGES)}")
    pull.add_argument("folder", metavar="DIR", help="where to; a new or an empty folder")
    pull.add_argument("--form", metavar="FORM", choices=FORMS, help=f"of an export, only this: {', '.join(FORMS)}")
    pull.add_argument("--store", default="runs", metavar="URL", help=STORE)

    teachers = commands.add_parser("teachers", help="publish teachers, for retraining to find, and list them")
    what = teachers.add_subparsers(dest="what", metavar="WHAT", required=True)
    publish = what.add_parser("publish", help="copy a teacher to a store, verified, and tell Prefect; again: go on")
    publish.add_argument("folder", metavar="FOLDER", help="a diffusers folder, hub:OWNER/NAME@COMMIT or lab:NAME")
    publish.add_argument("--as", dest="name", required=True, metavar="NAME", help="what to call it, for example sd35")
    publish.add_argument("--revision", metavar="REV", help="which one it is (default: the begin of its sha256)")
    publish.add_argument("--to", required=True, metavar="URL", help="a folder, or s3://BUCKET/PREFIX, of teachers only")
    listed = what.add_parser("list", help="list published teachers with their revisions and addresses")
    listed.add_argument("--at", required=True, metavar="URL", help="where teachers are published")

    # These two read their own arguments, --help among them.
    commands.add_parser("stage", help="run one stage, as a container does; see dmdr stage --help", add_help=False)
    commands.add_parser("lab", help="build the lab's teachers and rewards; see dmdr lab build --help", add_help=False)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code. Each command imports what it needs, and no more."""
    commands = parser()
    given, rest = commands.parse_known_args(argv)
    if given.command == "stage":
        from stages.__main__ import main as run_stage

        return run_stage(rest)
    if given.command == "lab":
        from dmdr.lab.build import main as build

        if rest[:1] != ["build"]:
            commands.error("the lab has one command: dmdr lab build WHAT --out DIR; see dmdr lab build --help")
        return build(rest[1:])
    if rest:
        commands.error(f"unknown arguments: {' '.join(rest)}; see dmdr {given.command} --help")

    from flows.commands import pull, run, store

    try:
        if given.command == "tables":
            return run.run_tables(given.spec, given.seeds, given.store, given.base, given.out)
        if given.command == "run":
            return run.run_config(given.config, given.run, given.store)
        if given.command == "evaluate":
            from flows.commands.evaluate import evaluate_pipeline

            return evaluate_pipeline(
                given.config,
                given.pipeline,
                given.steps,
                given.guidance,
                name=given.name,
                run=given.run,
                store=given.store,
            )
        if given.command == "plan":
            from flows.commands.plan import print_plan

            return print_plan(given.config, given.gpu)
        if given.command == "render":
            from flows.commands.render import print_job

            return print_job(given.config, given.stage, given.run, given.store, given.attempt)
        if given.command == "teachers":
            from flows.commands import teachers

            if given.what == "list":
                return teachers.print_published(given.at)
            return teachers.publish_folder(given.folder, given.name, given.revision, given.to)
        if given.command == "status":
            return store.print_status(given.run, given.store)
        if given.command == "runs":
            return store.print_runs(given.store)
        if given.command == "compare":
            from flows.commands.compare import compare_runs

            return compare_runs(given.runs, given.store, given.out)
        if given.command == "promote":
            return store.promote_result(given.run, given.name, given.store)
        return pull.pull_stage(given.run, given.stage, given.folder, given.store, given.form)
    except (ConfigError, DataError, OSError) as error:
        print(f"dmdr: {error}", file=sys.stderr)
        return next((code for kind, code in EXIT.items() if isinstance(error, kind)), STORE_FAILED)


if __name__ == "__main__":
    sys.exit(main())
