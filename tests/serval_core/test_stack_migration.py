"""Can an operator move flows, by number, interface, service and address, and does he learn what came of it?"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lab.hosts import Lab
from serval_core import cli
from tests.serval_core.stack_thread import StackThread, Stream
from tests.serval_core.test_migration_kernel import QUICK
from tests.serval_core.two_paths import CLIENT, SERVER, cut, two_paths

ROOT = Path(__file__).parents[2]
SERVICE, OTHER_SERVICE = "0xabcd0001", "0xabcd0002"
NOT_POSSIBLE, WRONG_USE = 1, 2


class Said(NamedTuple):
    """What a command printed, and its exit status."""

    returncode: int
    stdout: str
    stderr: str


class Operator:
    """Uses `serval` on the client, which has one flow each to two services."""

    def __init__(self, lab: Lab, client: StackThread, server: StackThread) -> None:
        self.client, self.server = client, server
        self.router = lab.hosts["router"]
        listeners = [server.listen(service) for service in (SERVICE, OTHER_SERVICE)]
        client.forward("0xabcd:16", SERVER[0])
        self.streams: list[Stream] = [client.connect(service) for service in (SERVICE, OTHER_SERVICE)]
        for listener in listeners:
            listener.accept()
        self.flow_ids = [stream.connection.flow_id for stream in self.streams]

    def serval(self, *words: object) -> Said:
        """Run the command in this process, on the client."""
        said = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said[0]), contextlib.redirect_stderr(said[1]), pytest.raises(SystemExit) as end:
            self.client.host.call(cli.main, [*map(str, words)])
        return Said(int(str(end.value.code)), said[0].getvalue(), said[1].getvalue())

    def migrate(self, *words: object) -> list[dict[str, Any]]:
        """The outcomes, by flow."""
        result = self.serval("migrate", *words, "--json")
        assert result.stderr == ""
        outcomes: list[dict[str, Any]] = json.loads(result.stdout)
        assert (result.returncode == 0) == all(each["outcome"] == "migrated" for each in outcomes)
        return sorted(outcomes, key=lambda each: self.flow_ids.index(each["flow_id"]))

    def addresses(self) -> list[object]:
        by_id = {flow["flow_id"]: flow["local_address"] for flow in self.client.flows()}
        return [by_id[flow_id] for flow_id in self.flow_ids]


def operate(lab: Lab) -> Iterator[Operator]:
    hosts = two_paths(lab)
    with StackThread(hosts[0], sal=QUICK) as client, StackThread(hosts[1], sal=QUICK) as server:
        yield Operator(lab, client, server)


@pytest.fixture
def operator(lab: Lab) -> Iterator[Operator]:
    yield from operate(lab)


@pytest.fixture(scope="module")
def careless_operator(root: None) -> Iterator[Operator]:
    """One who changes nothing."""
    with Lab() as lab:
        yield from operate(lab)


def test_a_flow_an_interface_a_service_an_address(operator: Operator) -> None:
    first, second = operator.flow_ids
    (outcome,) = operator.migrate("flow", first, "eth1")
    assert (outcome["flow_id"], outcome["outcome"], outcome["address"]) == (first, "migrated", CLIENT[1])
    assert outcome["duration_s"] > 0
    assert operator.addresses() == [CLIENT[1], CLIENT[0]]
    assert [each["flow_id"] for each in operator.migrate("eth0", "eth1")] == [second]
    assert operator.addresses() == [CLIENT[1], CLIENT[1]]
    assert [each["flow_id"] for each in operator.migrate("service", OTHER_SERVICE, "eth0")] == [second]
    assert [each["outcome"] for each in operator.migrate("service", "0xabcd:16", "eth0")] == ["migrated", "refused"]
    assert operator.addresses() == [CLIENT[0], CLIENT[0]]
    assert operator.migrate("interface", "eth0", "eth1")[0]["outcome"] == "migrated"
    operator.client.host.run(["ip", "address", "add", "10.1.1.77/24", "dev", "eth0"])
    assert operator.migrate("flow", first, "--to", "10.1.1.77")[0]["address"] == "10.1.1.77"
    assert operator.serval("migrate", "lo", "eth0").stdout == "no flows to migrate\n"


def test_a_move_that_leads_nowhere_is_told(operator: Operator) -> None:
    cut(operator.router, "eth1")
    result = operator.serval("migrate", "flow", operator.flow_ids[0], "eth1")
    assert result.returncode == NOT_POSSIBLE
    assert "the peer does not answer on the new path" in result.stdout
    assert operator.addresses() == [CLIENT[0], CLIENT[0]]


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["flow", 5, "eth1"], NOT_POSSIBLE, "there is no flow 5 that could be migrated"),
        (["flow", "FIRST", "eth7"], NOT_POSSIBLE, 'there is no interface eth7 that is up and has an address (nearest: "eth1")'),
        (["flow", "FIRST", "eth0"], NOT_POSSIBLE, "it is on eth0 already"),
        (["flow", "FIRST", "lo"], NOT_POSSIBLE, "no route leads to 10.2.1.2 through lo"),
        (["flow", "FIRST", "--to", "10.1.1.9"], NOT_POSSIBLE, 'no address of an interface that is up (nearest: "10.1.1.2")'),
        (["eth0", "eth0"], NOT_POSSIBLE, "give two different interfaces"),
        (["flow", "FIRST"], WRONG_USE, "either the name of an interface, or --to with an address"),
        (["flow", "FIRST", "eth1", "--to", CLIENT[1]], WRONG_USE, "either the name of an interface, or --to with an address"),
        (["flow", "FIRST", "--to", "10.1.1"], WRONG_USE, "--to 10.1.1"),
        (["flow", "x", "eth1"], WRONG_USE, "'x' is no whole number"),
        (["service", "0x", "eth1"], WRONG_USE, "0x"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_sentence(
    careless_operator: Operator, words: list[object], status: int, sentence: str
) -> None:
    operator = careless_operator
    result = operator.serval("migrate", *(operator.flow_ids[0] if word == "FIRST" else word for word in words))
    assert (result.returncode, result.stdout) == (status, "")
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert operator.addresses() == [CLIENT[0], CLIENT[0]]
    assert {flow["migration"] for flow in operator.client.flows()} == {"INITIAL"}


def test_a_program_may_ask_without_waiting(operator: Operator) -> None:
    ask = (
        "from serval_core.stack_socket import StackSocketClient; import json, sys; "
        "print(json.dumps(StackSocketClient().request(sys.argv[1], **json.loads(sys.argv[2]))))"
    )
    asked = json.dumps({"service": "0xabcd:16", "interface": "eth1"})
    answer = operator.client.host.run([sys.executable, "-c", ask, "migrate_service", asked], cwd=ROOT)
    assert json.loads(answer.stdout) == {"migrating": operator.flow_ids, "refused": []}
