"""`make image-test`: builds the images from a clean clone of HEAD and runs them. Minutes; needs root. The name keeps it
out of `make test`.

Where packages lie is for the builder to say: BUILD_FLAGS, PIP_INDEX_URL and so on as for `make images`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.images.containers import BASE, Image, appears, buildah, ended, make_base, own_storage, sizes, stop
from tests.support.prefect_server import answers, started

ROOT = Path(__file__).parents[2]
UPDATES = 6
LARGEST_FLOW = 400  # MB, the base among it
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # tiny tensors: more threads only get in each other's way


@pytest.fixture(scope="module")
def tag() -> str:
    """The tag of the three images, built from a clean clone of HEAD, on a Debian base."""
    own_storage(ROOT / "build" / "images")
    make_base()
    began, clone = time.monotonic(), ROOT / "build" / "images" / "clone"
    shutil.rmtree(clone, ignore_errors=True)
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    flags = f"--isolation=chroot --network=host {os.environ.get('BUILD_FLAGS', '')}"
    environment = os.environ | {"TAG": "test", "BASE_IMAGE": BASE, "BUILD_FLAGS": flags}
    subprocess.run(["make", "images"], cwd=clone, env=environment, check=True)
    print(f"images built in {time.monotonic() - began:.0f} s")
    return "test"


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """What the containers have as /scratch; theirs to write to."""
    folder = ROOT / "build" / "images" / "scratch"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def image(tag: str, scratch: Path) -> Iterator[Callable[[str], Image]]:
    made = {name: Image.of(f"localhost/dmdr-{name}:{tag}", scratch) for name in ("flow", "train", "evaluate")}
    yield made.__getitem__
    buildah("rm", "--all")


def test_sizes_and_labels(image: Callable[[str], Image], tag: str) -> None:
    found = sizes()
    for name, size in sorted(found.items()):
        print(f"{name}: {size:,.0f} MB")
    assert found[f"localhost/dmdr-flow:{tag}"] <= LARGEST_FLOW
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in ("flow", "train", "evaluate"):
        labels = image(name).config["Labels"]
        assert labels["org.opencontainers.image.title"] == f"dmdr-{name}"
        assert labels["org.opencontainers.image.revision"] == head.stdout.strip()


@pytest.mark.parametrize("name", ["flow", "train", "evaluate"])
def test_a_container_is_nobody_on_a_read_only_root(image: Callable[[str], Image], name: str) -> None:
    code = (
        "import os, tempfile, dmdr\n"
        "assert (os.getpid(), os.getuid(), os.getgid()) == (1, 10001, 10001)\n"
        "assert os.path.exists(dmdr.__cached__) and os.path.isdir('configs')\n"
        "assert tempfile.gettempdir() == os.path.expanduser('~') == '/scratch'\n"
        "for folder in ('/', '/app', '/opt/venv', '/tmp'):\n"
        "    try: open(f'{folder}/x', 'w')\n"
        "    except OSError as error: print(folder, error.strerror)\n"
        "    else: raise SystemExit(f'{folder} is writable')\n"
    )
    assert image(name).run("python", "-c", code, entry=False)[0] == 0


def test_the_training_image_compiles(image: Callable[[str], Image]) -> None:
    """What execution.compile checks, then a C++ kernel of torch's compiler."""
    code = (
        "import torch\n"
        "from dmdr.kernels.compiled_blocks import check_compiler\n"
        "check_compiler('cpu'); check_compiler('cuda') if torch.version.cuda else None\n"
        "x = torch.randn(64, 64)\n"
        "found = torch.compile(lambda x: (x * 2).sin().sum(0))(x)\n"
        "torch.testing.assert_close(found, (x * 2).sin().sum(0))\n"
    )
    assert image("train").run("python", "-c", code, entry=False, **ONE_THREAD)[0] == 0


def test_a_lab_stage_and_a_training_that_is_stopped(image: Callable[[str], Image], scratch: Path) -> None:
    config = yaml.safe_load((ROOT / "configs" / "lab-flow.yaml").read_text(encoding="utf-8"))
    config["cold_start"] |= {"updates": UPDATES, "batch_size": 4, "dynamic": {"updates": UPDATES}}
    config["execution"] = {"device": "cpu", "checkpoint_every": 1}
    (scratch / "short.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    rest = ("--config", "/scratch/short.yaml", "--store", "/scratch/runs")
    address = scratch / "runs" / config["run"]

    assert (
        image("train").run("prompts", "--config", "configs/lab-flow.yaml", "--store", "/scratch/runs", **ONE_THREAD)[0]
        == 0
    )
    assert (address / "prompts" / "record.json").is_file()

    container = image("train").start("cold_start", *rest, **ONE_THREAD)
    appears(container, address / "cold_start", "**/*.safetensors", within=600)
    stop(container)
    began = time.monotonic()
    code, said = ended(container, container.communicate()[0])
    print(f"ended {time.monotonic() - began:.1f} s after SIGTERM")
    assert code == 75 and "stopped after update" in said
    assert not (address / "cold_start" / "record.json").exists()

    code, said = image("train").run("cold_start", *rest, **ONE_THREAD)
    assert code == 0 and "continues from its checkpoint" in said
    assert (address / "cold_start" / "record.json").is_file()


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """A Prefect server outside of the containers; yields the address of its API, which they reach."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"PREFECT_HOME": str(folder / "server"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    process = started("server", "start", "--host", "127.0.0.1", "--port", port, "--no-ui", environment=environment)
    try:
        answers(f"http://127.0.0.1:{port}/api/health")
        yield f"http://127.0.0.1:{port}/api"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_all_stages_and_a_worker_that_finds_them_sealed(
    image: Callable[[str], Image], scratch: Path, tiny_config: Callable[..., Path], tiny_sd3_folder: Path
) -> None:
    """The flow image has no torch, but its worker runs the whole flow over what the other images have sealed."""
    written = tiny_config()
    config = yaml.safe_load(written.read_text(encoding="utf-8"))
    for name in ("train.txt", "held-out.txt"):
        shutil.copy(written.parent / name, scratch)
    shutil.copytree(tiny_sd3_folder, scratch / "teacher")
    config["teacher"]["path"] = "/scratch/teacher"
    config["prompts"] |= {"sources": ["/scratch/train.txt"], "evaluation": "/scratch/held-out.txt"}
    (scratch / "tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    subprocess.run(["chown", "-R", "10001:10001", scratch], check=True)
    for stage in ("prompts", "cold_start", "joint", "export", "evaluate"):
        which = "evaluate" if stage == "evaluate" else "train"
        rest = ("--config", "/scratch/tiny.yaml", "--store", "/scratch/runs")
        assert image(which).run(stage, *rest, **ONE_THREAD)[0] == 0, stage

    with server(scratch) as api:
        flow = image("flow")
        made = "prefect work-pool create local --type process --set-as-default && prefect --no-prompt deploy --all"
        assert flow.run("sh", "-c", made, PREFECT_API_URL=api)[0] == 0
        worker = flow.start(PREFECT_API_URL=api)
        run = ("-p", "config=/scratch/tiny.yaml", "-p", "store=/scratch/runs")
        code, said = flow.run("prefect", "deployment", "run", "dmdr/full", "--watch", *run, PREFECT_API_URL=api)
        stop(worker)
        left, logged = ended(worker, worker.communicate(timeout=120)[0])
    assert code == 0 and "Completed" in said
    assert left == 0 and logged.count("sealed already at") == 5
