"""Typed, frozen configuration: dataclasses filled from YAML or JSON, with ``key.sub=value`` overrides.

An unknown key is an error that names the nearest known one: a setting that is silently ignored is the worst kind.
"""

import copy
import dataclasses
import difflib
import json
import math
import os
import re
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml

from accessory.errors import UserError
from accessory.files import check_file

T = TypeVar("T")


@dataclass(frozen=True)
class Bounds:
    """What a number of a configuration or an option can be. NaN and the infinite never can."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def objection(self, value: float) -> str | None:
        """What is to be said against ``value``, such as "must be at least 1, found 0"; None: nothing."""
        if self.least <= value <= self.most and self.above < value < self.below:
            return None
        limits = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        named = [f"{word} {limit:,}" for word, limit in limits.items() if math.isfinite(limit)]
        kind = "" if isinstance(value, int) or math.isfinite(value) else "a finite number "
        return f"must be {kind}{' and '.join(named)}, found {value!r}"


@dataclass(frozen=True)
class Filled:
    """A text with something in it, as a path must be: an empty one is mostly a variable that is not set."""

    def objection(self, value: str) -> str | None:
        if not value.strip():
            return "is empty; is a variable not set?"
        return "holds a NUL character" if "\0" in value else None


Count = Annotated[int, Bounds(least=1)]
Repeats = Annotated[int, Bounds(least=1, below=100_000)]  # of what is listed, one by one, before or in a step
WholeNumber = Annotated[int, Bounds(least=0)]
Positive = Annotated[float, Bounds(above=0)]
NonNegative = Annotated[float, Bounds(least=0)]
Share = Annotated[float, Bounds(least=0, below=1)]
Fraction = Annotated[float, Bounds(least=0, most=1)]
OneOrMore = Annotated[float, Bounds(least=1)]
Seed = Annotated[int, Bounds(least=0, below=2**63)]  # as torch's generators take it
Text = Annotated[str, Filled()]


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def read_bytes(text: str, where: str) -> float:
    """How many bytes "14GB", "12.5 GiB" or "300MB" are. Raises UserError: none, or no size at all."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]I?|)B", text.strip().upper())
    if not match or not float(match[1]):
        raise UserError(f"{where}: expected a size such as 14GB, found '{text}'")
    return float(match[1]) * _UNITS[match[2]]


MADE = {"made": True}
"""Metadata of a field that the program fills in: what is read cannot say it."""


def nearest(name: str, known: Sequence[str]) -> str:
    """Return ``"; did you mean 'x'?"``, or the list of known names when nothing is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(known))}"


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file whose top level is a mapping.

    Raises:
        UserError: the file is missing, does not parse, or holds something else.
    """
    path = check_file(path, "a YAML or JSON file")
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(text) if kind == "JSON" else yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # YAML raises the latter for 2020-99-99
        raise UserError(f"{path}: not valid {kind}: {_one_line(error)}") from error
    except RecursionError as error:
        raise UserError(f"{path}: not valid {kind}: nested too deeply") from error
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
    values = copy.deepcopy(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"'{override}': an override is written key.sub=value")
        if not text.strip():
            raise UserError(f"'{override}': there is no value; is a variable not set? (null is written as a word)")
        node, *path = key.split(".")
        target = values
        for part in path:
            target = target.setdefault(node, {})
            if not isinstance(target, dict):
                raise UserError(f"'{override}': '{node}' holds a value, not a group of keys")
            node = part
        try:
            target[node] = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
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
    every = dataclasses.fields(cls)  # type: ignore[arg-type]
    fields = {field.name: field for field in every if field.metadata != MADE}
    for key in values:
        if key not in fields:
            name = f"{prefix}{key}"
            raise UserError(f"{where}: unknown key '{name}'{nearest(name, [prefix + known for known in fields])}")
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
        if origin is typing.Literal:
            if value in arguments:
                return value
            allowed = ", ".join(repr(a) for a in arguments)
            raise UserError(f"{where}: {name}: {value!r} is not one of {allowed}")
        if origin is tuple and arguments[-1] is Ellipsis and isinstance(value, str):
            value = [value]
        if origin is tuple and isinstance(value, (list, tuple)):
            if arguments[-1] is not Ellipsis and len(arguments) != len(value):
                raise UserError(f"{where}: {name}: expected {len(arguments)} values, found {len(value)}")
            return tuple(_convert(arguments[0], item, where, name) for item in value)
        if origin is dict and isinstance(value, Mapping):
            key, item = arguments
            return {_convert(key, k, where, name): _convert(item, v, where, f"{name}.{k}") for k, v in value.items()}
        plain, limits = (arguments[0], arguments[1:]) if origin is Annotated else (option, ())
        if not isinstance(plain, type) or (isinstance(value, bool) and plain is not bool):
            continue
        if plain is float and isinstance(value, int):
            value = float(value) if abs(value) < 2**1023 else math.inf * (1 if value > 0 else -1)
        if isinstance(value, plain):
            for objection in filter(None, (limit.objection(value) for limit in limits)):
                raise UserError(f"{where}: {name} {objection}")
            return value
    expected = " or ".join(map(_type_name, options))
    raise UserError(f"{where}: {name}: expected {expected}, found {reprlib.repr(value)}")


def _type_name(option: Any) -> str:
    if option is type(None):
        return "null"
    if dataclasses.is_dataclass(option):
        return "a group of keys"
    if typing.get_origin(option) is tuple:
        return "list"
    plain = typing.get_args(option)[0] if typing.get_origin(option) is Annotated else option
    return getattr(plain, "__name__", str(plain))


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
