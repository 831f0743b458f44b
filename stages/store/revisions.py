"""List the revisions of teachers that a run can start from: published below a prefix, or on a model hub.

On a hub, each commit that a branch or a tag points at is a revision. Its name is a digest of the teacher's files, so a
commit that changes only a README is no new revision.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dmdr.config.identity import fingerprint
from dmdr.errors import ConfigError, InputMissing
from dmdr.teacher import hub
from dmdr.teacher.load import PIPELINE_FILES
from stages.store.address import SHORT_DIGEST
from stages.store.published_teachers import Revision, list_published

REPOSITORY = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)")
# Files that do not count. A change of this list would make every teacher a new one, and start runs anew.
OTHER_FORMS = ("*.fp16.*", "*/*.non_ema.*", "*/flax_*", "*/openvino_*")
LONGEST = 54  # letters of a run's name before the digest at its end
DIGITS = 8  # of that digest


def list_revisions(where: str) -> Sequence[Revision]:
    """List every revision below a prefix, or of hub:OWNER/NAME.

    Raises:
        ConfigError: the address is neither.
        InputMissing: the hub does not answer, or has no such model.
        StoreError: the store fails.
    """
    return _list_hub_revisions(where) if hub.is_hub(where) else list_published(where)


def run_name(config: str, revision: Revision) -> str:
    """The name of the run that distils a revision. config: the run's name in the config.

    Joined names can be equal although their parts differ; the digest of the parts at the end still tells them apart.
    """
    parts = [config, revision.name, revision.revision]
    return f"{'-'.join(parts)[:LONGEST]}-{fingerprint(parts)[:DIGITS]}"


def _list_hub_revisions(address: str) -> list[Revision]:
    match = REPOSITORY.fullmatch(address)
    if match is None:
        raise ConfigError(
            f"teachers {address} is not hub:OWNER/NAME; give a model of a hub without a commit, or a prefix"
        )
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    repo, api = match["repo"], HfApi()
    revisions: dict[str, Revision] = {}
    name = re.sub("[^a-z0-9._-]", "-", repo.lower().replace("/", "-")).lstrip("._-")
    try:
        refs = api.list_repo_refs(repo)
        for commit in dict.fromkeys(ref.target_commit for ref in [*refs.tags, *refs.branches]):
            files = api.model_info(repo, revision=commit, files_metadata=True).siblings or []
            blobs = {file.rfilename: file.blob_id for file in files}
            read = filter_repo_objects(blobs, allow_patterns=list(PIPELINE_FILES), ignore_patterns=list(OTHER_FORMS))
            pipeline_files = {file: blobs[file] for file in read}
            revision = fingerprint(pipeline_files)[:SHORT_DIGEST]
            if "model_index.json" in pipeline_files:
                revisions.setdefault(revision, Revision(name, revision, f"hub:{repo}@{commit}", ()))
    except Exception as error:  # of the hub, of its HTTP library, of the network
        raise InputMissing(
            f"teachers {address} cannot be listed ({hub.shorten(error)}); check the name and the network, and set "
            "HF_TOKEN if the model is gated"
        ) from error
    return list(revisions.values())
