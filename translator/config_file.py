"""What does a configuration file say, and on which line does it go wrong?

TOML by tomllib, its shape by msgspec, its texts by `port_map`. Every refusal names file, line and key, and
the nearest key or value that would be right. The result is a `Settings`, not yet checked against
contradictions.
"""

from __future__ import annotations

import bisect
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from serval_core.names import ServicePrefix
from serval_core.rules import NUMBER_MAX, RuleType
from translator.config import (
    LegacySection,
    LimitsSection,
    LogSection,
    Settings,
    StackSection,
    TimeoutsSection,
)
from translator.nearest import nearest
from translator.port_map import (
    ForwardMap,
    Misconfigured,
    Names,
    ReverseMap,
    ServiceRule,
    forward_map,
    reverse_map,
    service_prefix,
    weighted_addresses,
)

KeyPath = tuple[str | int, ...]

_SERVICE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_HEX_ID = re.compile(r"[0-9a-fA-F]{64}")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_WRONG_CHOICE = re.compile(r"Invalid enum value (?P<value>.*)", re.DOTALL)
_PLACE = re.compile(r"(?P<what>.*?)(?: - at `(?P<place>\$.*)`)?", re.DOTALL)
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]|\[\.\.\.\]")
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text in quotes",
    "bool": "true or false",
    "array": "a list in square brackets",
    "object": "a section of its own",
}


class _Map(Struct, forbid_unknown_fields=True):
    listen: str | int
    service: str | int


class _Reverse(Struct, forbid_unknown_fields=True):
    service: str | int
    targets: Annotated[list[str], Meta(min_length=1)]


class _Rule(Struct, forbid_unknown_fields=True):
    service: str | int
    type: Literal["forward", "drop"] = "forward"
    targets: list[str] = []
    priority: Annotated[int, Meta(ge=1, le=NUMBER_MAX)] | None = None


class _File(Struct, forbid_unknown_fields=True):
    services: dict[str, str | int] = {}
    map: list[_Map] = []
    reverse: list[_Reverse] = []
    rule: list[_Rule] = []
    stack: StackSection = StackSection()
    legacy: LegacySection = LegacySection()
    limits: LimitsSection = LimitsSection()
    timeouts: TimeoutsSection = TimeoutsSection()
    log: LogSection = LogSection()


class LoadedFile(typing.NamedTuple):
    """What a file says, and the service names it defines (the command line may use them too)."""

    settings: Settings
    names: Names


def load(path: Path) -> LoadedFile:
    """Read a configuration file. Raises Misconfigured."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise Misconfigured(f"--config {path}", f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise Misconfigured(f"{path}:{line}", "the file is not UTF-8 text") from None
    return _Reader(str(path), text).read()


class _Reader:
    """One file while it is being read."""

    def __init__(self, file: str, text: str) -> None:
        self._file = file
        self._text = text

    def read(self) -> LoadedFile:
        try:
            document = tomllib.loads(self._text)
        except tomllib.TOMLDecodeError as error:
            raise self._not_toml(str(error)) from None
        try:
            content = msgspec.convert(document, _File)
        except msgspec.ValidationError as error:
            raise self._wrong_shape(document, str(error)) from None
        names = self._names(content.services)
        settings = Settings(
            maps=tuple(self._map(index, each, names) for index, each in enumerate(content.map)),
            reverses=tuple(self._reverse(index, each, names) for index, each in enumerate(content.reverse)),
            rules=tuple(self._rule(index, each, names) for index, each in enumerate(content.rule)),
            stack=content.stack,
            legacy=content.legacy,
            limits=content.limits,
            timeouts=content.timeouts,
            log=content.log,
        )
        return LoadedFile(settings, names)

    def _place(self, *path: str | int) -> str:
        """`file:line: key` of a path into the document."""
        keys = ".".join(str(step) for step in path if isinstance(step, str))
        return f"{self._file}:{line_of(self._text, path)}: {keys}"

    def _names(self, services: Mapping[str, str | int]) -> Names:
        names: dict[str, ServicePrefix] = {}
        for name, text in services.items():
            place = self._place("services", name)
            looks_like_id = name == "default" or name.lower().startswith("0x") or _HEX_ID.fullmatch(name)
            if looks_like_id or not _SERVICE_NAME.fullmatch(name):
                raise Misconfigured(
                    place, "is no name for a service; use a letter, then letters, digits, '_', '-' or '.'"
                )
            names[name] = service_prefix(str(text), {}, place)
        return names

    def _map(self, index: int, each: _Map, names: Names) -> ForwardMap:
        listen, service = self._place("map", index, "listen"), self._place("map", index, "service")
        return forward_map(str(each.listen), str(each.service), names, listen, service)

    def _reverse(self, index: int, each: _Reverse, names: Names) -> ReverseMap:
        service, targets = self._place("reverse", index, "service"), self._place("reverse", index, "targets")
        return reverse_map(str(each.service), each.targets, names, service, targets)

    def _rule(self, index: int, each: _Rule, names: Names) -> ServiceRule:
        place, targets = self._place("rule", index, "service"), self._place("rule", index, "targets")
        prefix = service_prefix(str(each.service), names, place)
        if each.type == "drop":
            if each.targets:
                raise Misconfigured(targets, 'a rule of type "drop" has no targets; leave them out')
            return ServiceRule(prefix, RuleType.DROP, (), each.priority, str(each.service), place)
        addresses = weighted_addresses(each.targets, targets)
        return ServiceRule(prefix, RuleType.FORWARD, addresses, each.priority, str(each.service), place)

    def _not_toml(self, message: str) -> Misconfigured:
        what, _, where = message.partition(" (at ")
        what = what[0].lower() + what[1:]
        if found := re.match(r"line (\d+), column (\d+)", where):
            return Misconfigured(f"{self._file}:{found[1]}", f"is no TOML: {what} at column {found[2]}")
        return Misconfigured(f"{self._file}:{len(self._text.splitlines())}", f"is no TOML: {what} at its end")

    def _wrong_shape(self, document: dict[str, Any], message: str) -> Misconfigured:
        """Turn msgspec's message into a sentence with a line and the nearest key or value."""
        match = _PLACE.fullmatch(message)
        assert match is not None
        what, path = match["what"], _steps(document, match["place"] or "$")
        if found := _UNKNOWN.fullmatch(what):
            key = found[1]
            known = _known_keys(path)
            return Misconfigured(self._place(*path, key), f"there is no such key{nearest(key, known)}")
        if found := _MISSING.fullmatch(what):
            return Misconfigured(self._place(*path), f'the key "{found[1]}" is missing')
        value = _at(document, path)
        if _WRONG_CHOICE.fullmatch(what):
            choices = _choices(path)
            return Misconfigured(
                self._place(*path), f'"{value}" is not possible{nearest(str(value), choices)}'
            )
        return Misconfigured(self._place(*path), _expectation(what, value))


def line_of(text: str, path: KeyPath) -> int:
    """The line (from 1) on which the statement that brings `path` into the TOML document begins.

    Found with the TOML parser itself: it is the end of the shortest piece of the file, in whole lines, whose
    statements contain the path. A path that is not there is as far as it is there.
    """
    lines = text.splitlines(keepends=True)

    def contains(count: int) -> bool:
        for end in range(count, len(lines) + 1):
            try:
                document = tomllib.loads("".join(lines[:end]))
            except tomllib.TOMLDecodeError:
                continue  # a statement that goes on on the next line
            return _holds(document, path)
        return False

    while path and not contains(len(lines)):
        path = path[:-1]
    return bisect.bisect_left(range(1, len(lines) + 1), True, key=contains) + 1 if path else 1


def _holds(document: Any, path: KeyPath) -> bool:
    for step in path:
        if isinstance(step, int):
            if not isinstance(document, list) or step >= len(document):
                return False
        elif not isinstance(document, dict) or step not in document:
            return False
        document = document[step]
    return True


def _at(document: Any, path: KeyPath) -> Any:
    for step in path:
        document = document[step]
    return document


def _steps(document: Any, place: str) -> KeyPath:
    """`$.map[0].listen` as keys; `[...]` (a key of `services`) becomes the first key with a wrong value."""
    path: list[str | int] = []
    for match in _STEP.finditer(place):
        here = _at(document, tuple(path))
        if match[1] is not None:
            path.append(match[1])
        elif match[2] is not None:
            path.append(int(match[2]))
        elif isinstance(here, dict):
            path.append(next(key for key, value in here.items() if type(value) not in (str, int)))
    return tuple(path)


def _type_at(path: KeyPath) -> Any:
    """The declared type of what stands at `path` in a `_File`."""
    here: Any = _File
    for step in path:
        here = _bare(here)
        if isinstance(step, int) or typing.get_origin(here) is dict:
            here = typing.get_args(here)[-1 if typing.get_origin(here) is dict else 0]
        else:
            here = typing.get_type_hints(here, include_extras=True)[step]
    return _bare(here)


def _bare(annotation: Any) -> Any:
    """Without Annotated and `| None`."""
    while True:
        if typing.get_origin(annotation) is Annotated:
            annotation = typing.get_args(annotation)[0]
        elif typing.get_origin(annotation) in (typing.Union, types.UnionType) and type(
            None
        ) in typing.get_args(annotation):
            annotation = next(each for each in typing.get_args(annotation) if each is not type(None))
        else:
            return annotation


def _known_keys(path: KeyPath) -> Sequence[str]:
    return [field.name for field in msgspec.structs.fields(_type_at(path))]


def _choices(path: KeyPath) -> Sequence[str]:
    return list(typing.get_args(_type_at(path)))


def _expectation(what: str, value: Any) -> str:
    """msgspec's "Expected `int` >= 1" or "Expected `str`, got `int`" in an operator's words."""
    if found := re.fullmatch(r"Expected `(\w+)` (>=|<=|>|<) ([\d.]+)", what):
        limit = float(found[3])
        number = f"{limit:g}" if found[1] == "float" else str(int(limit))
        words = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}
        nearest = f" (nearest: {number})" if "=" in found[2] else ""
        return f"{value} is out of range; it must be {words[found[2]]} {number}{nearest}"
    if found := re.fullmatch(r"Expected `(.*?)`(?:, got `(.*)`)?", what):
        wanted = " or ".join(
            _KINDS.get(kind.strip(), kind) for kind in found[1].split("|") if kind.strip() != "null"
        )
        return f"write {wanted} instead of {_toml_text(value)}"
    if "matching regex" in what:
        return f"{_toml_text(value)} is not what is expected here: an IPv4 address, for the network one that ends in .0.0"
    if "of length" in what:
        return "the list must not be empty" if isinstance(value, list) else "the text must not be empty"
    return what


def _toml_text(value: Any) -> str:
    if isinstance(value, dict):
        return "a section"
    return msgspec.json.encode(value, enc_hook=str).decode()
