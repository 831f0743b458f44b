"""k8s/: every overlay renders, nothing is wrong with it, and it lets through and permits what it says and no more."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
import typer
import yaml
from prefect.cli._utilities import load_json_key_values

from dmdr.config.reward_weights import OF_REWARD
from dmdr.rewards.wire import ABOUT
from flows import cli
from tests.support.manifests import minors, problems, rendered, schema_problems

K8S = Path(__file__).parents[3] / "k8s"
OVERLAYS = ["one-node", "many-nodes", "dev"]

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which renders k8s/, is not installed"),
]


@cache
def build(folder: str) -> list[dict]:
    return rendered(K8S / folder)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_is_wrong_with_an_overlay(overlay: str):
    documents = build(f"overlays/{overlay}")
    assert problems(documents) == []
    for minor in minors():
        assert schema_problems(documents, minor) == []


def test_the_base_lacks_only_the_digests_of_images():
    assert {problem.split(" image ")[1] for problem in problems(build("base"))} == {
        "prefect-server is not named by digest",
        "dmdr-flow is not named by digest",
    }
    assert [schema_problems(build("base"), minor) for minor in minors()] == [[], [], []]


FOLLOW = ["create", "get", "list", "watch", "patch", "delete"]
RIGHTS = [
    {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": FOLLOW},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["get", "list"]},
]
MORE_RIGHTS = {"many-nodes": [{"apiGroups": ["jobset.x-k8s.io"], "resources": ["jobsets"], "verbs": FOLLOW}]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_flow_may_follow_its_jobs_and_nobody_may_do_anything_else(overlay: str):
    rights = {each["kind"]: each for each in build(f"overlays/{overlay}") if "rbac" in each["apiVersion"]}
    assert rights.keys() == {"Role", "RoleBinding"}
    assert rights["Role"]["rules"] == RIGHTS + MORE_RIGHTS.get(overlay, [])
    assert rights["RoleBinding"]["roleRef"]["name"] == rights["Role"]["metadata"]["name"]
    assert rights["RoleBinding"]["subjects"] == [{"kind": "ServiceAccount", "name": "dmdr-flow", "namespace": "dmdr"}]
    accounts = [each for each in build(f"overlays/{overlay}") if each["kind"] == "ServiceAccount"]
    assert {each["metadata"]["name"]: each["automountServiceAccountToken"] for each in accounts} == {
        "dmdr-flow": False,
        "dmdr-stage": False,
    }


def test_the_namespace_refuses_what_is_not_restricted():
    [namespace] = [each for each in build("base") if each["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def may(documents: list[dict], who: str, whom: str, port: int) -> bool:
    """Whether the policies let a connection through. whom: a component of ours, or an address elsewhere."""
    policies = [each["spec"] for each in documents if each["kind"] == "NetworkPolicy"]
    leaves = _passes(policies, who, "Egress", whom, port)
    return leaves and (whom[0] in "0123456789f" or _passes(policies, whom, "Ingress", who, port))


def _passes(policies: list[dict], one: str, way: str, other: str, port: int) -> bool:
    mine = [each for each in policies if way in each["policyTypes"] and _chosen(each["podSelector"], one)]
    rules = [rule for policy in mine for rule in policy.get(way.lower(), [])]
    ends = "to" if way == "Egress" else "from"
    return not mine or any(
        any(low["port"] <= port <= low.get("endPort", low["port"]) for low in rule["ports"])
        and any(_is_peer(peer, other) for peer in rule[ends])
        for rule in rules
    )


def _chosen(selector: dict, component: str) -> bool:
    wanted = selector.get("matchLabels", {}).get("app.kubernetes.io/component", component)
    return wanted == component and all(component in each["values"] for each in selector.get("matchExpressions", []))


def _is_peer(peer: dict, other: str) -> bool:
    if "ipBlock" not in peer:
        return "namespaceSelector" not in peer and _chosen(peer["podSelector"], other)
    if other[0] not in "0123456789f":
        return False
    address, block = ip_address(other), peer["ipBlock"]
    return address in ip_network(block["cidr"]) and not any(address in ip_network(e) for e in block.get("except", []))


@pytest.mark.parametrize(
    ("who", "whom", "port", "let"),
    [
        ("stage", "52.216.0.1", 443, True),  # the store, the model hub
        ("stage", "fd12::1", 443, True),
        ("worker", "52.216.0.1", 443, True),
        ("stage", "stage", 29500, True),
        ("stage", "stage", 45123, True),  # NCCL, Gloo
        ("worker", "server", 4200, True),
        ("worker", "10.0.0.1", 6443, True),  # the Kubernetes API
        ("server", "10.0.0.9", 5432, True),  # PostgreSQL
        ("stage", "169.254.20.10", 53, True),  # a node's DNS cache
        ("stage", "169.254.169.254", 80, False),  # a cloud's metadata, and in it the node's credentials
        ("stage", "169.254.169.254", 443, False),
        ("worker", "169.254.169.254", 443, False),
        ("worker", "169.254.169.254", 6443, False),
        ("stage", "fd00:ec2::254", 443, False),
        ("stage", "fe80::1", 443, False),
        ("server", "169.254.169.254", 5432, False),
        ("stage", "52.216.0.1", 80, False),
        ("stage", "10.0.0.1", 6443, False),
        ("stage", "server", 4200, False),
        ("stage", "worker", 29500, False),
        ("stage", "stage", 22, False),
        ("worker", "stage", 29500, False),
        ("server", "52.216.0.1", 443, False),
        ("server", "worker", 8080, False),
        ("stranger", "server", 4200, False),
        ("stranger", "52.216.0.1", 443, False),
    ],
)
def test_who_may_reach_whom(who: str, whom: str, port: int, let: bool):
    for overlay in OVERLAYS:
        assert may(build(f"overlays/{overlay}"), who, whom, port) is let


def test_only_stages_and_flows_reach_the_s3_server_of_a_trial():
    reach = {who: may(build("overlays/dev"), who, "s3", 5000) for who in ("stage", "worker", "server", "stranger")}
    assert reach == {"stage": True, "worker": True, "server": False, "stranger": False}
    assert not may(build("overlays/dev"), "s3", "52.216.0.1", 443)


def add_component(folder: Path, component: str) -> list[dict]:
    """A user's overlay: one node, and a component."""
    here = os.path.relpath(K8S, folder.resolve())
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"{here}/overlays/one-node"],
        "components": [f"{here}/components/{component}"],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    return rendered(folder)


@pytest.fixture(scope="module")
def with_component(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """A store that is not on 443."""
    return add_component(tmp_path_factory.mktemp("overlay"), "store-on-9000")


@pytest.fixture(scope="module")
def with_reward(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """A reward in a process of its own."""
    return add_component(tmp_path_factory.mktemp("overlay"), "reward-service")


def test_nothing_is_wrong_with_the_component(with_component: list[dict]):
    assert problems(with_component) == []
    for minor in minors():
        assert schema_problems(with_component, minor) == []


@pytest.mark.parametrize(
    ("who", "whom", "port", "let"),
    [
        ("stage", "10.0.0.7", 9000, True),
        ("worker", "10.0.0.7", 9000, True),
        ("stage", "fd12::1", 9000, True),
        ("stage", "52.216.0.1", 443, True),
        ("stage", "169.254.169.254", 9000, False),
        ("stage", "fd00:ec2::254", 9000, False),
        ("stage", "10.0.0.7", 9001, False),
        ("server", "10.0.0.7", 9000, False),
        ("stranger", "10.0.0.7", 9000, False),
    ],
)
def test_a_store_that_is_not_on_443_is_reached_with_the_component(with_component, who, whom, port, let):
    assert may(with_component, who, whom, port) is let
    assert port == 443 or not may(build("overlays/one-node"), who, whom, port)


def test_a_reward_is_asked_by_stages_alone(with_reward: list[dict]):
    assert problems(with_reward) == []
    for minor in minors():
        assert schema_problems(with_reward, minor) == []
    reach = {who: may(with_reward, who, "reward", 8000) for who in ("stage", "worker", "server", "stranger")}
    assert reach == {"stage": True, "worker": False, "server": False, "stranger": False}
    assert may(with_reward, "reward", "52.216.0.1", 443) and not may(with_reward, "reward", "169.254.169.254", 443)
    assert not may(build("overlays/one-node"), "stage", "reward", 8000)


def test_the_reward_of_the_component_is_one_that_dmdr_serves(with_reward: list[dict]):
    """Its command line is read by dmdr, and its probes ask what the service answers."""
    named = [each for each in with_reward if each["metadata"]["name"] == "reward"]
    [deployment] = [each for each in named if each["kind"] == "Deployment"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    command = typer.main.get_command(cli.app).commands["serve-reward"]
    assert container["command"] == ["dmdr", "serve-reward"]
    given = command.make_context("serve-reward", list(container["args"])).params
    assert given["reward"] in OF_REWARD and given["port"] == container["ports"][0]["containerPort"] == 8000
    probes = [container[f"{each}Probe"]["httpGet"]["path"] for each in ("startup", "liveness", "readiness")]
    assert probes == [ABOUT] * 3


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_says_how_a_run_is_started(overlay: str, tmp_path: Path):
    """Step 5, word for word: what `prefect deployment run` is given is the text of the config."""
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    head = (K8S / "overlays" / overlay / "kustomization.yaml").read_text()
    (tmp_path / "my-run.yaml").write_text('run: "mine"\nseed: 3\n')
    argument = re.search(r'-p (config="[^ ]+ -Rs [^"]+")', head)[1]
    given = subprocess.run(
        ["sh", "-c", f"printf %s {argument}"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert load_json_key_values([given.stdout], "parameter") == {"config": 'run: "mine"\nseed: 3\n'}


def settings(name: str) -> dict[str, str]:
    """The ConfigMap that kustomize made of a file, whatever it added to its name."""
    [found] = [each for each in build("base") if each["kind"] == "ConfigMap" and each["metadata"]["name"][:-11] == name]
    return found["data"]


def test_prefect_knows_every_setting_that_it_is_given():
    given = settings("prefect-server") | settings("prefect-client")
    taken = [name for each in build("base") for name in _taken_from_secrets(each)]
    given |= {name: "sqlite+aiosqlite:///none" if name.endswith("URL") else "name:password" for name in taken}
    given = {key: value for key, value in given.items() if key.startswith("PREFECT_")}
    command = [sys.executable, "-m", "prefect", "config", "view", "--hide-sources"]
    seen = subprocess.run(command, env=os.environ | given, check=True, capture_output=True, text=True).stdout
    assert given.keys() - {line.split("=")[0] for line in seen.splitlines()} == set()
    assert len({*taken}) == 3


def _taken_from_secrets(document: dict) -> list[str]:
    pod = document.get("spec", {}).get("template", {}).get("spec", {})
    boxes = pod.get("containers", []) + pod.get("initContainers", [])
    return [each["name"] for box in boxes for each in box["env"] if "secretKeyRef" in each.get("valueFrom", {})]


def test_a_flow_is_lost_after_three_heartbeats():
    from prefect.automations import Automation

    [lost] = yaml.safe_load(settings("prefect-automations")["lost-flows.yaml"])["automations"]
    wait = Automation.model_validate(lost).trigger.within.total_seconds()
    assert wait >= 3 * int(settings("prefect-client")["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
