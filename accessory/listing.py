"""The ``config`` verb: every setting of a run, with its value, its default and its comment in settings.py."""

import argparse
import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any

import yaml

from accessory.settings import RunConfig

_FIELD = re.compile(r"    (\w+): .*?(?:  # (.*))?")
WIDTH = 120


def run_config(arguments: argparse.Namespace) -> None:
    """Print the listing as YAML, which a run can be started from."""
    config = RunConfig.load(arguments.config, arguments.overrides) if arguments.config else None
    changed: list[str] = []
    print("\n".join(_lines(RunConfig, config, "", changed)))
    if config:
        print(f"\n# {len(changed)} settings differ from the defaults: {', '.join(changed)}")


def comments(section: type) -> dict[str, list[str]]:
    """The lines of comment above and behind each setting of a section in its source."""
    found: dict[str, list[str]] = {}
    above: list[str] = []
    for line in inspect.getsource(section).splitlines():
        if line.startswith("    # "):
            above.append(line.removeprefix("    # "))
            continue
        if match := _FIELD.fullmatch(line):
            found[match[1]] = above + ([match[2]] if match[2] else [])
        above = []
    return found


def _lines(section: type, values: Any, prefix: str, changed: list[str]) -> Iterator[str]:
    """The YAML of a section.

    Args:
        values: the section as a run has it; None: its defaults.
        prefix: of its keys; those that are not as by default are added to ``changed``.
    """
    indent, said = "  " * prefix.count("."), comments(section)
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        key, options = field.name, (hints[field.name], *typing.get_args(hints[field.name]))
        default = field.default_factory() if callable(field.default_factory) else field.default
        value = default if values is None else getattr(values, key)
        group = next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)
        notes = [*said[key], *(" | ".join(typing.get_args(o)) for o in options if typing.get_origin(o) is typing.Literal)]
        if group and value is not None:
            yield from (f"{indent}# {note}" for note in (*_documentation(group), *notes))
            yield f"{indent}{key}:"
            yield from _lines(group, None if value is dataclasses.MISSING else value, f"{prefix}{key}.", changed)
            continue
        text = "" if value is dataclasses.MISSING else f" {_yaml(value)}"
        if value is dataclasses.MISSING:
            notes.append("it must be given")
        elif value != default:
            changed.append(f"{prefix}{key}")
            notes += [] if default is dataclasses.MISSING else [f"default: {_yaml(default)}"]
        line = f"{indent}{key}:{text}" + (f"  # {'; '.join(notes)}" if notes else "")
        if len(line) > WIDTH:
            yield from (f"{indent}# {note}" for note in notes)
            line = f"{indent}{key}:{text}"
        yield line
        if group:
            yield from (f"{indent}#   {inner.strip()}" for inner in _lines(group, None, f"{prefix}{key}.", []))


def _documentation(section: type) -> list[str]:
    """A section's own docstring as a line; not the one that ``dataclass`` makes."""
    text = section.__doc__ or ""
    return [] if text.startswith(f"{section.__name__}(") else [" ".join(text.split())]


def _yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
