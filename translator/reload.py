"""What of a configuration that was read again takes effect while the translator runs?

Maps, reverse maps, their health checks and registrations do, and what can change of every program (`serval_core.reloading`).
What is new is made first: names looked up, ports opened, prefixes listened on, rules put in. Only when all of that has succeeded is
given up what is no longer wanted, so a refusal leaves everything as it was. No connection notices: those of a map
that is gone live on until they end by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from serval_core.config_changes import fixed_differences, refuse_differences
from serval_core.controller.plan import ControllerPlan
from serval_core.controller.service_controller import ServiceController
from serval_core.descriptors import raise_descriptor_limit
from serval_core.reloading import CHANGEABLE, changing
from serval_core.stack import ServalStack
from translator.accounting import Admission, MapTraffic
from translator.config import Settings
from translator.descriptors import connection_limit
from translator.legacy_side import LegacyAcceptor
from translator.serval_side import ReverseSide
from translator.targets import TargetSet, resolve_targets

ReadAgain = Callable[[], Settings]

_CHANGEABLE = CHANGEABLE | {"maps", "reverses", "health"}


class Parts(NamedTuple):
    """What a reload changes of an appliance."""

    stack: ServalStack
    controller: ServiceController
    admission: Admission
    acceptor: LegacyAcceptor
    reverse: ReverseSide


class Wanted(NamedTuple):
    """Settings that may take effect, with the names of their reverse maps looked up and their keys read."""

    settings: Settings
    plan: ControllerPlan
    target_sets: list[TargetSet]


class Retired(NamedTuple):
    """The account of a map that is no longer served; clients may still be using it."""

    direction: str
    traffic: MapTraffic


def prepare(read_again: ReadAgain, running: Settings) -> Wanted:
    """Read the configuration again. Blocks (files, names). Raises Misconfigured."""
    settings = read_again()
    refuse_differences(fixed_differences(running, settings, _CHANGEABLE))
    return Wanted(settings, settings.controller_plan(), [resolve_targets(reverse) for reverse in settings.reverses])


def put_into_effect(parts: Parts, running: Settings, wanted: Wanted) -> list[Retired]:
    """Change a running appliance, at once and entirely. Raises Misconfigured, and then nothing has changed."""
    settings, plan, target_sets = wanted
    limit = connection_limit(settings, raise_descriptor_limit())
    served = {each.map.prefix for each in parts.reverse.served}
    with changing(parts.stack, parts.controller, running, settings, plan) as undo:
        ports = parts.acceptor.prepare(settings.maps)
        undo.callback(parts.acceptor.abandon, ports)
        for reverse, targets in zip(settings.reverses, target_sets, strict=True):
            if reverse.prefix not in served:
                added = parts.reverse.serve(parts.stack, reverse, targets, settings.stack.backlog)
                undo.callback(parts.reverse.stop_serving, added)
    parts.admission.change_limit(limit)
    return [
        *(Retired("forward", gone) for gone in parts.acceptor.replace(ports)),
        *(Retired("reverse", gone) for gone in parts.reverse.replace(settings, target_sets)),
    ]
