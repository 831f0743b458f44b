"""Derives each image's lock from pyproject.toml and requirements.lock: python images/lock.py [--check]

An image holds what the project depends on, less what its programs never import, and what that needs in turn, in the
versions of requirements.lock. What needs what is read from the installed packages, so it runs in the .venv of `make
setup`. tests/unit/packaging/test_images.py holds the files against it, and flow.lock against what flows import.
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
METHOD = {
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
# What of Prefect only its server imports; the server is another image. A worker talks to it over HTTP.
SERVER = {"aiosqlite", "alembic", "apprise", "asyncpg", "cryptography", "docker", "pydocket", "sqlalchemy"}
DOWNLOADS = {"hf-xet"}  # how large files come from a model hub; flows only look there
WITHOUT = {"flow": METHOD | SERVER | DOWNLOADS, "stages": {"kubernetes", "prefect"}}
ALSO = {"flow": {"huggingface-hub"}, "stages": set()}  # dmdr/teacher/hub.py; diffusers brings it elsewhere
TORCH_BRINGS = re.compile(r"cuda|nvidia|triton")  # in the versions that torch itself pins; see `make lock`
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


def derived(image: str) -> str:
    """The lock of an image, as text.

    Raises:
        ValueError: a package that the image needs is not in requirements.lock.
    """
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    locked = {canonicalize_name(line.partition("==")[0]): line for line in lines}
    needed = {name for name in _needed(image) if not TORCH_BRINGS.match(name)}
    if missing := needed - locked.keys():
        raise ValueError(f"image {image} needs {', '.join(sorted(missing))}, not in requirements.lock; run `make lock`")
    return "".join(f"{locked[name]}\n" for name in sorted(needed))


def _needed(image: str) -> set[str]:
    """Names of all packages, from the project's own dependencies down, without crossing WITHOUT."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting = [Requirement(text) for text in (*project["dependencies"], *ALSO[image])]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} if name not in WITHOUT[image] else ():
            if (name, extra) not in seen:
                seen.add((name, extra))
                waiting += _requirements(name, extra)
    return {name for name, _ in seen}


def _requirements(name: str, extra: str) -> list[Requirement]:
    """What an installed package needs on the images' platform; nothing of one that is installed elsewhere only."""
    try:
        declared = [Requirement(text) for text in metadata.requires(name) or ()]
    except metadata.PackageNotFoundError:
        return []
    return [each for each in declared if each.marker is None or each.marker.evaluate({**PLATFORM, "extra": extra})]


def main(arguments: list[str]) -> int:
    """Write the locks, or with --check say which differ; 1 if one does."""
    stale = False
    for image in WITHOUT:
        path, text = ROOT / "images" / f"{image}.lock", derived(image)
        if arguments == ["--check"] and (not path.exists() or path.read_text(encoding="utf-8") != text):
            print(f"{path.relative_to(ROOT)} is not what follows from requirements.lock; run python images/lock.py")
            stale = True
        elif arguments != ["--check"]:
            path.write_text(text, encoding="utf-8")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
