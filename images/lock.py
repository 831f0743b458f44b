"""Derive the lock of each image from pyproject.toml and requirements.lock: python images/lock.py [--check]

An image holds the dependencies of the project but those that its programs never import, and all that they need in turn.
The versions are those of requirements.lock. The script reads from the installed packages what each one needs, so run it
in the .venv that `make setup` makes. tests/unit/packaging/test_images.py compares the locks with this script's result,
and flow.lock with what flows import.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

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
    "stages": {"model-signing", "pyopenssl"},  # for execution.signing_key
}
FROM_TORCH = re.compile(r"cuda|nvidia|triton")  # torch pins their versions itself; see `make lock`
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
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    locked = {canonicalize_name(line.partition("==")[0]): line for line in lines}
    needed = {name for name in _list_needed(image) if not FROM_TORCH.match(name)}
    if missing := needed - locked.keys():
        raise ValueError(f"image {image} needs {', '.join(sorted(missing))}, not in requirements.lock; run `make lock`")
    return "".join(f"{locked[name]}\n" for name in sorted(needed))


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
