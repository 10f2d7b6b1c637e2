"""What can an operator choose about registration, service routing and resolution, and what holds by default?

The sections `[registration]`, `[router]` and `[resolver]` of a configuration file, the same for every program
that runs a stack. Values are the texts of the file; `plan` says what they mean and refuses what makes no
sense. Times are in seconds.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from serval_core.rules import NUMBER_MAX

DEFAULT_DIRECTORY = "/var/lib/serval/registrations.sqlite"

Text = Annotated[str, Meta(min_length=1)]
Service = Text | int
Seconds = Annotated[float, Meta(gt=0, le=31_536_000)]
Count = Annotated[int, Meta(ge=1, le=10_000_000)]
RuleNumber = Annotated[int, Meta(ge=1, le=NUMBER_MAX)]
Requirement = Literal["open", "signed", "self-certifying", "nobody"]
Source = Literal["directory", "upstream", "dns"]


class RegistrationSection(Struct, frozen=True, forbid_unknown_fields=True):
    """How this host tells service routers what it serves.

    `routers`: their addresses; with none, routers are looked for on every attached network. `keys`: files made
    by `serval keygen`; a self-certifying serviceID is signed with its own key, anything else with the first.
    """

    enabled: bool = True
    routers: tuple[Text, ...] = ()
    discover: bool = True
    router_id: Service = 88888  # SPEC 1.2.3
    client_id: Service = 55555
    keys: tuple[Text, ...] = ()
    router_keys: tuple[Text, ...] = ()  # whose announcements are believed; none: everybody's
    priority: RuleNumber = 1
    weight: RuleNumber = 1
    refresh_s: Seconds = 20.0  # SPEC 7.4
    lifetime_s: Seconds = 50.0


class PolicyEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """Who may register serviceIDs within `prefix`.

    `keys`: public keys in hex; none: any key will do where one is required. `networks`: where the host must
    be; none: anywhere.
    """

    prefix: Service
    require: Requirement = "signed"
    keys: tuple[Text, ...] = ()
    networks: tuple[Text, ...] = ()


class RouterSection(Struct, frozen=True, forbid_unknown_fields=True):
    """How this host is a service router for others.

    `policy` holds for the prefixes it names, `default_policy` for all others. `aggregates`: prefixes that are
    registered at the routers of `[registration]` in place of the services within them. `key` signs answers
    to hosts that look for a router. `directory` ":memory:" forgets everything at the end.
    """

    enabled: bool = False
    directory: Text = DEFAULT_DIRECTORY
    advertise: bool = True
    announced_s: Annotated[float, Meta(ge=1, le=600)] = 60.0  # how long hosts rely on an answer
    key: Text | None = None
    expiry_s: Seconds = 50.0  # of registrations that name no lifetime (SPEC 7.4)
    lifetime_max_s: Seconds = 300.0
    default_policy: Requirement = "open"
    policy: tuple[PolicyEntry, ...] = ()
    aggregates: tuple[Service, ...] = ()
    shortest_prefix_bits: Annotated[int, Meta(ge=1, le=256)] = 8
    priority_max: RuleNumber = 1000  # below any local listener
    weight_max: RuleNumber = 1000
    registrations_max: Count = 100_000
    registrations_per_host: Count = 2048
    registrations_per_prefix: Count = 1024
    messages_per_host_s: Count = 200
    new_registrations_s: Count = 1000  # of all hosts together
    clock_tolerance_s: Seconds = 60.0  # how far the clock of a signing host may be off


class ResolverSection(Struct, frozen=True, forbid_unknown_fields=True):
    """What happens to the first packet for a serviceID within `prefixes` (late binding).

    It waits at most `timeout_s` while `sources` are asked in turn. `zone` is where DNS names of serviceIDs
    begin; `nameservers` none: those of the host.
    """

    prefixes: tuple[Service, ...] = ()
    sources: tuple[Source, ...] = ("directory", "upstream", "dns")
    zone: Text | None = None
    nameservers: tuple[Text, ...] = ()
    timeout_s: Seconds = 3.0
    rule_lifetime_s: Seconds = 60.0  # of rules towards an upstream router
    failure_lifetime_s: Seconds = 5.0  # how long a failure is not tried again
    rules_max: Count = 10_000


class ControllerSettings(Struct, frozen=True, kw_only=True):
    """All an operator can say to one service controller."""

    registration: RegistrationSection = RegistrationSection()
    router: RouterSection = RouterSection()
    resolver: ResolverSection = ResolverSection()
