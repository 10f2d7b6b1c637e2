"""Is the state table complete, is everything in it used, and does the manual show it as it is?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from serval_core.flow import Flow
from serval_core.names import FlowID
from serval_core.sal import SalSettings, ServiceAccessLayer
from serval_core.service_table import ServiceTable
from serval_core.states import CONNECTION, Action, Event, ImpossibleEvent, State, as_markdown, as_mermaid
from tests.serval_core.lone_host import SERVICE_ID, LoneHost

ROOT = Path(__file__).parents[2]

IMPOSSIBLE = [(state, event) for state in State for event in Event if (state, event) not in CONNECTION]


def flow_in(state: State) -> Flow:
    flow = Flow(FlowID(1), SERVICE_ID, Random(1).getrandbits(192), 0.0)
    flow.state = state
    return flow


@pytest.mark.parametrize(("state", "event"), IMPOSSIBLE)
def test_a_pair_without_row_is_an_error_that_names_both(state: State, event: Event) -> None:
    flow = flow_in(state)
    with pytest.raises(ImpossibleEvent, match=f"{event.name}.*{state.name}"):
        LoneHost().sal._core.step(flow, event, 0.0)
    assert flow.state is state


def test_every_state_can_be_reached_and_left() -> None:
    reached = {State.INIT}
    for _ in State:
        reached |= {step.next_state for (state, _), step in CONNECTION.items() if state in reached}
    assert reached == set(State)
    for state in set(State) - {State.CLOSED}:
        assert any(
            step.next_state is not state for (origin, _), step in CONNECTION.items() if origin is state
        )


def test_closed_is_final() -> None:
    assert {step.next_state for (state, _), step in CONNECTION.items() if state is State.CLOSED} == {
        State.CLOSED
    }


def test_every_action_is_used_and_carried_out_by_somebody() -> None:
    assert {action for step in CONNECTION.values() for action in step.actions} == set(Action)
    host = LoneHost()
    sal = ServiceAccessLayer(SalSettings(), ServiceTable(), host.paths, Random(1))
    assert set(sal._core._handlers) == set(Action)
    assert len(sal._core._steps) == len(CONNECTION)


@pytest.mark.parametrize("state", [state for state in State if (state, Event.ABORT) in CONNECTION])
def test_an_open_flow_can_be_reset_and_aborted_in_every_state(state: State) -> None:
    assert (state, Event.RESET_RECEIVED) in CONNECTION


def test_the_transport_is_taken_down_before_the_flow_ends() -> None:
    for step in CONNECTION.values():
        if Action.END_FLOW in step.actions:
            before = step.actions[: step.actions.index(Action.END_FLOW)]
            assert {Action.CLOSE_TRANSPORT, Action.RESET_TRANSPORT} & set(before)


def test_the_diagram_shows_every_change_of_state() -> None:
    diagram = as_mermaid().splitlines()
    for (state, event), step in CONNECTION.items():
        if step.next_state is not state:
            start = f"    {state.name} --> {step.next_state.name}: "
            (line,) = [line for line in diagram if line.startswith(start)]
            assert event.name in line.removeprefix(start).split(", ")


def test_running_the_module_prints_the_markdown() -> None:
    command = [sys.executable, "-m", "serval_core.states"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout == as_markdown()
    assert printed.stderr == ""


def test_architecture_md_shows_the_table_as_it_is() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- states -->\n")[2].partition("<!-- /states -->")[0]
    assert shown == as_markdown(), (
        "ARCHITECTURE.md is stale: put the output of `python -m serval_core.states` between its markers"
    )
