"""Derive the lock of each image from pyproject.toml and requirements.lock: python images/lock.py [--check]

An image holds the dependencies of the project but those that its programs never import, and all that they need in turn.
The versions and hashes are those of requirements.lock. The script reads from the installed packages what each one
needs, so run it in the .venv that `make setup` makes. tests/unit/packaging/test_images.py compares the locks with this
script's result, and flow.lock with what flows import.

`make lock` calls it with --split FOLDER first: what only a CUDA build of torch needs moves to cuda.lock, and the hash
of the CPU build, which lies elsewhere, joins those of torch.
"""

from __future__ import annotations

import hashlib
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from needs_cuda import FROM_TORCH
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
METHOD = {  # what only dmdr imports
    "accelerate",
    "diffusers",
    "lpips",
    "open-clip-torch",
    "peft",
    "pillow",
    "pyarrow",
    "safetensors",
    "scipy",
    "tokenizers",
    "torch",
    "torchvision",
    "transformers",
}
# What only Prefect's server imports. The server is another image; a worker talks to it over HTTP.
SERVER = {"aiosqlite", "alembic", "apprise", "asyncpg", "cryptography", "docker", "pydocket", "sqlalchemy"}
DOWNLOADS = {"hf-xet"}  # fetches large files from a model hub; flows only list what is there
WITHOUT = {"flow": METHOD | SERVER | DOWNLOADS, "stages": {"kubernetes", "prefect"}}
ALSO = {
    "flow": {"huggingface-hub"},  # for dmdr/teacher/hub.py; in the other image diffusers needs it
    "stages": {
        "bitsandbytes",  # for kind: 8bit and frozen_base: nf4
        "model-signing",  # for execution.signing_key
        "pyopenssl",
    },
}
ENTRY = re.compile(r"^([A-Za-z0-9][\w.-]*)==.*(?:\n +--hash=.*)*\n", re.MULTILINE)  # a package with its hashes
HASH = re.compile(r"--hash=\S+")
PLATFORM = default_environment() | {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": "3.11.0",
    "python_version": "3.11",
    "sys_platform": "linux",
}


def derive_lock(image: str) -> str:
    """The text of an image's lock.

    Raises:
        ValueError: a package that the image needs is not in requirements.lock.
    """
    locked = read_lock(ROOT / "requirements.lock")
    needed = {name for name in _list_needed(image) if not FROM_TORCH.match(name)}
    if missing := needed - locked.keys():
        raise ValueError(f"image {image} needs {', '.join(sorted(missing))}, not in requirements.lock; run `make lock`")
    return "".join(locked[name] for name in sorted(needed))


def read_lock(path: Path) -> dict[str, str]:
    """The entries of a lock: name -> its lines."""
    return {canonicalize_name(entry[1]): entry[0] for entry in ENTRY.finditer(path.read_text(encoding="utf-8"))}


def split_lock(cpu_builds: Path) -> None:
    """Move what a CUDA build of torch needs from requirements.lock to cuda.lock, and add the hashes of the CPU build.

    cpu_builds: a folder with wheels of that build; none: torch has the hashes of the default index only.
    """
    path = ROOT / "requirements.lock"
    locked = read_lock(path)
    wheels = [hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in cpu_builds.glob("torch-*.whl")]
    hashes = sorted({*HASH.findall(locked["torch"]), *(f"--hash=sha256:{wheel}" for wheel in wheels)})
    locked["torch"] = " \\\n    ".join([locked["torch"].partition(" ")[0], *hashes]) + "\n"
    from_torch = {name: entry for name, entry in locked.items() if FROM_TORCH.match(name)}
    (ROOT / "images" / "cuda.lock").write_text("".join(from_torch.values()), encoding="utf-8")
    path.write_text("".join(entry for name, entry in locked.items() if name not in from_torch), encoding="utf-8")


def _list_needed(image: str) -> set[str]:
    """The names of the project's dependencies and of all that they need, but for WITHOUT and what only that needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting = [Requirement(text) for text in (*project["dependencies"], *ALSO[image])]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} if name not in WITHOUT[image] else ():
            if (name, extra) not in seen:
                seen.add((name, extra))
                waiting += _read_requirements(name, extra)
    return {name for name, _ in seen}


def _read_requirements(name: str, extra: str) -> list[Requirement]:
    """What an installed package needs on the images' platform; nothing if it is not installed here."""
    try:
        declared = [Requirement(text) for text in metadata.requires(name) or ()]
    except metadata.PackageNotFoundError:
        return []
    return [each for each in declared if each.marker is None or each.marker.evaluate({**PLATFORM, "extra": extra})]


def main(arguments: list[str]) -> int:
    """Write the locks, or with --check print which ones differ; 1 if one does."""
    if arguments[:1] == ["--split"]:
        split_lock(Path(arguments[1]))
        return 0
    stale = False
    for image in WITHOUT:
        path, text = ROOT / "images" / f"{image}.lock", derive_lock(image)
        if arguments == ["--check"] and (not path.exists() or path.read_text(encoding="utf-8") != text):
            print(f"{path.relative_to(ROOT)} does not follow from requirements.lock; run python images/lock.py")
            stale = True
        elif arguments != ["--check"]:
            path.write_text(text, encoding="utf-8")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
