"""OpenAI's API as data: what a body asks for, and how answers are written."""

import base64
import dataclasses
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from torch import Tensor

from accessory.config import Bounds, NonNegative, Text, from_mapping
from accessory.data.tokenizer import Tokenizer
from accessory.errors import UserError
from accessory.infer.grammar import Grammar, Grammars
from accessory.infer.request import Reason, Running
from accessory.infer.sampling import Sampling, TokenChoice
from accessory.infer.tool_calls import CallForm, CallReader

C = TypeVar("C", bound="Call")
Samples = Annotated[int, Bounds(least=1, most=16)]
MOST_PROMPTS = 64
TEXT = {"type": "text"}  # the form that is none
WITHOUT_EFFECT = frozenset(("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"))
"""What clients send that changes no answer here. Any other key that is not known is refused: it would be lost in silence."""


@dataclass(frozen=True)
class StreamOptions:
    include_usage: bool = False


@dataclass(frozen=True, kw_only=True)
class Call(Sampling):
    """What both kinds of calls ask; ``sampling`` is how each answer is to be."""

    model: Text
    temperature: NonNegative = 1.0
    n: Samples = 1
    stream: bool = False
    stream_options: StreamOptions = field(default_factory=StreamOptions)
    response_format: dict[str, object] | None = None
    structured_outputs: dict[str, object] | None = None  # as vLLM calls it: {"regex": ...} or {"json": schema}

    kind: ClassVar[str]

    @classmethod
    def read(cls: type[C], body: Mapping[str, Any]) -> C:
        """Raises UserError: it says something that is not known here, or not so."""
        known = {key: value for key, value in body.items() if value is not None and key not in WITHOUT_EFFECT}
        if isinstance(bias := known.get("logit_bias"), Mapping):
            known["logit_bias"] = {int(token) if str(token).isdecimal() else token: value for token, value in bias.items()}
        return from_mapping(cls, cls.renamed(known), "the request")

    @classmethod
    def renamed(cls, body: dict[str, Any]) -> dict[str, Any]:
        return body

    def sampling(self, grammars: Grammars | None) -> Sampling:
        """``grammars`` make the form that is asked for; see ``wants_form``."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(Sampling)}
        return Sampling(**values | {"grammar": grammars and self._form(grammars)})

    @property
    def wants_form(self) -> bool:
        return self.structured_outputs is not None or self.response_format not in (None, TEXT)

    def _form(self, grammars: Grammars) -> Grammar:
        if self.structured_outputs is None:
            match asked := self.response_format or {}:
                case {"type": "json_object"} if len(asked) == 1:
                    return grammars.json_schema({"type": "object"})
                case {"type": "json_schema", "json_schema": {"schema": dict(schema)}} if len(asked) == 2:
                    return grammars.json_schema(schema)
            raise UserError(
                'response_format must be {"type": "text"}, {"type": "json_object"}, or '
                '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
            )
        if self.response_format not in (None, TEXT):
            raise UserError("the request: an answer has one form, by response_format or by structured_outputs")
        match self.structured_outputs:
            case {"regex": str(pattern)} if len(self.structured_outputs) == 1:
                return grammars.regex(pattern)
            case {"json": dict(schema)} if len(self.structured_outputs) == 1:
                return grammars.json_schema(schema)
        raise UserError('structured_outputs must be {"regex": text} or {"json": schema}')


@dataclass(frozen=True, kw_only=True)
class CompletionCall(Call):
    """Texts to go on with."""

    prompt: object
    max_tokens: Annotated[int, Bounds(least=1)] = 16

    kind = "text_completion"

    @property
    def prompts(self) -> list[str | list[int]]:
        """Texts, or token ids."""
        return _several("prompt", self.prompt)


@dataclass(frozen=True, kw_only=True)
class EmbeddingCall:
    """Texts to be told by numbers."""

    model: Text
    input: object
    encoding_format: Literal["float", "base64"] = "float"

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> "EmbeddingCall":
        return from_mapping(cls, {key: body[key] for key in body if body[key] is not None and key != "user"}, "the request")

    @property
    def texts(self) -> list[str | list[int]]:
        """Texts, or token ids."""
        return _several("input", self.input)

    def answer(self, found: Sequence[Tensor], tokens: int) -> dict[str, Any]:
        """``found``: [D] of each text. ``tokens``: of all."""
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        data = [{"object": "embedding", "index": n, "embedding": self._written(one)} for n, one in enumerate(found)]
        return {"object": "list", "data": data, "model": self.model, "usage": usage}

    def _written(self, embedding: Tensor) -> list[float] | str:
        values = embedding / embedding.norm()
        if self.encoding_format == "float":
            return values.tolist()
        return base64.b64encode(values.float().cpu().numpy().astype("<f4").tobytes()).decode()


def _several(name: str, given: Any) -> list[str | list[int]]:
    several: list[Any] = given if isinstance(given, list) and given and not _is_numbers(given) else [given]
    if not all(isinstance(one, str) or _is_numbers(one) for one in several):
        raise UserError(f"{name} must be a text or a list of token ids, or a list of either")
    if len(several) > MOST_PROMPTS:
        raise UserError(f"a request may have {MOST_PROMPTS} prompts, found {len(several)}")
    return several


def _is_numbers(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(one) is int for one in given)


@dataclass(frozen=True, kw_only=True)
class ChatCall(Call):
    """A conversation to be answered."""

    messages: tuple[dict[str, object], ...]
    tools: tuple[dict[str, object], ...] = ()
    tool_choice: object = "auto"
    parallel_tool_calls: bool = True  # False: an answer has one call at most
    max_tokens: Annotated[int, Bounds(least=1)] = 2**31  # as many as there is room for

    kind = "chat.completion"

    @property
    def offered(self) -> tuple[dict[str, object], ...]:
        """Tools that may be called."""
        return () if self.tool_choice == "none" else self.tools

    @property
    def forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice not in ("auto", "none")

    @property
    def tool(self) -> str | None:
        """The name of the tool that must be called; None: any."""
        match self.tool_choice:
            case "auto" | "none" | "required":
                return None
            case {"type": "function", "function": {"name": str(name)}}:
                return name
        raise UserError(
            'tool_choice must be "auto", "none", "required" or {"type": "function", "function": {"name": ...}}, '
            f"found {json.dumps(self.tool_choice)}"
        )

    @classmethod
    def renamed(cls, body: dict[str, Any]) -> dict[str, Any]:
        if "max_completion_tokens" in body:
            body["max_tokens"] = body.pop("max_completion_tokens")
        wanted, most = body.pop("logprobs", False), body.pop("top_logprobs", None)
        if not isinstance(wanted, bool) or (most is not None and not wanted):
            raise UserError("the request: logprobs must be true or false, and true where top_logprobs is given")
        return body | ({"logprobs": most or 0} if wanted else {})


class Writer:
    """Writes the answers of one call. Those of a chat begin with their first letter: a template may leave a blank before.

    Args:
        form: in which the model calls the tools that are offered to it; None: there are none.
    """

    def __init__(self, call: Call, tokenizer: Tokenizer, form: CallForm | None = None):
        self.id = f"{'chatcmpl' if isinstance(call, ChatCall) else 'cmpl'}-{uuid.uuid4().hex}"
        self._call, self._tokenizer, self._created = call, tokenizer, int(time.time())
        self._names = {number: name for name, number in tokenizer.special.items()}
        self._begun: set[int] = set()  # answers of which there is text
        how = (call.forced, not call.parallel_tool_calls) if isinstance(call, ChatCall) else ()
        self._readers = {number: CallReader(form, *how) for number in range(call.n)} if form else {}

    def whole(self, requests: Sequence[Running]) -> dict[str, Any]:
        choices = [
            self._choice(number, request.text, request.choices, request, request.finish_reason)
            for number, request in enumerate(requests)
        ]
        return self._head(self._call.kind) | {"choices": choices, "usage": self.usage(requests)}

    def first(self, number: int) -> dict[str, Any]:
        """The chunk that begins an answer of a chat."""
        choice = {"index": number, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return self._chunk([choice])

    def part(self, number: int, text: str, choices: Sequence[TokenChoice], end: Running | None) -> dict[str, Any] | None:
        """The chunk of what has come to an answer; ``end``: its request, if that is all. None: nothing of it is told yet."""
        choice = self._choice(number, text, choices, end, end.finish_reason if end else None, streams=True)
        told = choice.get("text") or choice.get("delta") or choice["logprobs"] or end
        return self._chunk([choice]) if told else None

    def last(self, requests: Sequence[Running]) -> dict[str, Any]:
        """The chunk that says how much it was."""
        return self._chunk([]) | {"usage": self.usage(requests)}

    def usage(self, requests: Sequence[Running]) -> dict[str, int]:
        prompts = sum(len(request.prompt) for request in requests[:: self._call.n])
        answers = sum(len(request.answer) for request in requests)
        return {"prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": prompts + answers}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._call.model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chat = isinstance(self._call, ChatCall)
        return self._head("chat.completion.chunk" if chat else "text_completion") | {"choices": choices}

    def _choice(
        self,
        number: int,
        text: str,
        choices: Sequence[TokenChoice],
        request: Running | None,
        reason: Reason | None,
        streams: bool = False,
    ) -> dict[str, Any]:
        logprobs = self._logprobs(choices) if self._call.logprobs is not None and choices else None
        calls: list[dict[str, Any]] = []
        if reader := self._readers.get(number):
            text, calls = reader.add(text, last=reason is not None)
        told = "tool_calls" if reason == "stop" and reader and reader.count else reason
        choice: dict[str, Any] = {"index": number, "logprobs": logprobs, "finish_reason": told}
        if isinstance(self._call, ChatCall) and number not in self._begun and not self._call.wants_form:
            text = text.lstrip()
        self._begun |= {number} if text else set()
        if not isinstance(self._call, ChatCall):
            choice["text"] = text
        elif streams:
            choice["delta"] = ({"content": text} if text else {}) | ({"tool_calls": calls} if calls else {})
        else:
            whole = [{key: value for key, value in one.items() if key != "index"} for one in calls]
            said = {"content": text or None, "tool_calls": whole} if calls else {"content": text}
            choice["message"] = {"role": "assistant", "refusal": None} | said
        if request and request.expert_load is not None:
            choice["expert_load"] = request.expert_load.tolist()
        return choice

    def _logprobs(self, choices: Sequence[TokenChoice]) -> dict[str, Any]:
        if isinstance(self._call, ChatCall):
            told = [
                self._told(choice.token, choice.logprob)
                | {"top_logprobs": [self._told(token, logprob) for token, logprob in choice.likeliest]}
                for choice in choices
            ]
            return {"content": told, "refusal": None}
        return {
            "tokens": [self._text(choice.token) for choice in choices],
            "token_logprobs": [choice.logprob for choice in choices],
            "top_logprobs": [{self._text(token): logprob for token, logprob in c.likeliest} for c in choices],
        }

    def _told(self, token: int, logprob: float | None) -> dict[str, Any]:
        piece = self._tokenizer.pieces[token]  # nothing for a special token, which writes nothing
        return {"token": self._text(token), "logprob": logprob, "bytes": list(piece) if piece else None}

    def _text(self, token: int) -> str:
        return self._names.get(token) or self._tokenizer.pieces[token].decode(errors="replace")


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
