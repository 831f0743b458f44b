"""python -m stages <stage> --config FILE [--run NAME] [--store URL] [--teacher ADDRESS] [--adopt RUN]

Sealed already? Say so and stop. Otherwise run the stage, then seal it. Resuming is the same command again.
Exit codes: 0 sealed; 64 config or command line, 65 data, 66 input missing (do not retry); 70 internal or non-finite,
74 the store or the disk, 75 checkpointed after SIGTERM (retry).
With `execution.processes` above 1 a training stage becomes as many processes; see ranks.py.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

asked_to_stop: list[int] = []


def on_signal(number: int, frame: FrameType | None) -> None:
    """Only raises a flag, which the stage looks at after each step. A second Ctrl-C ends it at once; a second SIGTERM
    does not, because the kernel may send more than one when the flow dies, and the checkpoint must not be lost."""
    asked_to_stop.append(number)
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)


# Before anything heavy: while the program of a container (process 1) has no handler, the kernel drops the signal.
signal.signal(signal.SIGTERM, on_signal)
signal.signal(signal.SIGINT, on_signal)

import argparse  # noqa: E402
import errno  # noqa: E402
import importlib  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from importlib import metadata  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NoReturn  # noqa: E402

from dmdr.config.identity import fingerprint, identity  # noqa: E402
from dmdr.config.load import load_config  # noqa: E402
from dmdr.config.stages import STAGES  # noqa: E402
from dmdr.errors import (  # noqa: E402
    ConfigError,
    DataError,
    InputMissing,
    NonFinite,
    Stopped,
    StoreError,
)
from stages.runtime import ranks  # noqa: E402
from stages.runtime.context import Context  # noqa: E402
from stages.store.adoption import adopt_stage  # noqa: E402
from stages.store.artifacts import Artifact  # noqa: E402
from stages.store.inputs import fingerprint_inputs  # noqa: E402
from stages.store.layout import digest  # noqa: E402
from stages.store.records import Cost, Provenance  # noqa: E402
from stages.store.s3_errors import Refused  # noqa: E402
from stages.store.teacher_folder import resolve_teacher  # noqa: E402

EXIT = {ConfigError: 64, DataError: 65, InputMissing: 66, NonFinite: 70, StoreError: 74, Stopped: 75}
INTERNAL, IO = 70, 74
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
HELP = """\
stages, in this order: {stages}

Each reads what the ones before it sealed at STORE/RUN/STAGE and seals its own result there. A sealed stage is skipped;
after a crash or a kill, the same command goes on from the last checkpoint.

example: python -m stages prompts --config configs/lab-flow.yaml
exit codes: 0 sealed, 64 config, 65 data, 66 input missing, 70 internal or not a number, 74 store or disk,
            75 stopped after a checkpoint"""


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line ends with 64 as every wrong config does."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT[ConfigError], f"{self.prog}: {message}; {self.prog} --help shows what there is\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m stages",
        description="Run one stage of a distillation and seal its result.",
        epilog=HELP.format(stages=", ".join(STAGES)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("stage", choices=STAGES, metavar="STAGE", help="one of the stages below")
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML file; see configs/")
    parser.add_argument("--run", metavar="NAME", help="the run's name (default: the config's `run`)")
    parser.add_argument(
        "--store", default="runs", metavar="URL", help="a folder, or s3://BUCKET/PREFIX (default: the folder runs)"
    )
    parser.add_argument(
        "--teacher", metavar="ADDRESS", help="in the place of the config's teacher.path; s3://...: a published one"
    )
    parser.add_argument("--adopt", metavar="RUN", help="copy this stage's result from that run of the same store")
    return parser.parse_args(arguments)


def execute(stage: str, config_path: str, run: str | None, store: str, teacher: str | None, adopt: str | None) -> None:
    """Run one stage, or find it sealed. Raises what EXIT names."""
    began = time.monotonic()
    config = resolve_teacher(load_config(config_path), teacher, lambda here: stop_if_asked())
    artifact = Artifact(store, config.run if run is None else run, stage)
    processes, first = ranks.count_processes(config, stage), not ranks.own_rank()
    asked = identity(config, stage)
    if adopt is not None and first and artifact.record() is None:
        adopt_stage(artifact, adopt, asked, fingerprint_inputs(config, stage, store, artifact.run))
        print(f"{stage}: the same as that of {adopt}, copied to {artifact.address}")
        return
    record = (
        artifact.claim(asked, fingerprint_inputs(config, stage, store, artifact.run)) if first else artifact.record()
    )
    if record is not None:
        if first:
            print(f"{stage}: sealed already at {artifact.address}")
        return

    stop_if_asked()
    if processes:
        arguments = [stage, "--config", config_path, "--run", artifact.run, "--store", store]
        arguments += ["--teacher", config.teacher.path] if teacher is not None else []
        sys.exit(ranks.run_ranks(processes, arguments, asked_to_stop))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it tells of torchvision, which nothing here needs
    from stages.runtime.progress import Progress

    module = importlib.import_module(f"stages.{stage}")  # brings torch
    from stages.reports.provenance import teacher_name
    from stages.runtime.device import pick_device

    stop_if_asked()
    ranks.join_ranks(pick_device(config))
    work = artifact.workspace()
    out = work / "out"
    out.mkdir()
    context = Context(
        config=config,
        artifact=artifact,
        out=out,
        cache=work / "inputs",
        progress=Progress(stage, shown=first),
        stop=lambda: bool(asked_to_stop),
    )
    facts = module.run(context)
    if not first:
        return
    seconds = time.monotonic() - began
    provenance = Provenance(
        code=code_versions(),
        device=pick_device(config),
        duration_s=round(seconds, 3),
        cost=process_cost(),
        teacher=teacher_name(config.teacher.path),
        processes=None if ranks.own_rank() is None else int(os.environ["WORLD_SIZE"]),
    )
    artifact.seal(out, facts=facts, provenance=provenance)
    print(f"{stage}: sealed at {artifact.address} after {seconds:.1f} s")


def stop_if_asked() -> None:
    if asked_to_stop:
        raise Stopped("told to stop before it began; repeat the command to begin")


def code_versions() -> dict[str, str]:
    """Versions of what made the result, and a digest of our own sources, which may differ from the version's."""
    root = Path(__file__).parent.parent
    files = sorted(path for package in ("dmdr", "stages") for path in (root / package).rglob("*.py"))
    sources = {path.relative_to(root).as_posix(): digest(path).sha256 for path in files}
    names = ("torch", "diffusers", "transformers", "peft", "safetensors")
    versions = {name: metadata.version(name) for name in names}
    return {"version": metadata.version("dmdr"), "sources": fingerprint(sources), **versions}


def process_cost() -> Cost:
    """Of this attempt: seconds of CPU, and the most memory it held, in MiB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Cost(cpu_s=round(time.process_time(), 3), peak_memory_mib=round(most / 2**20, 1))


def main(arguments: list[str]) -> int:
    """The exit code; a user's error is one line on stderr, a traceback is only for ours."""
    asked = parse(arguments)
    try:
        execute(asked.stage, asked.config, asked.run, asked.store, asked.teacher, asked.adopt)
    except tuple(EXIT) as error:
        report_error(asked.stage, error)
        return next(exit_code for kind, exit_code in EXIT.items() if isinstance(error, kind))
    except Exception as error:
        full_disk = isinstance(error, OSError) and error.errno in DISK
        if full_disk or "(os error 28)" in f"{error}":  # the second is how safetensors says it
            report_error(asked.stage, f"cannot write: {error}; free some space, then repeat the command")
            return IO
        traceback.print_exc()
        return INTERNAL
    return 0


def report_error(stage: str, message: object) -> None:
    if ranks.own_rank():
        if isinstance(message, (ConfigError, NonFinite, Stopped)) and not isinstance(message, Refused):
            return  # all ranks meet these; the first tells
        stage = f"{stage}, rank {ranks.own_rank()}"
    print(f"{stage}: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
