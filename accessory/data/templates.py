"""How a record becomes text: the reference's dialog and instruction (alpaca) templates, exact to the character."""

from collections.abc import Mapping, Sequence
from typing import Any

from accessory.data.tokenizer import Segment

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
DIALOG_STOP = "\n###"
"""Ends an answer; trained, and where generation stops."""

_ALPACA = (
    "Below is an instruction that describes a task{context}. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:"
)
_ALPACA_CONTEXT = ", paired with an input that provides further context"

_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


class RecordError(ValueError):
    """A record that cannot be used; the message says why."""


def render(record: Any) -> tuple[list[Segment], bool]:
    """The segments of a record, its kind told by its keys, and whether ``</s>`` ends it.

    Raises:
        RecordError: the record is of no known kind, or breaks the rules of its kind.
    """
    if not isinstance(record, Mapping):
        raise RecordError(f"expected an object, found {type(record).__name__}")
    if "conversations" in record:
        segments, eos = dialog(record["conversations"]), False
    elif "instruction" in record:
        segments, eos = instruction(record), True
    else:
        keys = ", ".join(map(str, record))
        raise RecordError(f"neither 'conversations' (dialog) nor 'instruction' among its keys: {keys}")
    try:
        "".join(segment.text for segment in segments).encode()
    except UnicodeEncodeError as error:
        raise RecordError("its text holds half a character (a lone surrogate)") from error
    return segments, eos


def dialog_prompt(question: str) -> str:
    """What a dialog-tuned model is given to answer ``question``."""
    return f"{SYSTEM}\n\n### Human: {question}\n### Assistant:"


def dialog(turns: Any) -> list[Segment]:
    """``{system}\\n\\n### Human: {q}\\n### Assistant: {a}\\n###``, then `` Human: ...``; answers and stops are trained."""
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise RecordError("'conversations' must be a list of turns with at least one question and answer")
    segments = [Segment(f"{SYSTEM}\n\n###", False)]
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise RecordError(f"turn {index + 1} must be an object with the texts 'from' and 'value'")
        expected = ("human", "gpt")[index % 2]
        if _ROLES.get(str(turn.get("from"))) != expected:
            raise RecordError(f"turn {index + 1} is from {turn.get('from')!r}, expected '{expected}': turns must alternate")
        if expected == "human":
            segments.append(Segment(f" Human: {turn['value']}\n### Assistant:", False))
        else:
            segments.append(Segment(f" {turn['value']}{DIALOG_STOP}", True))
    if len(turns) % 2:
        raise RecordError("the last turn is a question without an answer")
    return segments


def instruction(record: Mapping[str, Any]) -> list[Segment]:
    """The alpaca template; the output is trained."""
    for key in ("instruction", "output"):
        if not isinstance(record.get(key), str):
            raise RecordError(f"'{key}' must be a text")
    context = record.get("input") or ""
    if not isinstance(context, str):
        raise RecordError("'input' must be a text")
    prompt = _ALPACA.format(
        context=_ALPACA_CONTEXT if context else "",
        instruction=record["instruction"],
        input=f"### Input:\n{context}\n\n" if context else "",
    )
    return [Segment(prompt, False), Segment(record["output"], True)]
