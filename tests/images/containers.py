"""A Debian base by debootstrap, the images on it, and containers of them, for a machine without a container runtime.

1. Images are built by buildah with chroot isolation, which needs root and nothing else.
2. `buildah run --isolation chroot` gives neither a process 1 nor a read-only root, and both are to be tested. So a
   container here is `unshare` and `chroot`: own process numbers and mounts, a read-only root, the user of the image.
3. Signals have their defaults, as a container runtime leaves them: a job in a shell's background ignores SIGINT, and
   a Prefect worker that inherits that never ends.
4. All lies below one folder. A base that is there already is used again, and so are layers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

BASE = "localhost/debian-python"
SUITE = "bookworm"
CONTAIN = """
set -eu
root=$1 scratch=$2 user=$3 folder=$4
shift 4
mount --bind "$scratch" "$root/scratch"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount -o remount,bind,ro "$root"
exec chroot --userspec="$user" "$root" env --chdir="$folder" --default-signal -- "$@"
"""


def buildah(*arguments: str | Path) -> str:
    done = subprocess.run(["buildah", *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def own_storage(folder: Path) -> None:
    """Let buildah, here and in `make images`, keep all it has below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "storage.conf"
    settings.write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/store"\nrunroot = "{folder}/run"\n', encoding="utf-8"
    )
    os.environ["CONTAINERS_STORAGE_CONF"] = str(settings)


def make_base() -> None:
    """Debian with python3 and venv as the image BASE, about as large as python:3.11-slim; nothing if it is there."""
    if any(f"{BASE}:latest" in image.get("names", ()) for image in json.loads(buildah("images", "--json") or "[]")):
        return
    with tempfile.TemporaryDirectory() as folder:
        packages = "--include=python3,python3-venv,ca-certificates"
        subprocess.run(["debootstrap", "--variant=minbase", packages, SUITE, folder], check=True)
        for pattern in (
            "var/cache/apt/archives/*.deb",
            "var/lib/apt/lists/*",
            "usr/share/doc/*",
            "usr/share/man/*",
            "usr/share/locale/*",
        ):
            subprocess.run(["rm", "-rf", *Path(folder).glob(pattern)], check=True)
        container = buildah("from", "scratch")
        buildah("add", "-q", container, folder, "/")
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        buildah("config", "--env", f"PATH={path}", container)
        buildah("commit", "-q", "--rm", container, BASE)


def sizes() -> dict[str, float]:
    """Megabytes (10**6 bytes) of each image, by its whole name, the base among it."""
    images = json.loads(buildah("images", "--json"))
    return {name: megabytes(image["size"]) for image in images for name in image.get("names") or ()}


def megabytes(said: str) -> float:
    """What buildah says of a size, such as "1.69 GB"."""
    number, unit = said.split()
    return float(number) * {"B": 1e-6, "KB": 1e-3, "MB": 1, "GB": 1e3}[unit]


@dataclass(frozen=True)
class Image:
    """A built image, with its files at `root`. scratch: the folder of this machine that is its /scratch."""

    config: dict
    root: str
    scratch: Path

    @classmethod
    def of(cls, name: str, scratch: Path) -> Image:
        described = json.loads(buildah("inspect", "--type", "image", name))
        return cls(described["OCIv1"]["config"], buildah("mount", buildah("from", name)), scratch)

    def start(self, *command: str, entry: bool = True, **environment: str) -> subprocess.Popen[str]:
        """Start a container; its output is one pipe. entry: after the image's entry point, else in its place."""
        words = [*(self.config.get("Entrypoint", []) if entry else []), *(command or self.config["Cmd"])]
        place = (self.root, str(self.scratch), self.config["User"], self.config["WorkingDir"])
        return subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", CONTAIN, "contain", *place, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=dict(each.split("=", 1) for each in self.config["Env"]) | environment,
        )

    def run(self, *command: str, entry: bool = True, **environment: str) -> tuple[int, str]:
        """(exit code, output) of a container."""
        container = self.start(*command, entry=entry, **environment)
        return ended(container, container.communicate()[0])


def ended(container: subprocess.Popen[str], said: str) -> tuple[int, str]:
    print(said, end="")
    return container.returncode, said


def stop(container: subprocess.Popen[str]) -> None:
    """SIGTERM to a container's process 1, as a kubelet sends it."""
    children = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)


def appears(container: subprocess.Popen[str], where: Path, pattern: str, within: float) -> None:
    """Wait until a file that fits a pattern is there, while the container runs."""
    deadline = time.monotonic() + within
    while not list(where.glob(pattern)):
        assert container.poll() is None, (
            f"ended before {pattern} was there: {ended(container, container.stdout.read())}"
        )
        assert time.monotonic() < deadline, f"no {pattern} after {within} s"
        time.sleep(0.2)
