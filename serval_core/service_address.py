"""What is an address of AF_SERVAL, and in which forms may a program write it?"""

from __future__ import annotations

import errno
from typing import Any, NamedTuple

from serval_core.errors import OurMistake
from serval_core.names import ServiceID, ServicePrefix, parse_address, parse_service


class ServiceAddress(NamedTuple):
    """What AF_SERVAL has for an address: a service, and where it is (dotted; empty: wherever resolution finds it)."""

    service: ServicePrefix
    address: str = ""

    def __str__(self) -> str:
        return f"{self.service}@{self.address}" if self.address else str(self.service)


def service_address(value: Any) -> ServiceAddress:
    """Read an address; see the module's docstring. Raises OSError (EINVAL)."""
    if isinstance(value, ServiceAddress):
        return value
    try:
        if isinstance(value, ServicePrefix):
            return ServiceAddress(value)
        if isinstance(value, tuple):
            service, where = value
            if where:
                parse_address(where)
            return ServiceAddress(service_address(service).service, where)
        if isinstance(value, ServiceID):
            return ServiceAddress(ServicePrefix.of(value))
        return ServiceAddress(parse_service(str(value)))
    except (OurMistake, ValueError, TypeError) as mistake:
        raise OSError(errno.EINVAL, str(mistake)) from None
