"""What must hold whatever peers and applications do? A conversation at random, and the order that `effects` promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from random import Random

from serval_core.effects import Accepted, Connected, ConnectFailed, Effect, ExpectData, FlowEnded
from serval_core.names import FlowID
from serval_core.wire.sal import SYN
from tests.serval_core.lone_host import LoneHost, Sent

ROUNDS = 60
REQUEST_QUEUE_LIMIT = 3


class EffectOrder(ABC):
    """What a host has been told so far, and which effect may not come next. Protocols say what opens and closes."""

    def __init__(self) -> None:
        self.expected: set[FlowID] = set()
        self.open: set[FlowID] = set()
        self.reported: set[FlowID] = set()
        self.ended: set[FlowID] = set()

    def check(self, effect: Effect) -> None:
        """Take note of an effect, which must be allowed."""
        if isinstance(effect, ExpectData):
            assert effect.flow_id not in self.expected | self.open
            self.expected.add(effect.flow_id)
        elif isinstance(effect, Connected | Accepted):
            assert effect.flow_id in self.open - self.reported
            self.reported.add(effect.flow_id)
        elif isinstance(effect, FlowEnded):
            assert effect.flow_id in self.reported - self.open - self.ended
            self.ended.add(effect.flow_id)
        elif isinstance(effect, ConnectFailed):
            assert effect.flow_id not in self.reported
        else:
            self.check_transport(effect)

    @abstractmethod
    def check_transport(self, effect: Effect) -> None:
        """Any other effect."""


def converse(
    host: LoneHost,
    random: Random,
    order: EffectOrder,
    say: Callable[[], None],
    act: Callable[[], None],
    learn: Callable[[Sent], None],
    connects: Collection[FlowID],
) -> None:
    """Let peers say and the application do something at random, then end all flows: nothing may be left of them.

    `learn` gets each SYN and SYN-ACK of the host, `connects` grows with its connects. Its request queue holds REQUEST_QUEUE_LIMIT.
    """

    def pass_time() -> None:
        host.now += random.choice((0.0, 0.1, 1.0, 5.0))
        host.sal.handle_timeouts(host.now)

    core = host.sal._core
    for _ in range(ROUNDS):
        random.choice((say, say, say, act, pass_time))()
        for sent in host.packets():
            if sent.control.flags & SYN:
                learn(sent)
        while host.log:
            order.check(host.log.pop(0))
        assert core.flows.half_open <= REQUEST_QUEUE_LIMIT
    for flow_id in [*order.reported, *connects]:
        host.sal.abort(flow_id, host.now)
    host.advance(100.0)
    for effect in host.log:
        order.check(effect)
    assert (dict(core.flows.by_id), dict(core.flows.by_syn), core.flows.half_open) == ({}, {}, 0)
    assert (len(core.timers), len(core.flows.time_wait)) == (0, 0)
    assert order.reported == order.ended
    assert not order.open | order.expected
