"""The calls of tools that a model writes into its answer, in the form that its chat template shows it."""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accessory.data.fields import RecordError
from accessory.data.records import Conversation, read_question
from accessory.data.templates import Template
from accessory.errors import UserError
from accessory.infer.text import overlap

PROBE = (
    {"role": "user", "content": "?"},
    {"role": "assistant", "tool_calls": [{"id": "abcdefghi", "function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "f", "content": "?"},
)
"""A conversation in which a tool is called."""


@dataclass(frozen=True)
class CallForm:
    """How a template writes calls: each as ``{"name": ..., "arguments": {...}}``.

    Attributes:
        begin: what stands before them. end: what stands behind each; empty: a list of all stands there to the answer's end.
    """

    begin: str
    end: str

    def schema(self, tools: Sequence[Mapping[str, Any]], name: str | None, single: bool = False) -> dict[str, Any]:
        """The JSON schema of what stands behind ``begin``, where a tool must be called: ``name``, or any if None.

        ``single``: once.
        """
        functions = [tool.get("function", tool) for tool in tools]
        called = [function for function in functions if name in (None, function.get("name"))]
        if not called:
            raise UserError("tool_choice: " + (f"there is no tool '{name}' among tools" if name else "tools names none"))
        one = {"anyOf": [_call_of(function) for function in called]}
        if self.end:
            return one
        return {"type": "array", "items": one, "minItems": 1} | ({"maxItems": 1} if name or single else {})


FORMS = (CallForm("[TOOL_CALLS]", ""), CallForm("<tool_call>", "</tool_call>"))  # Mistral's, Hermes' and Qwen's


def _call_of(function: Mapping[str, Any]) -> dict[str, Any]:
    properties = {"name": {"const": function.get("name")}, "arguments": function.get("parameters") or {"type": "object"}}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def call_form(template: Template) -> CallForm | None:
    """The one in which ``template`` writes calls; None: it writes none, or in a form that is not known here."""
    try:
        probe = read_question(PROBE, ({"type": "function", "function": {"name": "f", "parameters": {}}},))
        assert isinstance(probe, Conversation)
        written = "".join(segment.text for segment in template.prompt(probe))
    except RecordError:
        return None
    return next((form for form in FORMS if form.begin in written), None)


class CallReader:
    """Parts the text of a growing answer into what is said and what is called.

    Args:
        forced: the answer is the calls, without what stands before them. single: of several in a list the first is taken.
    """

    def __init__(self, form: CallForm, forced: bool = False, single: bool = False):
        self.count = 0  # calls so far
        self._form, self._forced, self._single, self._held = form, forced, single, form.begin if forced else ""

    def add(self, text: str, last: bool) -> tuple[str, list[dict[str, Any]]]:
        """What is said beside calls, and the calls that are whole, as OpenAI's streams have them. Text that cannot be
        read so is said; blanks that part calls from what is said are the template's."""
        self._held += text
        said, calls = "", list[dict[str, Any]]()
        while self._form.begin in self._held:
            before, _, behind = self._held.partition(self._form.begin)
            written, end, rest = behind.partition(self._form.end) if self._form.end else (behind, "", "")
            if not (end or last):
                break
            found = _calls(written)
            said += before.rstrip() if found else before + self._form.begin * (not self._forced) + written + end
            calls += found[:1] if self._single else found
            self._held = rest
        begun = self._held.find(self._form.begin)
        free = self._held[: begun if begun >= 0 else len(self._held) - overlap(self._held, self._form.begin)].rstrip()
        if last:
            free = self._held.rstrip() if self.count or calls else self._held
        said, self._held = said + free, self._held[len(free) :]
        numbered = [{"index": number} | call for number, call in enumerate(calls, self.count)]
        self.count += len(calls)
        return said, numbered


def _calls(written: str) -> list[dict[str, Any]]:
    """Those that a text is; empty: it is none."""
    try:
        found = json.loads(written)
    except ValueError:
        return []
    several = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in several):
        return []
    return [_told(call["name"], call.get("arguments", {})) for call in several]


def _told(name: str, arguments: Any) -> dict[str, Any]:
    """With an id of nine letters or digits, which is what Mistral's templates take."""
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": uuid.uuid4().hex[:9], "type": "function", "function": {"name": name, "arguments": written}}
