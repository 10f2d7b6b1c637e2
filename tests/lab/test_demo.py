"""Does the demonstration end well when all is well, and badly when anything is not?"""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import demo


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, root: None) -> None:
    """The same demonstration with less to carry."""
    for name, value in (("DOWNLOAD_BYTES", 30 << 20), ("UPLOAD_BYTES", 10 << 20), ("PAIRS", 2)):
        monkeypatch.setattr(demo, name, value)


def test_it_ends_with_0_when_all_is_as_it_should_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main() == 0
    printed = capsys.readouterr().out
    assert "Everything was as it should be." in printed
    assert printed.count("CONNECTED") >= 2


def test_it_ends_with_1_when_a_file_arrives_changed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(path: Path) -> str:
        return "0" * 64

    monkeypatch.setattr(demo, "hash_file", wrong)
    assert demo.main() == 1
    assert "arrived with another hash" in capsys.readouterr().out


def test_it_ends_with_1_when_the_translators_do_not_speak_protocol_144(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "PROTOCOL_SAL", 145)
    assert demo.main() == 1
    assert "only 0 packets of protocol 144" in capsys.readouterr().out


def test_it_says_why_when_a_translator_cannot_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "SERVICE", "0xnonsense")
    assert demo.main() == 1
    assert "could not go on" in capsys.readouterr().out
