"""The labels and annotations of our Kubernetes objects, by which they are found and told apart."""

from __future__ import annotations

import re

PREFIX = "dmdr.dev"
# Labels
RUN, STAGE, TEACHER = f"{PREFIX}/run", f"{PREFIX}/stage", f"{PREFIX}/teacher"
ATTEMPT, FLOW_RUN = f"{PREFIX}/attempt", f"{PREFIX}/flow-run"
# Annotations. RUN is one too: a label may have to shorten the name of a run, the annotation never does.
STORE, IDENTITY, CONFIG = f"{PREFIX}/store", f"{PREFIX}/identity", f"{PREFIX}/config"
WAITS = f"flow-run.{PREFIX}/"  # and the id of a flow run that waits for a Job
# keep the nodes of a stage in one domain, such as a rack, that their value, a label of nodes, tells apart
ONE_DOMAIN_BY_KUEUE = "kueue.x-k8s.io/podset-required-topology"
ONE_DOMAIN_BY_JOBSET = "alpha.jobset.sigs.k8s.io/exclusive-topology"
NODE = "batch.kubernetes.io/job-completion-index"  # which node of several a pod is; Kubernetes' own


def to_label(text: str) -> str:
    """A label's value: letters, digits and . _ - with a letter or digit at both ends, at most 63 of them."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)[:63].strip("._-")
