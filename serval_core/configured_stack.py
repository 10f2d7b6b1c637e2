"""How does a configuration become a stack? What the stack is told, and what this host does not have."""

from __future__ import annotations

import socket
from pathlib import Path

from serval_core.access_policy import AccessPolicy, AccessRule
from serval_core.config_file import Misconfigured
from serval_core.config_sections import StackSection, port_range
from serval_core.dataplane.kernel import DataPlaneSettings
from serval_core.dataplane.native_ports import PortRange
from serval_core.framing import Framing, ServiceFraming
from serval_core.mobility_settings import MobilitySettings
from serval_core.names import parse_service
from serval_core.nearest import nearest
from serval_core.sal_settings import Authenticate, SalSettings
from serval_core.stack import StackSettings

_AVAILABLE_CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")


def stack_settings(
    stack: StackSection,
    connect_timeout_s: float,
    access: tuple[AccessRule, ...],
    mobility: MobilitySettings,
) -> StackSettings:
    """What the embedded stack is told."""
    return StackSettings(
        sal=SalSettings(
            syn_initial_timeout_s=stack.syn_initial_timeout_s,
            syn_timeout_max_s=max(stack.syn_timeout_max_s, stack.syn_initial_timeout_s),
            connect_timeout_s=connect_timeout_s,
            target_down_s=stack.target_down_s,
            target_down_max_s=max(stack.target_down_max_s, stack.target_down_s),
            refuse_unknown_services=stack.refuse_unknown_services,
            delay_limit=stack.delay_limit,
            delay_timeout_s=stack.delay_timeout_s,
            backlog=stack.backlog,
            authenticate=Authenticate(stack.authenticate),
            framing=Framing(stack.framing),
            service_framings=tuple(
                ServiceFraming(parse_service(text), Framing(framing))
                for text, framing in stack.service_framing.items()
            ),
        ),
        dataplane=DataPlaneSettings(
            interfaces=stack.interfaces,
            congestion_control=stack.congestion_control,
            virtual_network=stack.virtual_network,
            virtual_address=stack.virtual_address,
            peer_timeout_s=stack.peer_timeout_s,
            forward_in_kernel=stack.forward_in_kernel,
            native_ports=PortRange(*port_range(stack.native_ports)),
        ),
        broadcast_resolution=stack.broadcast_resolution,
        access=AccessPolicy(access),
        mobility=mobility,
    )


def refuse_unknown_names(stack: StackSection) -> None:
    """Raise Misconfigured for an interface or a congestion control that this host does not have."""
    present = [name for _, name in socket.if_nameindex()]
    for name in stack.interfaces or ():
        if name not in present:
            raise Misconfigured(
                f"--interface {name} (stack.interfaces)", f"there is no such interface{nearest(name, present)}"
            )
    available = _AVAILABLE_CONGESTION_CONTROL.read_text().split()
    if stack.congestion_control not in available:
        raise Misconfigured(
            f"--congestion-control {stack.congestion_control} (stack.congestion_control)",
            f"the kernel does not have it{nearest(stack.congestion_control, available)}",
        )
