"""What does a source of the resolver answer? The words that sources and `resolver` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from serval_core.errors import ServalError
from serval_core.names import ServiceID


class SourceFailed(ServalError):
    """A source could not find out. The message is one sentence."""


class Answer(NamedTuple):
    """An instance of a service, or a router that knows more. Larger `priority` wins, as in the service table."""

    address: int
    priority: int
    weight: int
    lifetime_s: float


class AnswerSource(Protocol):
    """Somebody who may know where a service is."""

    async def resolve(self, service_id: ServiceID) -> Sequence[Answer]:
        """What it knows, nothing if it does not know the service. Raises SourceFailed."""
