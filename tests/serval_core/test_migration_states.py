"""Are the tables of migration complete, is everything in them used, and does the manual show them as they are?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from serval_core.flow import Flow
from serval_core.migration_states import (
    OWN_MOVE,
    PEER_MOVE,
    ImpossibleMove,
    OwnAction,
    OwnEvent,
    OwnMove,
    PeerAction,
    PeerEvent,
    PeerMove,
    as_markdown,
    prototype_name,
)
from serval_core.moves import Moves
from serval_core.names import FlowID
from tests.serval_core.lone_host import SERVICE_ID, LoneHost

ROOT = Path(__file__).parents[2]


def flow_in(own: OwnMove, peer: PeerMove) -> Flow:
    flow = Flow(FlowID(1), SERVICE_ID, Random(1).getrandbits(192), 0.0)
    flow.moves = Moves()
    flow.moves.own, flow.moves.peer = own, peer
    return flow


@pytest.mark.parametrize("state", OwnMove)
@pytest.mark.parametrize("event", OwnEvent)
def test_a_pair_without_row_is_an_error_that_names_both(state: OwnMove, event: OwnEvent) -> None:
    if (state, event) in OWN_MOVE:
        return
    flow = flow_in(state, PeerMove.SETTLED)
    with pytest.raises(ImpossibleMove, match=f"{event.name}.*{state.name}"):
        LoneHost().sal._migration.own._step(flow, event, 0.0)
    assert flow.moves is not None
    assert flow.moves.own is state


@pytest.mark.parametrize("event", [PeerEvent.CONFIRMED, PeerEvent.RETRANSMIT, PeerEvent.GAVE_UP])
def test_a_peer_that_is_settled_has_nothing_to_confirm(event: PeerEvent) -> None:
    with pytest.raises(ImpossibleMove, match=f"{event.name}.*SETTLED"):
        LoneHost().sal._migration.peer._step(flow_in(OwnMove.SETTLED, PeerMove.SETTLED), event, 0.0)


def test_every_state_can_be_reached_and_left() -> None:
    for table, states in ((OWN_MOVE, OwnMove), (PEER_MOVE, PeerMove)):
        assert {step.next_state for step in table.values()} == set(states)
        for state in states:
            assert any(step.next_state is not state for (origin, _), step in table.items() if origin is state)


def test_every_event_and_action_is_used_and_carried_out_by_somebody() -> None:
    migration = LoneHost().sal._migration
    assert {event for _, event in OWN_MOVE} == set(OwnEvent)
    assert {event for _, event in PEER_MOVE} == set(PeerEvent)
    assert {action for step in OWN_MOVE.values() for action in step.actions} == set(OwnAction)
    assert {action for step in PEER_MOVE.values() for action in step.actions} == set(PeerAction)
    assert set(migration.own._actions) == set(OwnAction)
    assert set(migration.peer._actions) == set(PeerAction)


def test_a_closed_connection_ends_a_move_in_every_state() -> None:
    for state in OwnMove:
        assert OWN_MOVE[state, OwnEvent.CLOSED].next_state is OwnMove.SETTLED


def test_both_halves_in_the_words_of_the_prototype() -> None:
    halves = [(own, peer) for own in (OwnMove.SETTLED, OwnMove.MOVING) for peer in PeerMove]
    assert [prototype_name(*each) for each in halves] == ["INITIAL", "RECV", "SENT", "SENT_RECV"]
    assert prototype_name(OwnMove.STRANDED, PeerMove.PROVING) == "STRANDED"


def test_running_the_module_prints_the_markdown() -> None:
    command = [sys.executable, "-m", "serval_core.migration_states"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (printed.stdout, printed.stderr) == (as_markdown(), "")


def test_architecture_md_shows_the_tables_as_they_are() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- migration -->\n")[2].partition("<!-- /migration -->")[0]
    assert shown == as_markdown(), (
        "ARCHITECTURE.md is stale: put the output of `python -m serval_core.migration_states` between its markers"
    )
