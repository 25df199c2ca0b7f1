"""What a client's call asks of the model: a prompt, how the answer is to be, and how it calls tools."""

import threading
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace

from accessory.console import listed
from accessory.data.templates import get_template
from accessory.errors import UserError
from accessory.infer.client_images import allowed_images
from accessory.infer.meta import MetaModel
from accessory.infer.openai_api import Call, ChatCall, CompletionCall, EmbeddingCall
from accessory.infer.prompts import Prompt, encode_prompts
from accessory.infer.sampling import Sampling
from accessory.infer.tool_calls import FORMS, CallForm, call_form

DECODING = threading.BoundedSemaphore(2)  # requests whose images are decoded at a time: pixels are many times what is sent


def asked_in_chat(
    model: MetaModel, call: ChatCall, adapter: str | None, template: str | None, hosts: Collection[str]
) -> tuple[tuple[Prompt, Sampling], CallForm | None]:
    """What asks for an answer, how it is to be, and in which form it calls tools, if there are any.

    Args:
        hosts: machines from which images may be fetched.
    """
    messages = [m | {"role": "system"} if m.get("role") == "developer" else m for m in call.messages]
    tool, single, form = call.tool, not call.parallel_tool_calls, None
    with DECODING if model.llma.sight else nullcontext():
        prompt, stops = model.asked(allowed_images(messages, hosts), template, adapter=adapter, tools=call.offered)
    sampling = _sampling(model, call, adapter).stopping_at(stops)
    if call.offered:
        form = call_form(get_template(template, model.tokenizer) if template else model.template_of(adapter))
    if form:
        sampling = replace(sampling, shown=(form.begin, form.end))
        if single and form.end:
            sampling = sampling.stopping_at((form.end,))
    if call.forced:
        if form is None or sampling.grammar:
            raise UserError(
                "tool_choice: an answer can be made a call where tools are given, no response_format is, and the chat "
                f"template writes calls behind {listed([one.begin for one in FORMS])}"
            )
        special = model.tokenizer.special
        begin = [special[form.begin]] if form.begin in special else model.tokenizer.encode_within(form.begin)
        prompt = prompt._replace(tokens=[*prompt.tokens, *begin])
        sampling = replace(sampling, grammar=model.grammars_of(adapter).json_schema(form.schema(call.tools, tool, single)))
    return (prompt, sampling), form


def asked_to_continue(model: MetaModel, call: CompletionCall, adapter: str | None) -> list[tuple[Prompt, Sampling]]:
    sampling = _sampling(model, call, adapter)
    asked = encode_prompts(model.tokenizer, call.prompts, None, model.llma.sight, bos=True, eos=False)
    return [(prompt, sampling) for prompt in asked]


def asked_to_embed(model: MetaModel, call: EmbeddingCall, longest: int) -> list[list[int]]:
    """Token ids, at most ``longest`` of each text."""
    found = [prompt.tokens for prompt in encode_prompts(model.tokenizer, call.texts, None, None, bos=True, eos=False)]
    for number, tokens in enumerate(found):
        if not 0 < len(tokens) <= longest:
            raise UserError(f"input {number} has {len(tokens)} tokens: there may be {longest}, and must be one")
        if not all(0 <= token < model.llma.args.vocab_size for token in tokens):
            raise UserError(f"input {number} must have tokens from 0 to {model.llma.args.vocab_size - 1}")
    return found


def _sampling(model: MetaModel, call: Call, adapter: str | None) -> Sampling:
    return call.sampling(model.grammars_of(adapter) if call.wants_form else None)
