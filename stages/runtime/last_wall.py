"""The last wall: whatever ends a stage or a command is one line on stderr, and its stack is in a file.

1. A user's error says what to do. So do a full disk, too little memory, a package that this image lacks, Ctrl-C.
2. Anything else is a fault of ours: the line says what was being done, and names the file that has the stack. The file
   lies in the folder for temporary files, for its owner only, without secrets. In a pod, which takes its files along,
   the end of the stack is also the pod's termination message: `kubectl describe pod` shows it.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dmdr.config.plain_text import escape, to_line
from dmdr.config.secrets import hide_secrets
from dmdr.errors import INTERNAL, USER_ERRORS, WHILE, InputMissing, Stopped, StoreError, exit_code_of

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
OURS = ("dmdr", "stages", "flows")  # the packages of this project
ROOT = Path(__file__).parents[2]
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cudaErrorMemoryAllocation")  # as torch says it
TERMINATION_MESSAGE = Path("/dev/termination-log")  # of a pod's container
MOST_BYTES = 4096  # of a termination message, says Kubernetes


@dataclass(frozen=True)
class End:
    """How a program ends. line: for stderr, without the program's name."""

    line: str
    exit_code: int


def end_program(program: str, error: BaseException) -> int:
    """Print the one line of an error on stderr; returns the exit code. program: the command or stage, for its start."""
    end = describe_end(error, program)
    print(f"{program}: {end.line}", file=sys.stderr, flush=True)
    return end.exit_code


def describe_end(error: BaseException, program: str) -> End:
    """The line and the exit code of an error. Writes the file with the stack of one that nobody foresaw."""
    during = _describe_work(error)
    if isinstance(error, USER_ERRORS):
        return End(to_line(error), exit_code_of(error))
    if isinstance(error, KeyboardInterrupt):
        return End("stopped by Ctrl-C; repeat the command to go on", Stopped.exit_code)
    if is_disk_failure(error):
        return End(f"cannot write: {to_line(error)}; free some space, then repeat the command", StoreError.exit_code)
    if (package := find_missing_package(error)) is not None:
        return End(
            f"{package} is not installed here (the image dmdr-flow has no torch and none of its libraries); use the "
            f"image dmdr-train, or the environment that ./setup.sh makes (pip install {package} adds the one package)",
            InputMissing.exit_code,
        )
    if is_out_of_memory(error):
        return End(
            f"out of memory{during}: {to_line(error, 300) or 'the machine has no more'}; dmdr plan CONFIG shows what "
            "is needed; a smaller execution.micro_batch_size or execution.gradient_checkpointing: all needs less",
            INTERNAL,
        )
    what = f"{type(error).__name__}: {to_line(error, 500)}".rstrip(": ")
    return End(f"a fault of DMDR{during}: {what}{_name_place(error)}; {_keep_stack(error, program)}", INTERNAL)


def is_disk_failure(error: BaseException) -> bool:
    """Whether the local disk is full or refuses to write."""
    if isinstance(error, OSError) and error.errno in DISK:
        return True
    return f"(os error {errno.ENOSPC})" in str(error)  # safetensors reports it so


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or a GPU has no more memory. Torch is not imported for that."""
    told = str(error) if type(error).__module__.startswith("torch") or type(error) is RuntimeError else ""
    return isinstance(error, MemoryError) or any(words in told for words in OUT_OF_MEMORY)


def find_missing_package(error: BaseException) -> str | None:
    """The package of others that an import did not find."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    package = error.name.partition(".")[0]
    return None if package in OURS else package


def _describe_work(error: BaseException) -> str:
    """What was being done, as `dmdr.errors.doing` has noted it, the outermost first."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(WHILE)]
    return ",".join(f" {to_line(note, 300)}" for note in reversed(notes))


def _name_place(error: BaseException) -> str:
    """The innermost line of this project that the error came through: " (dmdr/train.py:120)"."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and (own := path.relative_to(ROOT)).parts[0] in OURS:
            return f" ({own.as_posix()}:{frame.lineno})"
    return ""


def _keep_stack(error: BaseException, program: str) -> str:
    """Write the stack to a file of its owner only; returns the words that say where it is."""
    stack = hide_secrets(escape("".join(traceback.format_exception(error))))
    head = (
        f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}  {program}, process {os.getpid()}, Python {sys.version.split()[0]}\n"
    )
    with suppress(OSError):
        if TERMINATION_MESSAGE.is_file():
            TERMINATION_MESSAGE.write_bytes(stack.encode()[-MOST_BYTES:])
    name = "".join(letter if letter.isalnum() else "-" for letter in program)
    try:
        handle, path = tempfile.mkstemp(prefix=f"dmdr-{name}-", suffix=".log")  # mkstemp: mode 600
        with open(handle, "w", encoding="utf-8") as file:
            file.write(f"{head}\n{stack}")
    except OSError as refused:
        return f"its stack could not be written ({to_line(refused, 100)})"
    return f"its stack is in {path}"
