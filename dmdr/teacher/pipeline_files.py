"""The files of a diffusers folder that make the pipeline: those that its index names, in the form that is read."""

from __future__ import annotations

from pathlib import Path

from dmdr.teacher.digests import list_files
from dmdr.teacher.json_file import read_object
from dmdr.teacher.weight_files import VARIANTS, variant_of

INDEX = "model_index.json"
READ = (".json", ".txt", ".model", ".jinja", ".safetensors")  # ends of names: what the libraries read, and a hub gives


def list_pipeline_files(folder: Path) -> list[Path]:
    """The index, and of each part that it names the configuration, the vocabulary and the weights that are read.

    A README, pictures, the weights in another form, and whatever else lies in such a folder say nothing of the model.

    Raises:
        DataError: the index is no JSON object.
        InputMissing: it, or a file of a part, cannot be read.
    """
    index = folder / INDEX
    named = read_object(index)
    files = [index]
    for part, entry in sorted(named.items()):
        place = folder / part
        if isinstance(entry, list) and entry != [None, None] and place.parent == folder and place.is_dir():
            files += _list_read(place)
    return sorted(files)


def _list_read(part: Path) -> list[Path]:
    """The files of one part that are read: the plain weights, or where there are none those of the first variant."""
    files = [file for file in list_files(part) if file.suffix in READ]
    variants = {variant_of(file.name) for file in files if file.suffix == ".safetensors"}
    used = next((variant for variant in (None, *VARIANTS) if variant in variants), None)
    return [file for file in files if ".safetensors" not in file.name or variant_of(file.name) == used]
