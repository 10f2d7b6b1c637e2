"""Are the tables readable, whatever the rows hold? With a running translator: tests/system/test_translator_life.py."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from serval_core.stack_socket import RequestFailed, StackSocketClient
from serval_core.tables import FILE_WIDTH, bytes_text
from translator.show import show

FLOW = {
    "flow_id": 7,
    "peer_flow_id": 9,
    "state": "CONNECTED",
    "service": "76568",
    "peer_address": "10.0.0.2",
    "round_trip_s": 0.00125,
}


class Answers(StackSocketClient):
    """A stack that gives these answers; other requests fail as they do at a stack without a translator."""

    def __init__(self, **answers: Any) -> None:
        super().__init__()
        self.answers = answers

    def request(self, name: str, /, **arguments: object) -> Any:
        if name not in self.answers:
            raise RequestFailed(f"the stack knows no request {name}")
        return self.answers[name]


def shown(what: str, *, as_json: bool = False, **answers: Any) -> str:
    output = io.StringIO()
    show(what, as_json=as_json, client=Answers(**answers), console=Console(file=output, width=FILE_WIDTH))
    return output.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_234_567, "1.23 MB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (5 * 10**15, "5e+03 TB"),
    ],
)
def test_amounts(count: int, text: str) -> None:
    assert bytes_text(count) == text


def test_flows_of_a_stack_without_a_translator() -> None:
    table = shown("flows", flows=[FLOW])
    for word in ("CONNECTED", "76568", "10.0.0.2", "1.25 ms"):
        assert word in table


def test_flows_with_what_the_translator_knows() -> None:
    pair = {"flow_id": 7, "legacy": "[::1]:4000", "bytes_to_service": 5, "bytes_from_service": 6000}
    table = shown("flows", flows=[FLOW, {**FLOW, "flow_id": 8, "round_trip_s": None}], pairs=[pair])
    assert "[::1]:4000" in table
    assert "5 B / 6 kB" in table
    assert json.loads(shown("flows", as_json=True, flows=[FLOW], pairs=[pair])) == [{**FLOW, **pair}]


def test_nothing_to_show() -> None:
    assert shown("flows", flows=[], pairs=[]) == "no flows\n"
    assert json.loads(shown("services", as_json=True, services=[])) == []


def test_long_json_lines_are_not_broken() -> None:
    services = [{"prefix": "x" * 500}]
    assert json.loads(shown("services", as_json=True, services=services)) == services
