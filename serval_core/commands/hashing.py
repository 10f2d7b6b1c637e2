"""What is the SHA-256 of what goes over a connection? Computed beside the transfer, on a CPU of its own if there is one."""

from __future__ import annotations

import hashlib
import queue
import threading
from types import TracebackType
from typing import Self

BUFFER_BYTES = 1 << 20
BUFFERS = 4


class Hashing:
    """Lends buffers and hashes what is in them, in order. A context manager; `hexdigest` is there when it has been left."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[tuple[memoryview, int] | None] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(memoryview(bytearray(BUFFER_BYTES)))
        # A daemon, so that an interrupt need not wait for it.
        self._thread = threading.Thread(target=self._run, name="sha256", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._filled.put(None)
        self._thread.join()

    def buffer(self) -> memoryview:
        """Room for the next bytes; waits until there is some."""
        return self._free.get()

    def add(self, buffer: memoryview, size_bytes: int) -> None:
        """Hash the beginning of a buffer, and take it back. Its content stays until `buffer` lends it again."""
        self._filled.put((buffer, size_bytes))

    def hexdigest(self) -> str:
        """Of all that was added."""
        return self._digest.hexdigest()

    def _run(self) -> None:
        while (filled := self._filled.get()) is not None:
            buffer, size_bytes = filled
            self._digest.update(buffer[:size_bytes])  # which lets go of the interpreter
            self._free.put(buffer)
