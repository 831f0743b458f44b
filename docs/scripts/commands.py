"""docs/reference/commands.md: every command of `dmdr`, as its help has it."""

from __future__ import annotations

import contextlib
import io
import re

import typer
from typer.core import TyperGroup

from dmdr.errors import FINAL, MEANINGS
from flows import cli

WITH_OWN_HELP = {"stage": ["stage", "--help"], "lab": ["lab", "build", "--help"]}  # they hand all arguments on
HEAD = """\
# Commands

<!-- Written by `make reference` from the code of the commands. Do not edit. -->

`dmdr` lies in `.venv/bin`. `dmdr COMMAND --help` prints what stands here, and `dmdr --install-completion` teaches your
shell the commands and options.
"""


def build_commands_page() -> str:
    """The whole page as Markdown."""
    root = typer.main.get_command(cli.app)
    assert isinstance(root, TyperGroup)
    parts = [HEAD, *_describe_group(root, "dmdr"), _describe_exit_codes()]
    return "\n".join(parts)


def _describe_group(group: TyperGroup, path: str) -> list[str]:
    parts: list[str] = []
    for name, command in group.commands.items():
        words = f"{path} {name}"
        if isinstance(command, TyperGroup):
            parts += _describe_group(command, words)
        elif name in WITH_OWN_HELP:
            parts.append(f"## {' '.join(['dmdr', *WITH_OWN_HELP[name][:-1]])}\n\n```text\n{_print_help(name)}\n```\n")
        else:
            parts.append(_describe_command(command, words))
    return parts


def _describe_command(command: typer.core.TyperCommand, words: str) -> str:
    context = typer.Context(command, info_name=words)
    usage = command.get_usage(context).removeprefix("Usage: ")
    text = "\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n"))
    records = [record for each in command.params if (record := each.get_help_record(context))]
    rows = [
        f"| `{re.sub(' <.*>', '', name)}` | {_escape(' '.join(help.split()))} |"
        for name, help in records
        if "--help" not in name
    ]
    table = ["| argument, option | meaning |", "|---|---|", *rows, ""]
    return "\n".join([f"## {words}\n", f"{text}\n", f"```text\n{usage}\n```\n", *table])


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _print_help(name: str) -> str:
    """What the command itself prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main(WITH_OWN_HELP[name])
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def _describe_exit_codes() -> str:
    rows = [
        f"| {code} | {meaning} | {'' if code == 0 else 'never' if code in FINAL else 'yes'} |"
        for code, meaning in MEANINGS.items()
    ]
    table = "\n".join(["| code | meaning | retried |", "|---|---|---|", *rows])
    return f"## Exit codes\n\n{table}\n\n[What to do about each](../troubleshooting.md).\n"
