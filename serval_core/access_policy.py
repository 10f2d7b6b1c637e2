"""Who may use the stack's native sockets for which services? Rules per prefix, by user and group.

Root and the user that runs the stack may do everything. For everybody else the rule with the longest prefix that covers the service
decides; where none does, or where it does not mention the action, a program may connect but not bind. Knows no socket and no file.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from serval_core.errors import OurMistake
from serval_core.names import ServicePrefix

Action = Literal["bind", "connect"]


class Program(NamedTuple):
    """Who asks. `groups` is called only when a rule names groups, because asking the kernel for them costs a call."""

    pid: int
    uid: int
    groups: Callable[[], Iterable[int]]


class Principals(NamedTuple):
    """Users and groups, as numbers."""

    everybody: bool = False
    users: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()

    @classmethod
    def parse(cls, names: Iterable[str | int]) -> Principals:
        """Read `alice`, `1000`, `%group` and `*`. Raises OurMistake for a name that this machine does not have."""
        users: set[int] = set()
        groups: set[int] = set()
        everybody = False
        for name in map(str, names):
            if name == "*":
                everybody = True
            elif name.startswith("%"):
                groups.add(_number(name[1:], "group", lambda text: grp.getgrnam(text).gr_gid))
            else:
                users.add(_number(name, "user", lambda text: pwd.getpwnam(text).pw_uid))
        return cls(everybody, frozenset(users), frozenset(groups))

    def include(self, program: Program) -> bool:
        """Whether the program's user is named, by itself or by one of its groups."""
        if self.everybody or program.uid in self.users:
            return True
        return bool(self.groups) and not self.groups.isdisjoint(program.groups())


class AccessRule(NamedTuple):
    """Who may bind and connect to services under `prefix`. None: as if there were no rule."""

    prefix: ServicePrefix
    bind: Principals | None = None
    connect: Principals | None = None

    def allows(self, program: Program, action: Action) -> bool | None:
        """None when the rule says nothing about this action."""
        principals = self.bind if action == "bind" else self.connect
        return None if principals is None else principals.include(program)


class AccessPolicy:
    """All rules of one stack."""

    def __init__(self, rules: Iterable[AccessRule] = ()) -> None:
        """Raises OurMistake when two rules have the same prefix."""
        self._rules = sorted(rules, key=lambda rule: -rule.prefix.bits)
        self._trusted = frozenset({0, os.geteuid()})
        prefixes = [rule.prefix for rule in self._rules]
        repeated = next((each for each in prefixes if prefixes.count(each) > 1), None)
        if repeated is not None:
            raise OurMistake(f"there are two access rules for {repeated}: put both into one")

    def trusts(self, program: Program) -> bool:
        """Whether the program may do everything: no rule and no limit applies to it."""
        return program.uid in self._trusted

    def refusal(self, program: Program, action: Action, prefix: ServicePrefix) -> str | None:
        """Why the program may not do this, as a sentence; None when it may.

        To bind a prefix is to bind all of it: a more specific rule that shuts the program out of a part refuses the whole.
        """
        if self.trusts(program):
            return None
        for rule in self._rules:
            narrower = rule.prefix.bits > prefix.bits and prefix.covers(rule.prefix.service_id)
            if narrower and action == "bind" and rule.allows(program, action) is False:
                return self._sentence(program, action, prefix, rule)
            if rule.prefix.bits <= prefix.bits and rule.prefix.covers(prefix.service_id):
                allowed = rule.allows(program, action)
                if allowed is None:
                    break
                return None if allowed else self._sentence(program, action, prefix, rule)
        return None if action == "connect" else self._sentence(program, action, prefix, None)

    def _sentence(
        self, program: Program, action: Action, prefix: ServicePrefix, rule: AccessRule | None
    ) -> str:
        why = f"the access rule for {rule.prefix} does not name it" if rule else "no access rule lets it"
        return f"uid {program.uid} may not {action} to {prefix}: {why} (see [[access]] in the stack's configuration)"


def _number(name: str, kind: str, look_up: Callable[[str], int]) -> int:
    if name.isascii() and name.isdigit():
        return int(name)
    try:
        return look_up(name)
    except KeyError:
        raise OurMistake(f'this machine has no {kind} "{name}"') from None
