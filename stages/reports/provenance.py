"""Where a result comes from, read from the records of the run's stages; for the model card and the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dmdr.config.stages import STAGES
from stages.runtime.context import Context
from stages.store.artifacts import Artifact
from stages.store.records import Record


@dataclass(frozen=True)
class Origin:
    """What a report says about where its run comes from.

    teacher: its name. base: the same as the paper calls it, None where the paper has no such model. lines: names and
    values, as `build_table` gives them. settings: every setting that names the result.
    """

    teacher: str
    base: str | None
    lines: list[tuple[str, str]]
    settings: dict[str, object]


def read_records(context: Context) -> dict[str, Record]:
    """The records of the sealed stages of this run, in data order."""
    artifacts = {stage: Artifact(context.artifact.store, context.artifact.run, stage) for stage in STAGES}
    found = {stage: artifact.record() for stage, artifact in artifacts.items()}
    return {stage: record for stage, record in found.items() if record is not None}


def collect_settings(sealed: dict[str, Record], own: dict[str, object]) -> dict[str, object]:
    """Every setting that names the result: the identities of the sealed stages, and `own` of the one that runs."""
    return {name: value for record in sealed.values() for name, value in record.identity.items()} | own


def teacher_name(path: str) -> str:
    """A teacher by a name that means something elsewhere: lab:flow, hub:OWNER/NAME@COMMIT, or its folder's own name,
    which of a published one is NAME@REVISION."""
    if "://" in path:
        return "@".join(path.rstrip("/").split("/")[-2:])
    return path if path.startswith(("lab:", "hub:")) else Path(path).name


def describe_watch(facts: dict) -> str:
    """What the hacking alarm saw in joint training, and what followed from it."""
    raised = [
        f"{each['figure']} {each['now']:.4g} at update {each['update']}, from {each['was']:.4g} at {each['since']}"
        for each in facts["alarms"]
    ]
    chosen = f", chosen by {facts['reward']} on training prompts" if facts["export"] == "best" else ""
    ended = f"; stopped after update {facts['stopped']['after_update']}" if "stopped" in facts else ""
    return f"{'; '.join(raised) or 'silent'}{ended}; the student is the EMA of update {facts['exported']}{chosen}"


def build_table(context: Context) -> list[tuple[str, str]]:
    """Names and values for the report."""
    sealed, path = read_records(context), context.config.teacher.path
    prompts = ", ".join(f"{name} {count:,}" for name, count in sealed["prompts"].facts.items())
    rows = [
        ("run", context.artifact.run),
        ("teacher", f"{teacher_name(path)}, sha256 {sealed['prompts'].inputs['teacher']}"),
        ("prompts", prompts),
    ]
    for stage, record in sealed.items():
        how = record.provenance
        made = f"{how.duration_s:.1f} s on {how.device}, dmdr {how.code['version']}"
        rows.append((stage, f"{made}, fingerprint {record.fingerprint}"))
        watch = record.facts.get("watch")
        if isinstance(watch, dict):
            rows.append(("hacking alarm", describe_watch(watch)))
    latest = list(sealed.values())[-1].provenance.code
    libraries = {name: version for name, version in latest.items() if name not in ("version", "sources")}
    rows.append(("libraries", ", ".join(f"{name} {version}" for name, version in libraries.items())))
    return rows
