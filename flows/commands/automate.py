"""`dmdr automate`: an automation of Prefect that sends events of runs to a notification block: mail, chat, webhook."""

from __future__ import annotations

from datetime import timedelta

from dmdr.config.notify import EVENTS
from dmdr.errors import ConfigError, InputMissing
from flows.prefect_support import connection

SUBJECT = "DMDR: {{ event.resource.name }}"
BODY = "{{ event.payload.text }}"


def create_automation(block: str, events: list[str]) -> int:
    """Create the automation, or change the one that sends to this block; returns 0. events: none for all.

    block: TYPE/NAME of a notification block, such as slack-webhook/team.

    Raises:
        ConfigError: no Prefect API is set, or it is no block or no event.
        InputMissing: the server has no such block.
        StoreError: it does not answer.
    """
    unknown = sorted(set(events).difference(EVENTS))
    if unknown:
        raise ConfigError(f"--event {unknown[0]} is none of {', '.join(EVENTS)}")
    kind, _, name = block.partition("/")
    if not kind or not name:
        raise ConfigError(f"block {block!r} is not TYPE/NAME of a notification block, such as slack-webhook/team")
    address = connection.find_server()
    if address is None:
        raise ConfigError(
            "no Prefect API is configured; set PREFECT_API_URL to that of your server, or tell people without one by "
            "execution.notify in a config"
        )
    connection.check_server(address)
    with connection.translate_errors(address):
        is_new = _save(kind, name, events or list(EVENTS))
    print(f"{'created' if is_new else 'changed'} the automation {_title(kind, name)}: {', '.join(events or EVENTS)}")
    return 0


def _title(kind: str, name: str) -> str:
    return f"dmdr to {kind}/{name}"


def _save(kind: str, name: str, events: list[str]) -> bool:
    """Whether it is a new one."""
    from prefect.client.orchestration import get_client
    from prefect.events import AutomationCore, EventTrigger
    from prefect.events.actions import SendNotification
    from prefect.events.schemas.automations import Posture
    from prefect.exceptions import ObjectNotFound

    client = get_client(sync_client=True)
    try:
        block = client.read_block_document_by_name(name, kind)
    except ObjectNotFound:
        raise InputMissing(
            f"Prefect has no block {kind}/{name}; make one on its page Blocks, or see prefect block ls"
        ) from None
    automation = AutomationCore(
        name=_title(kind, name),
        description="Events of DMDR's runs; made by dmdr automate.",
        trigger=EventTrigger(
            expect={f"dmdr.{event}" for event in events},
            match={"prefect.resource.id": "dmdr.run.*"},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[SendNotification(block_document_id=block.id, subject=SUBJECT, body=BODY)],
    )
    present = client.find_automation(automation.name)
    if present is None:
        client.create_automation(automation)
    else:
        client.update_automation(present.id, automation)
    return present is None
