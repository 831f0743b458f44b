"""`dmdr init reward`, `dmdr check-reward`, `dmdr serve-reward`: a reward of one's own, from template to service."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import dmdr.rewards
from dmdr.config.prompt_record import PromptRecord
from dmdr.errors import StoreError
from dmdr.rewards.identity import identify_reward
from dmdr.rewards.named import find_named, parse_weights
from dmdr.rewards.wire import About
from flows.commands.check import Checklist

TEMPLATE = Path(dmdr.rewards.__file__).parent / "template.py"
SIDE, LAB_SIDE = 64, 32  # pixels of the images of a check
SAMPLES: tuple[PromptRecord, ...] = (  # with what any of our rewards asks for
    {"prompt": 'a sign that says "OPEN"', "tag": "single_object", "include": [{"class": "bench", "count": 1}]},
    {"prompt": 'a book with the title "MOON"', "tag": "single_object", "include": [{"class": "book", "count": 1}]},
)


def print_template() -> int:
    """Print a reward to begin with; returns 0."""
    print(TEMPLATE.read_text(encoding="utf-8"), end="")
    return 0


def check_reward(reward: str, *, weights: list[str], prompts: str | None, device: str) -> int:
    """Check a reward, a line for each check; returns the exit code of the first that failed, or 0.

    prompts: a file of them, or the name of a set or a list; None: a few that ship with this command.

    Raises:
        ConfigError, DataError, InputMissing: the prompts, or the reward's name, are none.
    """
    from dmdr.metrics.verifier import load_any_reward  # brings torch
    from dmdr.rewards.kit import RewardKit
    from dmdr.rewards.own import UserReward

    name, sources = find_named(reward, parse_weights(weights))
    checklist, kits = Checklist(), list[RewardKit]()

    def load() -> str:
        loaded = load_any_reward(name, device, sources)
        side = LAB_SIDE if name.startswith("lab-checker") else SIDE
        span = loaded.range if isinstance(loaded, UserReward) else None
        kits.append(RewardKit(loaded, read_prompts(name, prompts), (side, side), device, span))
        return f"{name}, {'with' if loaded.differentiable else 'without'} a gradient"

    checklist.run("load", load)
    for kit in kits:
        for check, run in kit.list_checks().items():
            checklist.run(check, run)
    return checklist.exit_code


def read_prompts(name: str, prompts: str | None) -> list[PromptRecord]:
    """The first prompts of a source, or some that the reward can score.

    Raises:
        ConfigError, DataError, InputMissing: they cannot be read.
    """
    if prompts is None and name.startswith("lab-checker"):
        from dmdr.lab.prompts import lab_prompts

        return list(lab_prompts("train")[:8])
    if prompts is None:
        return list(SAMPLES)
    from dmdr.config.inputs import Prompts
    from stages.prompt_sources.report import Tally
    from stages.prompt_sources.selection import select_records

    found = (record for _, record in select_records(Prompts(sources=(prompts,)), Tally(), lambda line: None))
    return [record for record, _ in zip(found, range(8), strict=False)]


def serve_reward(reward: str, *, weights: list[str], host: str, port: int, device: str) -> int:
    """Host a reward until a signal ends it; returns 0.

    Raises:
        ConfigError, DataError, InputMissing: there is no such reward, or it cannot be loaded.
        StoreError: the address is taken.
    """
    from dmdr.metrics.verifier import load_any_reward  # brings torch
    from dmdr.rewards.own import UserReward
    from dmdr.rewards.server import RewardServer

    name, sources = find_named(reward, parse_weights(weights))
    about = identify_reward(name, sources)
    loaded = load_any_reward(name, device, sources)
    if isinstance(loaded, UserReward):
        about = About(name=name, version=loaded.version or "own", digest=about.digest)
    try:
        server = RewardServer(loaded, about, host=host, port=port, device=device)
    except OSError as error:
        raise StoreError(f"cannot serve at {host}:{port} ({error}); give another --host or --port") from error
    with server:
        stop = threading.Thread(target=server.shutdown)  # which waits for the loop below to end
        signal.signal(signal.SIGTERM, lambda *_: stop.start() if stop.ident is None else None)
        place = f"http://{host}:{server.server_address[1]}"
        print(f"{about.name} {about.version}, digest {about.digest[:12]}, at {place}", flush=True)
        server.serve_forever(poll_interval=0.1)
    return 0
