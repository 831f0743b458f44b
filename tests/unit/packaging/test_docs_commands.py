"""The commands and configs of the documents: all are read by the programs that they name; the cheap ones are run.

A block of commands that needs more than a laptop and seconds says so in the line before it: <!-- needs: a GPU -->.
Every `dmdr` command of any other block is run here, in a folder with one small finished run.
"""

from __future__ import annotations

import copy
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml
from typer.core import TyperGroup

from dmdr.config.load import read_mapping, validate
from dmdr.config.run import Config
from dmdr.config.stages import STAGES
from dmdr.errors import USER_ERRORS
from flows import cli
from stages.runtime import command_line
from stages.store.artifacts import Artifact
from tests.support.sealing import PROVENANCE

ROOT = Path(__file__).parents[3]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    *(str(each.relative_to(ROOT)) for each in sorted(ROOT.glob("docs/**/*.md"))),
)
NEEDS = ("minutes", "a GPU", "a cluster", "a bucket", "a container builder", "a Prefect server", "the network")
BLOCK = re.compile(r"(?m)(?:^<!-- needs: (?P<needs>[\w ]+) -->\n)?^```(?P<kind>\w*)\n(?P<text>(?s:.*?))^```$")
INLINE = re.compile(r"`(dmdr [^`]+)`")
BASES = {"docs/healthy-run.md": "configs/quickstart.yaml"}  # document -> the config that its pieces are part of
OTHERS = {"make", "python", "prefect", "kubectl", "cp", "export", "$EDITOR", "pre-commit"}


@dataclass(frozen=True)
class Command:
    """A command of a document. needs: what its block says that it needs; None: nothing."""

    document: str
    words: tuple[str, ...]
    needs: str | None

    def __str__(self) -> str:
        return f"{self.document}: {shlex.join(self.words)}"


def list_commands() -> list[Command]:
    """Every command of every block; a pipeline is several."""
    found = []
    for document in DOCUMENTS:
        for block in BLOCK.finditer((ROOT / document).read_text(encoding="utf-8")):
            if block["kind"] == "sh":
                lines = block["text"].replace("\\\n", " ").splitlines()
                found += [Command(document, words, block["needs"]) for line in lines for words in split_line(line)]
    return found


def split_line(line: str) -> list[tuple[str, ...]]:
    """The commands of a line, without comments and the variables that are set before them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&;"):
            commands.append([])
        elif word == ">":
            break
        elif commands[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):
            commands[-1].append(word)
    return [tuple(words) for words in commands if words]


COMMANDS = list_commands()
OF_DMDR = [each for each in COMMANDS if each.words[0] == "dmdr"]


def parse(words: tuple[str, ...]) -> None:
    """Read a command line of dmdr with the program's own parser, without running it."""
    command = typer.main.get_command(cli.app)
    arguments = list(words[1:])
    if arguments[0] == "tables":
        arguments = cli.repeat_seeds(arguments)
    while isinstance(command, TyperGroup):
        assert arguments and arguments[0] in command.commands, shlex.join(words)
        command = command.commands[arguments.pop(0)]
    if words[1] == "stage":
        command = typer.main.get_command(command_line._app)
    command.make_context(shlex.join(words), arguments)


@pytest.mark.parametrize("command", OF_DMDR, ids=str)
def test_dmdr_reads_its_commands(command: Command):
    parse(command.words)


def test_dmdr_reads_the_commands_in_sentences():
    """`dmdr run CONFIG` in a sentence has all that the command needs, unless it is only its name."""
    for document in DOCUMENTS:
        for text in INLINE.findall((ROOT / document).read_text(encoding="utf-8")):
            words = tuple(shlex.split(text))
            if len(words) == 2 or "..." in text or any(word.isupper() for word in words):
                continue  # a name, or a command with gaps
            parse(words)


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.words[0] != "dmdr"], ids=str)
def test_other_programs_are_given_what_exists(command: Command):
    program, *arguments = command.words
    assert program in OTHERS or program.startswith(".venv/bin/"), (
        f"{program} is new in the documents; say how to check it"
    )
    for word in arguments:
        if re.match(r"(configs|k8s|images|tests|docs)/", word):
            assert (ROOT / word).exists(), word
    if arguments[:2] == ["deployment", "run"]:
        entries = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
        assert arguments[2].split("/")[1] in {each["name"] for each in entries}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_block_is_cheap_or_says_what_it_needs(command: Command):
    assert command.needs is None or command.needs in NEEDS
    if command.needs is None and command.document not in ("CONTRIBUTING.md",):
        assert command.words[0] == "dmdr", "mark the block with <!-- needs: ... -->"


@pytest.fixture
def finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder has the configs and, in runs/, a small sealed run "quickstart"; and a reward of one's own."""
    for stage in STAGES:
        made = tmp_path / "made" / stage
        (made / "pipeline").mkdir(parents=True)
        (made / "pipeline" / "model_index.json").write_text("{}")
        artifact = Artifact(str(tmp_path / "runs"), "quickstart", stage)
        artifact.claim({"seed": 1}, {"teacher": "0" * 64})
        artifact.seal(made, facts={}, provenance=PROVENANCE)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copy(ROOT / "dmdr/rewards/template.py", tmp_path / "my_rewards.py")  # as dmdr init reward writes it
    monkeypatch.chdir(tmp_path)
    return tmp_path


CHEAP: dict[str, list[tuple[str, ...]]] = {}
for _each in OF_DMDR:
    if _each.needs is None and _each.words not in CHEAP.setdefault(_each.document, []):
        CHEAP[_each.document].append(_each.words)


@pytest.mark.parametrize("document", [document for document, commands in CHEAP.items() if commands])
def test_cheap_commands_work(document: str, finished_run: Path):
    """All cheap commands of a page, in its order."""
    for words in CHEAP[document]:
        assert cli.main(list(words[1:])) == 0, shlex.join(words)


def list_yaml() -> list[tuple[str, str]]:
    return [
        (document, block["text"])
        for document in DOCUMENTS
        for block in BLOCK.finditer((ROOT / document).read_text(encoding="utf-8"))
        if block["kind"] == "yaml"
    ]


def merge(base: dict[str, object], part: dict[str, object]) -> dict[str, object]:
    """`part` over `base`, key by key."""
    merged = copy.deepcopy(base)
    for key, value in part.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


@pytest.mark.parametrize(("document", "text"), list_yaml())
def test_a_block_of_yaml_is_part_of_a_config(document: str, text: str):
    part = yaml.safe_load(text.replace("sha256:...", f"sha256:{'0' * 64}"))
    base = "configs/lab-flow.yaml" if "lab-" in text else BASES.get(document, "configs/sdxl.yaml")
    try:
        validate(merge(read_mapping(ROOT / base, "config", ""), part), Config, document)
    except USER_ERRORS as error:
        pytest.fail(str(error))
