"""`dmdr pull --to-hub`: uploads a pulled export to a model hub, with a card that names what lies there.

1. One form is the repository's root, so that `from_pretrained("OWNER/NAME")` loads it: the pipeline, or the only form.
   The others are its folders.
2. The card has the scorecard if the run is evaluated, and the licence that the hub knows of the teacher.
3. The token is the hub library's own: HF_TOKEN, or what its login has stored. A new repository is private.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dmdr.config.forms import FORMS, Form
from dmdr.errors import ConfigError, DataError, StoreError
from dmdr.metrics.scorecard import Figures
from dmdr.teacher.hub import ADDRESS
from stages.reports.card import read_figures
from stages.reports.export_facts import ExportFacts, LicenceFacts
from stages.reports.licence import parse_licence
from stages.reports.model_card import HubPlace, render_card
from stages.store.artifacts import Artifact

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REFUSED = (401, 403)  # statuses of a hub that will say the same again
CARD, IMAGES = "README.md", "images/"
SCORECARD = "scorecard.json"


def check_upload(repo: str, form: Form | None) -> None:
    """Check, before anything is fetched, what an upload needs.

    Raises:
        ConfigError: the repository's name cannot be one, there is no token, or the form cannot stand alone.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--to-hub {repo!r} is not OWNER/NAME: {_shorten(error)}") from error
    if repo.count("/") != 1:
        raise ConfigError(f"--to-hub {repo!r} is not OWNER/NAME; name your account or organisation before the /")
    if form == "single-file":
        raise ConfigError(
            "--to-hub with --form single-file: diffusers loads that file with the configuration of the pipeline; leave "
            "--form out, so that both are uploaded"
        )
    if get_token() is None:
        raise ConfigError("--to-hub needs a token of the hub; set HF_TOKEN, or log in with hf auth login")


def upload_export(folder: Path, artifact: Artifact, repo: str) -> str:
    """Upload the forms in a folder and return the repository's address.

    folder: what was pulled of the export `artifact`.

    Raises:
        ConfigError: the hub refuses the token.
        DataError: provenance.json or the scorecard is damaged.
        StoreError: the hub cannot be reached, or the upload failed; the same command again goes on.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    forms: list[Form] = [form for form in FORMS if (folder / form).is_dir()]
    place = HubPlace(repo, root="pipeline" if "pipeline" in forms else forms[0])
    api, scorecard = HfApi(), read_scores(artifact)
    facts = add_licence(read_facts(folder, forms), api)
    card = render_card(facts, place=place, scorecard=scorecard)
    files = {name: str(path) for name, path in lay_out(folder, forms, place.root).items()}
    operations = [CommitOperationAdd(CARD, card.encode()), *(CommitOperationAdd(*each) for each in files.items())]
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        api.create_commit(repo, operations, commit_message=f"{artifact.run}, exported by dmdr {facts.code['version']}")
    except Exception as error:  # of the hub's library, which has classes of its own and those of its HTTP client
        if isinstance(error, HfHubHTTPError) and error.response.status_code in REFUSED:
            raise ConfigError(f"the hub refuses to write {repo} ({_shorten(error)}); use a token that may") from error
        raise StoreError(
            f"{repo} was not uploaded ({_shorten(error)}); {folder} is whole, repeat the command to upload it"
        ) from error
    return f"{api.endpoint}/{repo}"


def read_facts(folder: Path, forms: list[Form]) -> ExportFacts:
    """The facts of an export, of these forms only.

    Raises:
        DataError: the file is not this DMDR's.
    """
    try:
        facts = ExportFacts.model_validate_json((folder / "provenance.json").read_bytes())
    except ValueError as error:
        raise DataError(f"{folder}/provenance.json is not of this DMDR; pull again into a new folder") from error
    parity = {form: value for form, value in facts.parity.items() if form in forms}
    return facts.model_copy(
        update={"parity": parity, "comfyui": tuple(form for form in facts.comfyui if form in forms)}
    )


def read_scores(export: Artifact) -> Figures | None:
    """The figures of the run's scorecard; None if it is not evaluated.

    Raises:
        DataError: the file is damaged.
    """
    artifact = Artifact(export.store, export.run, "evaluate")
    if artifact.record() is None:
        return None
    with tempfile.TemporaryDirectory() as cache:
        return read_figures(artifact.fetch(Path(cache), lambda name: name == SCORECARD), artifact.address)


def add_licence(facts: ExportFacts, api: HfApi) -> ExportFacts:
    """The facts with the licence that the hub's own card of the teacher names, where the teacher came from the hub."""
    pinned = ADDRESS.fullmatch(facts.teacher.name)
    if facts.licence is not None or pinned is None:
        return facts
    licence: LicenceFacts | None = None
    try:
        card = api.model_info(pinned["repo"], revision=pinned["commit"]).card_data
        licence = parse_licence(card.to_dict()) if card is not None else None
    except Exception as error:  # a gated teacher, or no network, which the upload will tell
        print(f"the licence of {pinned['repo']} is not known ({_shorten(error)}); the card names it as the teacher's")
    return facts.model_copy(update={"licence": licence})


def lay_out(folder: Path, forms: list[Form], root: str) -> dict[str, Path]:
    """Path in the repository -> file. The card is not among them, and its images stand once."""
    files = {"provenance.json": folder / "provenance.json"}
    for form in forms:
        for path in sorted(each for each in (folder / form).rglob("*") if each.is_file()):
            name = path.relative_to(folder / form).as_posix()
            if name == CARD or (name.startswith(IMAGES) and form != root):
                continue
            files[name if form == root else f"{form}/{name}"] = path
    return files


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
