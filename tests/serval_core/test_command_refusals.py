"""What is wrong in itself is refused by every subcommand in one sentence, with exit status 2, before any stack is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import rich_click as click

from lab.hosts import Host, Lab
from serval_core import cli, daemon
from serval_core.command_line import WRONG_USE

KEY = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
NO_SERVICE = 'neither a serviceID (a decimal number, 0x and hex digits, or "default") nor a known service name'
WHOLE = "is a prefix, and a whole serviceID is needed here"
NO_ADDRESS = "is no IPv4 address: write four numbers of 0 to 255 and dots"

# What is typed, and what the sentence says.
SERVAL: Sequence[tuple[str, str]] = (
    ("flow", "Did you mean 'flows'?"),
    ("service ad", "Did you mean 'add'?"),
    ("service add 7", "Missing argument 'IP|delay|drop"),
    ("service add 76x 10.0.0.1", NO_SERVICE),
    ("service add 0xabcd:257 10.0.0.1", "only 1 to 256 are possible"),
    ("service add 7 10.0.0.256", NO_ADDRESS),
    ("service add 7 10.0.0", NO_ADDRESS),
    ("service add 7 dellay", '(nearest: "delay")'),
    ("service add 7 10.0.0.1 priority", "priority: has no value behind it"),
    ("service add 7 10.0.0.1 priority weight 2", "priority: has no value behind it"),
    ("service add 7 10.0.0.1 prio 2", '(nearest: "priority")'),
    ("service add 7 10.0.0.1 priority 1.5", "is no whole number"),
    ("service add 7 10.0.0.1 priority -1", "(nearest: 0)"),
    ("service add 7 10.0.0.1 weight 0", "(nearest: 1)"),
    ("service add 7 10.0.0.1 weight 99999999999", "(nearest: 4294967295)"),
    ("service add 7 10.0.0.1 weight 1 weight 2", "weight: is given twice"),
    ("service add 7 10.0.0.1 idle nan", "is no number"),
    ("service add 7 10.0.0.1 hard inf", "(nearest: 4294967295)"),
    ("service add 7 10.0.0.1 dev lol", '(nearest: "lo")'),
    ("service add 7 10.0.0.1 --jsn 1", "--jsn: is no word to follow here"),
    ("service modify 7 10.0.0.1", "nothing is to be changed"),
    ("service mod 7 10.0.0.1 weigth 2", '(nearest: "weight")'),
    ("service mod 7 10.0.0.1 10.0.0.300", NO_ADDRESS),
    ("service delete", "Missing argument 'ID[:BITS]'"),
    ("service del 7 dropp", '(nearest: "drop")'),
    ("service show 76x", NO_SERVICE),
    ("service show 7 8", "unexpected extra argument (8)"),
    ("resolve 0xab:8", WHOLE),
    ("migrate eth0", "Missing argument 'IF2'"),
    ("migrate flow x eth0", "'x' is no whole number"),
    ("migrate flow 0 eth0", "(nearest: 1)"),
    ("migrate flow 1", "say where to"),
    ("migrate flow 1 eth0 --to 10.0.0.1", "say where to"),
    ("migrate flow 1 --to x", NO_ADDRESS),
    ("migrate interface eth0", "Missing argument 'IF2'"),
    ("migrate service 76x eth0", NO_SERVICE),
    ("balance eth0", "name at least two interfaces"),
    ("balance eth0 eth0", "named twice"),
    ("balance eth0 eth1=x", "no number as its weight"),
    ("balance eth0 eth1=0", "(nearest: 1)"),
    ("balance eth0 eth1 --measure 0", "(nearest: 0.01)"),
    ("flows --jsn", "Did you mean '--json'?"),
    ("events --kind rule_ad", '(nearest: "rule_added")'),
    ("events x", "unexpected extra argument (x)"),
    ("stats x", "unexpected extra argument (x)"),
    ("registrations x", "unexpected extra argument (x)"),
    ("routers x", "unexpected extra argument (x)"),
    ("keygen /", "is a directory"),
    ("keygen /nosuch/key", "/nosuch/key cannot be written: No such file or directory"),
    ("keygen /etc/passwd", "/etc/passwd"),
    (f"id 76x {KEY}", NO_SERVICE),
    (f"id 0x0001:100 {KEY}", "(nearest: 96)"),
    ("id 0x0001:32 zz", "64 hex digits"),
    ("id 0x0001:32 /etc/passwd", "/etc/passwd"),
    ("tcp-server -s 76x", NO_SERVICE),
    ("tcp-server -s default", "nothing can be bound to"),
    ("tcp-server -n 0", "(nearest: 1)"),
    ("tcp-server -f /", "is a directory"),
    ("tcp-server -f /nosuch/file", "there is no directory /nosuch"),
    ("tcp-client", "Missing option '--file'"),
    ("tcp-client -f /nosuch", "No such file or directory"),
    ("tcp-client -f /etc/passwd -s 0xab:8", WHOLE),
    ("tcp-client -f /etc/passwd -a 10.0.0", NO_ADDRESS),
    ("udp-echo -s 76x", NO_SERVICE),
    ("udp-echo -s default", "nothing can be bound to"),
    ("ping 76x", NO_SERVICE),
    ("ping 7 -a 1.2.3", NO_ADDRESS),
    ("ping 7 -c 0", "(nearest: 1)"),
    ("ping 7 -i -1", "(nearest: 0)"),
    ("ping 7 -W 0", "must be more than 0"),
    ("ping 7 -W nan", "is no number"),
    ("ping 7 --size 3", "(nearest: 12)"),
    ("ping 7 --size 99999", "(nearest: 65423)"),
)

SERVALD: Sequence[tuple[str, str]] = (
    ("--config /nosuch", "--config /nosuch: cannot be read: No such file or directory"),
    ("--conf x", "Did you mean '--config'?"),
    ("--service 7", "is not of the form ID=IP"),
    ("--service 7=10.0.0", "is no IPv4 address"),
    ("--service 7=10.0.0.1@0", "(nearest: 1)"),
    ("--service 7=10.0.0.1 --service 7=10.0.0.1", "already has the target 10.0.0.1"),
    ("--router-ip x", "is no IPv4 address"),
    ("--router-ip 127.0.0.1", "is not the address of another host"),
    ("--log-level inf", "'info'"),
)


@pytest.fixture
def host(lab: Lab) -> Host:
    return lab.host("without-a-stack")


def commands(group: click.Group) -> Iterator[str]:
    """The names of all subcommands, with those of their groups."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from (f"{name} {below}" for below in commands(command))
        else:
            yield name


def complaint(host: Host, main: Callable[[Sequence[str]], None], typed: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that it prints, after an end with status 2."""
    with pytest.raises(SystemExit) as ended:
        host.call(lambda: main(typed.split()))
    printed = capsys.readouterr()
    assert (typed, ended.value.code, printed.out) == (typed, WRONG_USE, "")
    assert printed.err.count("\n") == 1
    return printed.err


def test_serval(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    for typed, sentence in SERVAL:
        assert sentence in complaint(host, cli.main, typed, capsys), typed


def test_servald(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    for typed, sentence in SERVALD:
        assert sentence in complaint(host, daemon.main, typed, capsys), typed


def test_every_subcommand_is_in_the_table() -> None:
    assert [name for name in commands(cli.cli) if not any(typed.startswith(name) for typed, _ in SERVAL)] == []
