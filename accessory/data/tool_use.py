"""Tools in records: descriptions of the tools, calls, and results, in the forms of OpenAI and ShareGPT."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accessory.data.fields import Fields, RecordError


@dataclass(frozen=True)
class ToolCall:
    """A call in an assistant's turn. The tool's turn that answers it names its ``id``."""

    name: str
    arguments: Mapping[str, Any]
    id: str


def read_tools(fields: Fields) -> tuple[Mapping[str, Any], ...]:
    """The tools of a record, each as ``{"type": "function", "function": {"name": ..., ...}}``, which chat templates expect.
    A record may also hold bare functions, or the whole list as JSON in a text."""
    tools = fields.take("tools")
    if isinstance(tools, str) and tools:
        tools = _parsed(tools, "'tools'")
    if not tools:
        return ()
    if not isinstance(tools, Sequence):
        raise RecordError("'tools' must be a list of functions, or that as JSON")
    _check_writable(tools, "'tools'")
    return tuple(_tool(tool, f"tool {number}") for number, tool in enumerate(tools, 1))


def _tool(tool: Any, where: str) -> Mapping[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RecordError(f"{where} must be an object with the 'name' of a function, or with 'function' that has one")
    return tool if "function" in tool else {"type": "function", "function": tool}


def read_calls(turn: Fields, number: int) -> tuple[ToolCall, ...]:
    """The calls of an assistant's turn in OpenAI's form: ``tool_calls``, or the older ``function_call``.

    Args:
        number: how many calls earlier turns have; calls without an id are numbered.
    """
    found, older = turn.take("tool_calls") or [], turn.take("function_call")
    if not isinstance(found, list | tuple):
        raise RecordError(f"{turn.where}: 'tool_calls' must be a list")
    calls = list[ToolCall]()
    for raw in found:
        number += 1
        call = turn.inside(raw, f"{turn.where}, call {len(calls) + 1}")
        if (kind := call.take("type") or "function") != "function":
            raise RecordError(f"{call.where} is of type {kind!r}; expected 'function'")
        calls.append(_call(call.inside(call.take("function"), call.where), number, call.text("id")))
        call.refuse_rest()
    if older:
        calls.append(_call(turn.inside(older, f"{turn.where}, function_call"), number + 1))
    return tuple(calls)


def parse_calls(text: str, turn: Fields, number: int) -> tuple[ToolCall, ...]:
    """The calls of a ShareGPT turn from ``function_call``: JSON of one call or of a list of calls."""
    found = _parsed(text, f"{turn.where}, a function call,")
    found = found if isinstance(found, list) else [found]
    calls = enumerate(found, number + 1)
    return tuple(_call(turn.inside(raw, f"{turn.where}, function call"), count) for count, raw in calls)


def _call(call: Fields, number: int, id: str = "") -> ToolCall:
    name, arguments = call.text("name", needed=True), call.take("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", f"{call.where}: 'arguments'")
    if not isinstance(arguments, Mapping | None):
        raise RecordError(f"{call.where}: 'arguments' must be an object, or that as JSON")
    _check_writable(arguments, f"{call.where}: 'arguments'")
    id = id or call.text("id") or f"call{number:05d}"  # nine letters and digits, as Mistral's templates insist
    call.refuse_rest()
    return ToolCall(name, arguments or {}, id)


def answered_call(turn: Fields, waiting: list[ToolCall]) -> tuple[str, str]:
    """Which call a tool's turn answers: the tool's name and the call's id, both empty if the record writes calls as text.

    Args:
        waiting: the calls without an answer; the answered one is removed.
    """
    name, id = turn.text("name"), turn.text("tool_call_id")
    fitting = [call for call in waiting if (call.id == id if id else name in ("", call.name))]
    if fitting:
        waiting.remove(fitting[0])
        return name or fitting[0].name, fitting[0].id
    if id or waiting:
        expected = ", ".join(f"'{call.id}' ({call.name})" for call in waiting) or "none"
        raise RecordError(f"{turn.where} answers the call '{id or name}', but those that wait for an answer are: {expected}")
    return name, id


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{what} must be JSON: {getattr(error, 'msg', 'nested too deeply')}") from error


def _check_writable(value: Any, what: str) -> None:
    """Refuse a value that chat templates could not write as JSON."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RecordError(f"{what} cannot be written as JSON: {error}") from error
