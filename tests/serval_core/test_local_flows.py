"""Flows whose two ends are on one host, in every framing."""

from __future__ import annotations

import pytest

from lab.hosts import Lab
from lab.waiting import wait_for
from serval_core.framing import Framing
from serval_core.sal_settings import SalSettings
from tests.serval_core.stack_thread import StackThread, assert_idle, exchange

SERVICE = "76568"


def counted_alike(stack: StackThread) -> bool:
    one, other = stack.flows()
    both = (one, other), (other, one)
    return all(a[f"{what}_out"] == b[f"{what}_in"] for a, b in both for what in ("packets", "bytes"))


@pytest.mark.parametrize("framing", list(Framing))
def test_both_ends_on_one_host(lab: Lab, framing: Framing) -> None:
    settings = SalSettings(framing=framing, time_wait_s=0.2)
    with StackThread(lab.host("alone"), sal=settings) as stack:
        listener = stack.listen(SERVICE)
        for _ in range(2):
            near = stack.connect(SERVICE)
            far = listener.accept()
            for one, other in ((near, far), (far, near)):
                one.socket.sendall(b"?")
                assert other.socket.recv(1) == b"?"
            flows = stack.flows()
            expected = Framing.NATIVE if framing is Framing.AUTO else framing
            assert [flow["framing"] for flow in flows] == [expected.value] * 2
            wait_for(lambda: counted_alike(stack), "either end to count what the other one does")
            exchange(near, far, 3_000_000, 2_000_000)
        listener.close()
        assert_idle(stack)
        assert stack.counters()["dataplane_drop_in_wrong_header"] == 0
