"""How is the configuration of a running program changed? By a new file and SIGHUP, as an operator would."""

from __future__ import annotations

import signal
from pathlib import Path

from lab.chain import TranslatorProcess
from lab.waiting import wait_for


class Configured:
    """A program with a stack, and the configuration file that it was started with."""

    def __init__(self, file: Path, process: TranslatorProcess) -> None:
        self.file = file
        self.process = process

    def reload(self, text: str, said: str = "reloaded") -> str:
        """Have it read `text`; returns what it says about that, once it has said `said`."""
        before = len(self.process.log_path.read_text())
        self.file.write_text(text)
        self.process.process.send_signal(signal.SIGHUP)

        def news() -> str:
            return self.process.log_path.read_text()[before:]

        wait_for(lambda: said in news(), f'"{said}" to be logged')
        return news()
