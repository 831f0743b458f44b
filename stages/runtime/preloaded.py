"""Run `python -m MODULE` as a fork of an interpreter that has imported the heavy libraries already.

Importing torch, diffusers, transformers and peft takes seconds of CPU time, and every stage needs them. A host imports
them once and forks a process for each stage.
1. A forked program is a process like any other: it has its own group, signals, exit code, environment and folder.
2. It gets SIGTERM when the host dies, and the host when the process that started it dies. Only Linux does so, and only
   there are these libraries safe to fork: elsewhere `start_host` returns None.
3. The host computes nothing, so it has no threads and has not touched a GPU when it forks. If a library did so while it
   was imported, CUDA would not work in a fork: the fork then starts a fresh interpreter in its own place.
4. What a library reads from the environment while it is imported, it reads from the host's.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from stages.runtime.last_wall import end_program
from stages.runtime.parent_death import die_with_parent

LARGEST = 2**20  # bytes of a request, most of which is the environment
_is_preloaded = False  # whether this process is a host, or a fork of one


class HostDied(ChildProcessError):
    """The host is gone, and the programs that it forked were told to stop."""


class Program:
    """A program that a host forked, with the methods of a Popen."""

    def __init__(self, host: Host, pid: int) -> None:
        self.host, self.pid = host, pid

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; returns its exit code, -n if signal n ended it.

        Raises:
            HostDied: the host ended before the program did.
            TimeoutError: it still runs after `timeout` seconds.
        """
        return self.host.wait(self.pid, timeout)

    def terminate(self) -> None:
        """Send it SIGTERM, if it still runs."""
        self.host.signal(self.pid, signal.SIGTERM)


class Host:
    """The interpreter that forks, as seen by the process that started it. Not for several threads at once."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGEST)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stages.runtime.host", str(theirs.fileno()), *modules],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                preexec_fn=die_with_parent(),
            )
        self._exit_codes: dict[int, int] = {}

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        files: tuple[int, int, int],
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> Program:
        """Fork `python -m module arguments`.

        files: the descriptors of its stdin, stdout and stderr. environment, folder: those of this process if None.

        Raises:
            HostDied: the host ended before it could fork.
        """
        variables = os.environ if environment is None else environment
        request = {
            "module": module,
            "arguments": list(arguments),
            "environment": dict(variables),
            "folder": str(folder or Path.cwd()),
        }
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], files)
        except BrokenPipeError as error:
            raise HostDied("the host of the stages ended") from error
        while "started" not in (message := self._receive()):
            self._exit_codes[message["ended"]] = message["code"]
        return Program(self, message["started"])

    def wait(self, program: int, timeout: float | None = None) -> int:
        """As `Program.wait`, of the program with this process id."""
        self._socket.settimeout(timeout)
        try:
            while program not in self._exit_codes:
                message = self._receive()
                self._exit_codes[message["ended"]] = message["code"]
        finally:
            self._socket.settimeout(None)
        return self._exit_codes[program]

    def signal(self, program: int, number: signal.Signals) -> None:
        """Send a program a signal, unless its end is known."""
        if program not in self._exit_codes:
            with suppress(ProcessLookupError):
                os.kill(program, number)

    def close(self) -> None:
        """End the host. A program that still runs gets SIGTERM."""
        self._socket.close()
        self._process.wait()

    def _receive(self) -> dict[str, int]:
        try:
            message = self._socket.recv(LARGEST)
        except ConnectionResetError:
            message = b""
        if not message:
            raise HostDied("the host of the stages ended")
        return json.loads(message)


def start_host(modules: Sequence[str]) -> Host | None:
    """Start a host that imports `modules`; None on a system where forking them is not safe."""
    return Host(modules) if sys.platform == "linux" and hasattr(os, "pidfd_open") else None


def serve(connection: socket.socket) -> None:
    """Be a host: fork a process for each request and report how it ended, until nobody is left to ask."""
    global _is_preloaded
    _is_preloaded = True
    gc.freeze()  # so that a collection in a fork leaves the shared memory alone

    def leave() -> None:  # in the forked process
        for key in list(ready.get_map().values()):
            os.close(key.fd)
        connection.detach()
        ready.close()

    with selectors.DefaultSelector() as ready:
        ready.register(connection, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj is connection:
                    message, files, _, _ = socket.recv_fds(connection, LARGEST, 3)
                    if not message:
                        return
                    program = fork_module(**json.loads(message), files=files, leave=leave)
                    for file in files:
                        os.close(file)
                    ready.register(os.pidfd_open(program.pid), selectors.EVENT_READ, data=program)
                    _send(connection, {"started": program.pid})
                else:
                    assert isinstance(key.fileobj, int)
                    ready.unregister(key.fileobj)
                    os.close(key.fileobj)
                    _send(connection, {"ended": key.data.pid, "code": key.data.wait()})


def _send(connection: socket.socket, message: dict[str, int]) -> None:
    connection.send(json.dumps(message).encode())


class Fork:
    """A child of this process, with the methods of a Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, -n if signal n ended it; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        """Wait for its end; returns its exit code."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, sig: int) -> None:
        """Send it a signal, unless its end is known."""
        if self.poll() is None:
            os.kill(self.pid, sig)


def is_ready_to_fork() -> bool:
    """Whether this process is a fork of a host, or a host, and has started no thread, which a fork would lose."""
    return _is_preloaded and threading.active_count() == 1


def fork_module(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    folder: str | None = None,
    files: Sequence[int] = (),
    leave: Callable[[], None] = lambda: None,
    parent_dies: signal.Signals = signal.SIGTERM,
) -> Fork:
    """Run `python -m module arguments` in a fork of this process, which does not return from here.

    files: become its stdin, stdout and stderr; without them it has ours, and reads nothing. leave: closes in the fork
    what belongs to this process. parent_dies: the signal that the fork gets when this process dies.
    """
    set_parent_signal = die_with_parent(parent_dies)
    assert set_parent_signal is not None, "only Linux forks here"
    pid = os.fork()
    if pid:
        return Fork(pid)
    leave()
    set_parent_signal()
    if files:
        os.setpgid(0, 0)
    else:
        files = [os.open(os.devnull, os.O_RDONLY)]
    for place, file in enumerate(files):
        os.dup2(file, place)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    if folder is not None:
        os.chdir(folder)
        sys.path[0] = folder
    _run_and_exit(module, arguments)


def _run_and_exit(module: str, arguments: Sequence[str]) -> NoReturn:
    """Run a module as the program of this process, and end it without taking the interpreter down: that would touch,
    and so copy, the whole memory that the fork shares, which takes seconds."""
    if _is_spoiled():
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
    code: object = 0
    try:
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException as error:  # of a module that does not end itself
        code = end_program(module, error)
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing ends its forks: wait for other threads,
    atexit._run_exitfuncs()  # delete temporary files,
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)


def _is_spoiled() -> bool:
    """Whether CUDA had been asked for something before the fork, so that it cannot be used after it."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda._is_in_bad_fork()
