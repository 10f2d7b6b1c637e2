"""Two hosts on which users run servald, `serval` and native programs."""

from __future__ import annotations

from lab.hosts import Lab
from lab.native import left_over, start_servald
from lab.waiting import wait_for


class Site:
    """Two hosts with a servald each."""

    def __init__(self, lab: Lab) -> None:
        self.directory = lab.directory
        self.near, self.far = lab.host("near"), lab.host("far")
        lab.connect(self.near, "10.1.0.1/24", self.far, "10.1.0.2/24")
        self.near_daemon = start_servald(self.near, self.directory / "near.log")
        self.far_daemon = start_servald(self.far, self.directory / "far.log")

    def assert_nothing_left(self) -> None:
        for daemon in (self.near_daemon, self.far_daemon):
            wait_for(lambda daemon=daemon: set(left_over(daemon).values()) == {0}, "nothing is left of the flows", 20)
