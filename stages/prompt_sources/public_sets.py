"""The addresses of public prompt sets, which a config names as set:NAME. DMDR does not ship their text.

1. Every address is pinned to a commit, except ShareGPT-4o-Image, of which no commit is known here. Name a commit as
   set:sharegpt-4o-image@COMMIT, or put the file into prompts.folder.
2. Where a file could be fetched, its digest was computed from the file. HPDv2's digests come from one publication of
   them. Where `sha256` or `rows` is None, no exact value is known ("45K" is none) and nothing is checked; report.json
   holds the digests and counts that were read.
3. DrawBench comes from HPDv2's repository, where it is a file at a known commit. DrawBench's own is a spreadsheet.
4. DPG-Bench's prompts are in the table of its questions, which has one row for each question. Only the first row of
   each item_id is read. Its record keeps the item_id, by which the metric finds the questions, and no other column.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from dmdr.errors import ConfigError
from dmdr.teacher.hub import ADDRESS

SOURCE = re.compile(r"set:(?P<name>[^@]*)(?:@(?P<commit>.*))?")
RAW = "https://raw.githubusercontent.com/"
COMPBENCH = f"{RAW}Karine-Huang/T2I-CompBench/1b7094991a57f3c22abdd4f6e8ba6c1a15517073/examples/dataset/"
HPDV2 = "hub:zhwang/HPDv2@b9517430f34b1080d4f741118d2a440155a165cd/benchmark/"
SHAREGPT = "hub:FreedomIntelligence/ShareGPT-4o-Image@COMMIT/text_to_image.json"
UNPINNED = "@COMMIT/"


@dataclass(frozen=True)
class File:
    """One file of a set."""

    address: str  # https://..., or hub:OWNER/NAME@COMMIT/FILE of a dataset repository
    sha256: str | None = None  # None: unknown, so it is not checked
    metadata: Mapping[str, str] = field(default_factory=dict)  # added to the record of each of its prompts

    @property
    def name(self) -> str:
        return self.address.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class NamedSet:
    """A public set: its purpose, licence, size and files."""

    kind: Literal["training", "evaluation"]
    licence: str
    rows: int | None  # prompts, before duplicates are dropped; None: unknown, so it is not checked
    files: tuple[File, ...]
    column: str = "prompt"  # that holds the prompt, in tables and JSON
    item: str | None = None  # the column with the id of the prompt, where a prompt has several rows


def is_named(source: str) -> bool:
    return source.startswith("set:")


def find_set(source: str, table: Mapping[str, NamedSet]) -> NamedSet:
    """The set that set:NAME or set:NAME@COMMIT names. Raises ConfigError if there is none."""
    match = SOURCE.fullmatch(source)
    if match is None or match["name"] not in table:
        name = source.removeprefix("set:")
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean set:{near[0]}?" if near else f"there are {', '.join(table)}"
        raise ConfigError(f"prompt source {source} is not the name of a set; {hint}")
    named, commit = table[match["name"]], match["commit"]
    if commit is None:
        return named
    if not all(UNPINNED in file.address for file in named.files):
        raise ConfigError(f"prompt source {source}: set:{match['name']} is pinned already; take @{commit} out")
    files = tuple(replace(file, address=file.address.replace("@COMMIT", f"@{commit}")) for file in named.files)
    if not all(ADDRESS.fullmatch(file.address) for file in files):
        raise ConfigError(f"prompt source {source}: {commit} is not a commit; give all 40 hex digits")
    return replace(named, files=files)


TRAIN, VAL = "train", "val"
COMPBENCH_SHA256 = {
    ("color", VAL): "1634259756dbc77d13093d907d414480080ec9790a8c97ad09efaea7b2534f2d",
    ("shape", VAL): "37e1a276906c7ea9516cbd7ac8501be896006c0c17ca7344f260562834455bae",
    ("texture", VAL): "fbb5363515b4a28009e360afaaaf389d2dd2289e50dbb0c6ef4ea0c7fe4f3d4f",
    ("spatial", VAL): "8707a1d7e42ce3002d95363cf55f74bd043c843ae27108f5125aaaa7840ca988",
    ("3d_spatial", VAL): "c9953597315f36a5fcb41291bb19bdc6ab5f64a0fa760d691b4854a73f5d1fe9",
    ("non_spatial", VAL): "04c56cc9ac441dc9ea6c5157652058bd1635b5308526dd31bb29a1caab9a758d",
    ("numeracy", VAL): "dad8df141604b70ba7554bec724e3db0a80023680769b5c514854ea2d2527bbe",
    ("complex", VAL): "1b808018b8d9916db3d47d5aa2ef18377a3549a56901a474156f799824cdf3b4",
    ("color", TRAIN): "db5d3287027d453f8c977f0c7315f8a01a770f02f61fa54ae19406762982393f",
    ("shape", TRAIN): "451bdfccd330d4cf979d45664817be7959e89250b93d5c591cc562b858175a87",
    ("texture", TRAIN): "4846315c5972f9e9cc82e4833099e8ec2c28b999ca77269512715f3f56bde54f",
    ("spatial", TRAIN): "af14cdf2320057d98f94077e6211c2ddfaabfbb9e3842873657baabb17e00de6",
    ("3d_spatial", TRAIN): "0bba7e9ad31b0ce7908f6cbf2426a4b7ef6e8b841c1b737d0ad2d5b8e688dd93",
    ("non_spatial", TRAIN): "dbac5a9ec83204dcd0c3538a12d3212e2ce66db6f7ba45b49a1d869b2d3f2430",
    ("numeracy", TRAIN): "f66bb8708cb0be23c0406e14d892b25661b2b71e3e72abddc79c38466ab629c6",
    ("complex", TRAIN): "d214ac45cb3c5307dd14a144c8c69aa5ffdcc7be74ff71b5dac989f8ca9f924b",
}
HPDV2_SHA256 = {
    "anime": "6b38a479cc6f899866e9b7a8bf91f096b4afc6883b95275a61891327182b14ae",
    "concept-art": "530d057deafcb82c581e9d1be2ffcb98828fe99f0b54257414d2ab8a5cf2b83e",
    "paintings": "6570d39467e08b24b64e5b8a4177b0f61c525631121dc5a91fe2ab956eab4d5f",
    "photo": "92a3c9a0f743f66eb87bd112cdda830d6bdb4c073c86021d53b74001fcb18052",
}


def _compbench_files(split: str) -> dict[str, File]:
    return {
        category: File(f"{COMPBENCH}{category}_{of}.txt", digest, {"tag": category})
        for (category, of), digest in COMPBENCH_SHA256.items()
        if of == split
    }


SETS: Mapping[str, NamedSet] = {
    "geneval": NamedSet(
        "evaluation",
        "MIT",
        553,
        (
            File(
                f"{RAW}djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f/prompts/evaluation_metadata.jsonl",
                "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
            ),
        ),
    ),
    "dpg-bench": NamedSet(
        "evaluation",
        "Apache-2.0",
        1_065,
        (File(f"{RAW}TencentQQGYLab/ELLA/3c228f1dc6c4d3cad0a47493816151a419f14db3/dpg_bench/dpg_bench.csv"),),
        column="text",
        item="item_id",
    ),
    "parti": NamedSet(
        "evaluation",
        "Apache-2.0",
        1_632,
        (
            File(
                f"{RAW}google-research/parti/5a657978134374ce28973948331b319adef164bd/PartiPrompts.tsv",
                "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb",
            ),
        ),
        column="Prompt",
    ),
    "hpdv2": NamedSet(
        "evaluation",
        "none stated",
        3_200,
        tuple(File(f"{HPDV2}{style}.json", digest, {"style": style}) for style, digest in HPDV2_SHA256.items()),
    ),
    "drawbench": NamedSet("evaluation", "none stated", 200, (File(f"{HPDV2}drawbench.json"),)),
    "sharegpt-4o-image": NamedSet("training", "see its dataset card", None, (File(SHAREGPT),), column="input_prompt"),
    "t2i-compbench": NamedSet("evaluation", "MIT", 2_400, tuple(_compbench_files(VAL).values())),
    "t2i-compbench-train": NamedSet("training", "MIT", 5_600, tuple(_compbench_files(TRAIN).values())),
    **{
        f"t2i-compbench-{category}": NamedSet("evaluation", "MIT", 300, (file,))
        for category, file in _compbench_files(VAL).items()
    },
}
