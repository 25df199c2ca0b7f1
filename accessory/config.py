"""Typed, frozen configuration: dataclasses filled from YAML or JSON, with ``key.sub=value`` overrides.

An unknown key is an error that names the nearest known one: a setting that is silently ignored is the worst kind.
"""

import dataclasses
import difflib
import json
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml

from accessory.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Bounds:
    """What a number of a configuration can be: finite, at least or above ``low``, and below ``high``."""

    low: float
    open: bool = False
    high: float = math.inf

    def check(self, value: float, where: str) -> None:
        if not self.low <= value < self.high or (self.open and value == self.low):
            least = f"above {self.low:g}" if self.open else f"at least {self.low:g}"
            most = "" if self.high == math.inf else f" and below {self.high:g}"
            raise UserError(f"{where} must be {least}{most}, found {value!r}")


Count = Annotated[int, Bounds(1)]
WholeNumber = Annotated[int, Bounds(0)]
Positive = Annotated[float, Bounds(0, open=True)]
NonNegative = Annotated[float, Bounds(0)]
Share = Annotated[float, Bounds(0, high=1)]


def nearest(name: str, known: Sequence[str]) -> str:
    """Return ``"; did you mean 'x'?"``, or the list of known names when nothing is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(known))}"


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file whose top level is a mapping.

    Raises:
        UserError: the file is missing, does not parse, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_Loader)
    except (json.JSONDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid {'JSON' if path.suffix == '.json' else 'YAML'}: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, found {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write plain data as indented JSON, down to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return ``values`` with ``key.sub=value`` strings applied; the value is parsed as YAML."""
    values = json.loads(json.dumps(values))  # a deep copy of plain data
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"'{override}': an override is written key.sub=value")
        node, *path = key.split(".")
        target = values
        for part in path:
            target = target.setdefault(node, {})
            if not isinstance(target, dict):
                raise UserError(f"'{override}': '{node}' holds a value, not a group of keys")
            node = part
        try:
            target[node] = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise UserError(f"'{override}': not a YAML value: {_one_line(error)}") from error
    return values


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str, prefix: str = "") -> T:
    """Build the (nested) dataclass ``cls`` from plain data.

    Args:
        where: what to call the source in an error, e.g. the file's path. prefix: of the keys, in a nested one.

    Raises:
        UserError: an unknown key, a missing one, a value of the wrong type or out of its ``Bounds``.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(
                f"{where}: unknown key '{prefix}{key}'{nearest(prefix + key, [prefix + name for name in fields])}"
            )
    arguments: dict[str, Any] = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], where, prefix + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: the key '{prefix}{name}' is missing")
    try:
        return cls(**arguments)
    except UserError as error:  # values that do not fit together
        raise UserError(f"{where}: {prefix}{error}") from error


def _convert(hint: Any, value: Any, where: str, name: str) -> Any:
    """Check the ``value`` of key ``name`` against a field's type; widen int to float and list to tuple."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return from_mapping(typing.cast(type, option), value, where, f"{name}.")
        if origin is Annotated:
            converted = _convert(arguments[0], value, where, name)
            for bounds in arguments[1:]:
                bounds.check(converted, f"{where}: {name}")
            return converted
        if origin is typing.Literal:
            if value in arguments:
                return value
            allowed = ", ".join(repr(a) for a in arguments)
            raise UserError(f"{where}: {name}: {value!r} is not one of {allowed}")
        if origin is tuple and arguments == (str, Ellipsis) and isinstance(value, str):
            return (value,)
        if origin is tuple and isinstance(value, (list, tuple)):
            if arguments[-1] is not Ellipsis and len(arguments) != len(value):
                raise UserError(f"{where}: {name}: expected {len(arguments)} values, found {len(value)}")
            return tuple(_convert(arguments[0], item, where, name) for item in value)
        if origin is None and isinstance(option, type):
            if option is float and isinstance(value, int) and not isinstance(value, bool):
                return float(value)
            if isinstance(value, option) and (option is bool or not isinstance(value, bool)):
                return value
    names = " or ".join("null" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise UserError(f"{where}: {name}: expected {names}, found {value!r}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads ``5e-6`` as a number and ``off`` as a word, as YAML 1.2 does, and refuses a repeated key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
