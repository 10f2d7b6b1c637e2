"""Does the demonstration of moves end well when all is well, and badly when anything is not?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lab import demo_migration, migration_moves
from lab.demo_migration import Plan
from lab.two_ways import Inner

PNG = b"\x89PNG\r\n\x1a\n"
PICTURES = {"two-flows.png", "subnet.png", "all-moves.png"}
FEW = Plan(by_hand=2, lost=1, silent=0, subnet=1, client_by_hand=1, client_lost=1)
ONE_LOST = Plan(by_hand=0, lost=1, silent=0, subnet=0, client_by_hand=0, client_lost=0)
NONE = Plan(by_hand=0, lost=0, silent=0, subnet=0, client_by_hand=0, client_lost=0)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, root: None) -> None:
    """The same demonstration with less to wait for."""
    monkeypatch.setattr(demo_migration, "SHARED_S", 0.3)
    monkeypatch.setattr(demo_migration, "WARM_UP_S", 0.2)
    monkeypatch.setattr(demo_migration, "BETWEEN_CUTS_S", 0.0)


def test_it_ends_with_0_when_all_is_as_it_should_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "pictures"
    assert demo_migration.main(["--plots", str(pictures)], FEW) == 0
    printed = capsys.readouterr().out
    assert "Everything was as it should be." in printed
    assert "of 3 moves" in printed
    assert {path.name for path in pictures.iterdir()} == PICTURES
    assert all(path.read_bytes().startswith(PNG) for path in pictures.iterdir())


def test_it_ends_with_1_when_something_else_arrives_than_was_sent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = migration_moves.Server.sent

    def another(server: migration_moves.Server) -> dict[str, Any]:
        return sent(server) | {"sha256": "0" * 64}

    monkeypatch.setattr(migration_moves.Server, "sent", another)
    assert demo_migration.main(["--plots", str(tmp_path)], NONE) == 1
    assert "something else arrived than was sent" in " ".join(capsys.readouterr().out.split())


def test_it_ends_with_1_when_a_flow_does_not_move(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(migration_moves, "NOTICED_S", 0.5)
    monkeypatch.setattr(Inner, "cut", lambda inner, way: None)
    assert demo_migration.main(["--plots", str(tmp_path)], ONE_LOST) == 1
    assert "could not go on" in capsys.readouterr().out


def test_a_place_where_no_pictures_can_go_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        demo_migration.main(["--plots", str(tmp_path / "file")])
    assert ended.value.code == 2
    assert "--plots" in capsys.readouterr().err
