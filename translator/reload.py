"""What of a configuration that was read again takes effect while the translator runs?

Maps, reverse maps, their health checks and registrations, rules, access rules and mobility do. What is new is made
first: names looked up, ports opened, prefixes listened on, rules put in. Only when all of that has succeeded is
given up what is no longer wanted, so a refusal leaves everything as it was. No connection notices: those of a map
that is gone live on until they end by themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from serval_core.access_policy import AccessPolicy
from serval_core.config_file import Misconfigured
from serval_core.configured_rules import replace_rules
from serval_core.descriptors import raise_descriptor_limit
from serval_core.stack import ServalStack
from translator.accounting import Admission, MapTraffic
from translator.config import Settings
from translator.descriptors import connection_limit
from translator.legacy_side import LegacyAcceptor
from translator.serval_side import ReverseSide
from translator.targets import TargetSet, resolve_targets

ReadAgain = Callable[[], Settings]

_CHANGEABLE = frozenset({"maps", "reverses", "rules", "access", "mobility", "health", "names"})


class Parts(NamedTuple):
    """What a reload changes of an appliance."""

    stack: ServalStack
    admission: Admission
    acceptor: LegacyAcceptor
    reverse: ReverseSide


class Wanted(NamedTuple):
    """Settings that may take effect, with the names of their reverse maps looked up."""

    settings: Settings
    target_sets: list[TargetSet]


class Retired(NamedTuple):
    """The account of a map that is no longer served; clients may still be using it."""

    direction: str
    traffic: MapTraffic


def prepare(read_again: ReadAgain, running: Settings) -> Wanted:
    """Read the configuration again. Blocks (files, names). Raises Misconfigured."""
    settings = read_again()
    refuse_fixed_changes(running, settings)
    return Wanted(settings, [resolve_targets(reverse) for reverse in settings.reverses])


def refuse_fixed_changes(running: Settings, wanted: Settings) -> None:
    """Raise Misconfigured if a value differs that is used at the start only."""
    differ = []
    for section in msgspec.structs.fields(Settings):
        if section.name not in _CHANGEABLE:
            before, after = getattr(running, section.name), getattr(wanted, section.name)
            differ += [
                f"{section.name}.{key.name}"
                for key in msgspec.structs.fields(before)
                if getattr(before, key.name) != getattr(after, key.name)
            ]
    if not differ and running.controller_plan() != wanted.controller_plan():
        differ.append("a service name or key file that [registration], [router] or [resolver] refers to")
    if differ:
        raise Misconfigured(
            ", ".join(differ), "cannot change while the translator runs; restart it, or take the change back"
        )


def put_into_effect(parts: Parts, running: Settings, wanted: Wanted) -> list[Retired]:
    """Change a running appliance, at once and entirely. Raises Misconfigured, and then nothing has changed."""
    settings, target_sets = wanted
    limit = connection_limit(settings, raise_descriptor_limit())
    served = {each.map.prefix for each in parts.reverse.served}
    with contextlib.ExitStack() as undo:
        replace_rules(parts.stack.table, running.rules, settings.rules, undo)
        ports = parts.acceptor.prepare(settings.maps)
        undo.callback(parts.acceptor.abandon, ports)
        for reverse, targets in zip(settings.reverses, target_sets, strict=True):
            if reverse.prefix not in served:
                added = parts.reverse.serve(parts.stack, reverse, targets, settings.stack.backlog)
                undo.callback(parts.reverse.stop_serving, added)
        undo.pop_all()
    parts.admission.change_limit(limit)
    parts.stack.native.policy = AccessPolicy(settings.access)
    parts.stack.mobility.settings = settings.mobility
    return [
        *(Retired("forward", gone) for gone in parts.acceptor.replace(ports)),
        *(Retired("reverse", gone) for gone in parts.reverse.replace(settings, target_sets)),
    ]
