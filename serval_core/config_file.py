"""What does a configuration file say, and on which line does it go wrong?

TOML by tomllib, its shape by msgspec: `ConfigFile(path).read(Shape)` returns the Shape. Every refusal is a `Misconfigured`, which
names file, line and key, and the nearest key or value that would be right. Knows no program and none of its keys.
"""

from __future__ import annotations

import bisect
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from serval_core.errors import OurMistake
from serval_core.names import NameMistake, ServicePrefix, parse_service
from serval_core.nearest import nearest

Shape = TypeVar("Shape", bound=msgspec.Struct)
KeyPath = tuple[str | int, ...]
Names = Mapping[str, ServicePrefix]

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


class Misconfigured(OurMistake):
    """An option or value that cannot be obeyed. The message is one sentence naming its place."""

    def __init__(self, origin: str, sentence: str) -> None:
        super().__init__(f"{origin}: {sentence}")
        self.origin = origin
        self.sentence = sentence


def service_prefix(text: str, names: Names, origin: str) -> ServicePrefix:
    """A serviceID or prefix in any text form of SPEC 1.2.1, or a name of the configuration."""
    try:
        return parse_service(text, names)
    except NameMistake as mistake:
        raise Misconfigured(origin, str(mistake)) from None


class ConfigFile:
    """One file. Raises Misconfigured when it cannot be read."""

    def __init__(self, path: Path) -> None:
        self._file = str(path)
        try:
            self._text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise Misconfigured(f"--config {path}", f"cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            line = path.read_bytes()[: error.start].count(b"\n") + 1
            raise Misconfigured(f"{path}:{line}", "the file is not UTF-8 text") from None

    def read(self, shape: type[Shape]) -> Shape:
        """The content. Raises Misconfigured."""
        try:
            document = tomllib.loads(self._text)
        except tomllib.TOMLDecodeError as error:
            raise self._not_toml(str(error)) from None
        try:
            return msgspec.convert(document, shape)
        except msgspec.ValidationError as error:
            raise self._wrong_shape(shape, document, str(error)) from None

    def place(self, *path: str | int) -> str:
        """`file:line: key` of a path into the document."""
        keys = ".".join(str(step) for step in path if isinstance(step, str))
        return f"{self._file}:{line_of(self._text, path)}: {keys}"

    def names(self, services: Mapping[str, str | int]) -> Names:
        """What the section `[services]` defines. Raises Misconfigured."""
        names: dict[str, ServicePrefix] = {}
        for name, text in services.items():
            place = self.place("services", name)
            looks_like_id = name == "default" or name.lower().startswith("0x") or _HEX_ID.fullmatch(name)
            if looks_like_id or not _SERVICE_NAME.fullmatch(name):
                raise Misconfigured(
                    place, "is no name for a service; use a letter, then letters, digits, '_', '-' or '.'"
                )
            names[name] = service_prefix(str(text), {}, place)
        return names

    def _not_toml(self, message: str) -> Misconfigured:
        what, _, where = message.partition(" (at ")
        what = what[0].lower() + what[1:]
        if found := re.match(r"line (\d+), column (\d+)", where):
            return Misconfigured(f"{self._file}:{found[1]}", f"is no TOML: {what} at column {found[2]}")
        return Misconfigured(f"{self._file}:{len(self._text.splitlines())}", f"is no TOML: {what} at its end")

    def _wrong_shape(self, shape: type, document: dict[str, Any], message: str) -> Misconfigured:
        """Turn msgspec's message into a sentence with a line and the nearest key or value."""
        match = _PLACE.fullmatch(message)
        assert match is not None
        what, path = match["what"], _steps(document, match["place"] or "$")
        if found := _UNKNOWN.fullmatch(what):
            key = found[1]
            known = _known_keys(shape, path)
            return Misconfigured(self.place(*path, key), f"there is no such key{nearest(key, known)}")
        if found := _MISSING.fullmatch(what):
            return Misconfigured(self.place(*path), f'the key "{found[1]}" is missing')
        value = _at(document, path)
        if _WRONG_CHOICE.fullmatch(what):
            choices = _choices(shape, path)
            return Misconfigured(
                self.place(*path), f'"{value}" is not possible{nearest(str(value), choices)}'
            )
        return Misconfigured(self.place(*path), _expectation(what, value))


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


def _type_at(shape: type, path: KeyPath) -> Any:
    """The declared type of what stands at `path` in a `shape`."""
    here: Any = shape
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


def _known_keys(shape: type, path: KeyPath) -> Sequence[str]:
    return [field.name for field in msgspec.structs.fields(_type_at(shape, path))]


def _choices(shape: type, path: KeyPath) -> Sequence[str]:
    return list(typing.get_args(_type_at(shape, path)))


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
