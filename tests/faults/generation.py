"""What a model says: its cache, what runs together, its choice of tokens, their text."""

from faults.checks import CACHED
from faults.fault import Fault

ENGINE, PAGES, SAMPLING = "accessory/infer/engine.py", "accessory/infer/pages.py", "accessory/infer/sampling.py"
META, CACHE, TEXT = "accessory/infer/meta.py", "accessory/model/cache.py", "accessory/infer/text.py"
SERVED = 'certify --only "served on mp=1" tuning=full weights=plain'
SERVED_ON_2 = 'certify --only "served on mp=2" tuning=lora'
SERVED_LORA = 'certify --only "served on mp=1" layout=mixtral_sparse weights=plain'
GREEDY = "'tests/test_generate.py::test_cached_generation_equals_recomputing[1]'"
SCHEDULES = "'tests/test_engine.py::test_random_schedules[9-False]'"
GRAPH, REPLAYED = (
    "accessory/infer/decode_graph.py",
    "'tests/test_decode_graph.py::test_answers_of_steps_that_are_replayed[no window]'",
)
WHOLE_TEXT = "tests/test_engine.py::test_text_in_parts_is_the_text_as_a_whole"
STOPPED = "tests/test_engine.py::test_a_stop_is_cut_off_and_nothing_of_it_is_given_out_before"

STREAMS, BESIDE = "accessory/infer/streams.py", "'tests/test_streams.py::test_streams_beside_one_another_end_as_alone[1]'"

FAULTS = (
    # several that ask
    Fault(
        "a stream whose answer others' steps have ended stays where it last looked",
        STREAMS,
        "while not ended:",
        "while not (ended or engine.is_idle):",
        BESIDE,
    ),
    Fault(
        "of a list that is refused the first prompts are answered",
        STREAMS,
        "                engine.cancel(request)\n            raise",
        "                assert request\n            raise",
        BESIDE,
    ),
    # the cache
    Fault(
        "a value is kept where another token's key is",
        CACHE,
        "self.values.flatten(0, 1).index_copy_(0, self.view.places, v)",
        "self.values.flatten(0, 1).index_copy_(0, self.view.places.roll(1), v)",
        CACHED,
    ),
    Fault(
        "a chunk is behind one token less than it is",
        CACHE,
        "places[chunk.past - first :, None] - places",
        "places[chunk.past - first :, None] - places - 1",
        CACHED,
    ),
    Fault(
        "the cached window has one key more",
        CACHE,
        "(behind >= 0) & (behind < window) if window",
        "(behind >= 0) & (behind <= window) if window",
        CACHED,
    ),
    Fault(
        "a single token does not see itself",
        CACHE,
        "self.used[self.singles].unsqueeze(1) - 1 - kept",
        "self.used[self.singles].unsqueeze(1) - 2 - kept",
        CACHED,
    ),
    Fault(
        "tokens are kept by their place in the document, not in its pages",
        CACHE,
        "past = [all_past - begin for",
        "past = [all_past - 0 * begin for",
        SCHEDULES,
    ),
    # steps that are replayed
    Fault(
        "the pages of a graph are those of its first step",
        GRAPH,
        "table=numbers[4 * size :].view(size, -1).int(),",
        'table=self.__dict__.setdefault(f"pages of {size}", numbers[4 * size :].view(size, -1).int()),',
        REPLAYED,
    ),
    Fault(
        "a graph has the positions of its first step",
        GRAPH,
        "Documents(borders[1:].long(), positions,",
        'Documents(borders[1:].long(), self.__dict__.setdefault(f"positions of {size}", positions.clone()),',
        REPLAYED,
    ),
    Fault(
        "whether a step continues others is asked of the GPU",
        "accessory/model/attention.py",
        "not cache.view.continues:",
        "not (cache.view.used > 1).any():",
        REPLAYED,
    ),
    Fault(
        "the host knows in a graph where tokens stand",
        "accessory/model/decoder.py",
        "rotations(documents.positions,",
        "rotations(documents.positions.new_tensor(documents.positions.tolist()),",
        REPLAYED,
    ),
    Fault(
        "the row that fills up a graph is kept where the first one's is",
        GRAPH,
        "+ [0] * (size - len(own))\n        fields",
        "+ [self._cache.place(plan.pages[0], before[0])] * (size - len(own))\n        fields",
        REPLAYED,
    ),
    Fault(
        "a graph has no room for the page that a window begins in",
        GRAPH,
        "min(longest, cache.window + cache.page_size)",
        "min(longest, cache.window)",
        "'tests/test_decode_graph.py::test_answers_of_steps_that_are_replayed[a window within a page]'",
    ),
    Fault(
        "rows that fill up a graph count as tokens of experts",
        GRAPH,
        "counts[:, :count]",
        "counts",
        "tests/test_decode_graph.py::test_experts_of_triton_in_a_graph",
    ),
    Fault(
        "an adapter's requests are replayed as the base's",
        GRAPH,
        "not single or any(plan.members) or",
        "not single or",
        "'tests/test_decode_graph.py::test_answers_of_steps_that_are_replayed[some with adapters]'",
    ),
    Fault(
        "kernels for which the host waits are recorded",
        GRAPH,
        "return any(layer.waits(rows) for",
        "return any(False for",
        "'tests/test_decode_graph.py::test_what_can_be_recorded[a loop]'",
    ),
    Fault(
        "a step of more rows than are multiplied by codes is recorded",
        GRAPH,
        "host_waits(self._model, size)",
        "host_waits(self._model, 1)",
        "tests/test_decode_graph.py::test_products_by_codes_in_a_graph",
    ),
    Fault(
        "whether steps wait is asked as if they were trained with",
        GRAPH,
        "@torch.no_grad()\n",
        "",
        "'tests/test_decode_graph.py::test_what_can_be_recorded[quantised experts]'",
    ),
    # what runs together
    Fault(
        "a page that is full is known by its own tokens alone",
        PAGES,
        "hashlib.sha256(before + repr(",
        "hashlib.sha256(repr(",
        "tests/test_engine.py::test_the_same_tokens_behind_others_are_no_shared_beginning",
    ),
    Fault(
        "a page is given away while another holds it",
        PAGES,
        "if self._holders[page]:",
        "if self._holders[page] > 1:",
        "tests/test_engine.py::test_a_page_stays_while_one_of_its_holders_does",
    ),
    Fault("a shared page is not held", PAGES, "self._holders[page] += 1", "self._holders[page] += 0", SERVED),
    Fault(
        "a prompt that is known whole is not run at all",
        ENGINE,
        "page_keys(request.prompt[:-1], self._page, request.root)",
        "page_keys(request.prompt, self._page, request.root)",
        "tests/test_engine.py::test_a_prompt_that_the_cache_has_whole",
    ),
    Fault(
        "what a cancelled request was promised stays promised",
        ENGINE,
        "self.pool.reserved -= request.promised",
        "self.pool.reserved -= 0",
        SERVED,
    ),
    Fault(
        "a page is given back while the window still reaches it",
        ENGINE,
        "(request.in_cache - window + 1) // self._page",
        "(request.in_cache - window + 2 + self._page // 2) // self._page",
        SCHEDULES,
    ),
    Fault(
        "the next token is taken of the last but one",
        ENGINE,
        "Logits(documents.ends[plan.ends].long())",
        "Logits((documents.ends[plan.ends].long() - 1).clamp(min=0))",
        GREEDY,
    ),
    Fault(
        "a chunk in the middle of a prompt is answered",
        ENGINE,
        "if request.in_cache + count == len(request.tokens)",
        "if request.in_cache + count <= len(request.tokens)",
        SERVED,
    ),
    Fault(
        "other ranks run what they planned themselves, which is nothing",
        ENGINE,
        "return known[:count]",
        "return numbers",
        SERVED_ON_2,
    ),
    Fault(
        "answers get each other's tokens",
        ENGINE,
        "zip(ending, choices, strict=True)",
        "zip(ending, choices[::-1], strict=True)",
        SERVED,
    ),
    # the choice
    Fault(
        "a bias is no reason not to take the likeliest",
        SAMPLING,
        "bent = self.logit_bias or",
        "bent = False or",
        "tests/test_engine.py::test_log_probabilities",
    ),
    Fault(
        "what is bent or drawn is chosen by other answers' logits",
        SAMPLING,
        "_choose_bent(logits[others].double()",
        "_choose_bent(logits[: len(others)].double().clone()",
        SERVED,
    ),
    Fault("the temperature is ignored", SAMPLING, "keepdim=True)) / column", "keepdim=True)) + 0 * column", SERVED),
    Fault(
        "a low temperature overflows",
        SAMPLING,
        "(scores - scores.amax(-1, keepdim=True))",
        "scores",
        "'tests/test_generate.py::test_no_temperature_is_too_low'",
    ),
    Fault(
        "the token that reaches top-p is cut off too",
        SAMPLING,
        "before = probs.cumsum(-1) - probs",
        "before = probs.cumsum(-1)",
        SERVED,
    ),
    Fault(
        "top-p is of all, not of the top-k that are left",
        SAMPLING,
        "probs = probs / probs.sum(-1, keepdim=True)",
        "probs = probs / 1.0",
        SERVED,
    ),
    Fault(
        "min-p is absolute",
        SAMPLING,
        "column([sampling.min_p for sampling in how]) * probs[:, :1]",
        "column([sampling.min_p for sampling in how])",
        SERVED,
    ),
    Fault(
        "a drawn place is taken for a token",
        SAMPLING,
        "return order.gather(1, at).squeeze(1)",
        "return at.squeeze(1)",
        SERVED,
    ),
    Fault(
        "a draw depends on the row that a request has in the batch",
        SAMPLING,
        "_uniform(how[n].seed, len(answers[n]))",
        "_uniform(how[n].seed, len(answers[n]) + n)",
        SERVED,
    ),
    Fault(
        "every token of an answer is drawn alike",
        SAMPLING,
        "_uniform(how[n].seed, len(answers[n]))",
        "_uniform(how[n].seed, 0)",
        SERVED,
    ),
    Fault(
        "a penalty for repetition makes what is unlikely likelier",
        SAMPLING,
        "torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)",
        "logits / sampling.repetition_penalty",
        "tests/test_engine.py::test_a_repetition_is_made_unlikelier_whatever_the_sign_of_its_logit",
    ),
    Fault(
        "the prompt is no repetition",
        SAMPLING,
        "sorted({*prompt, *answer})",
        "sorted({*prompt[:0], *answer}) or prompt[:1]",
        SERVED,
    ),
    Fault(
        "the frequency penalty counts once",
        SAMPLING,
        "sampling.frequency_penalty * times",
        "sampling.frequency_penalty * times.clamp(max=1)",
        SERVED,
    ),
    Fault("a bias takes the place of a logit", SAMPLING, "row[token] += bias", "row[token] = bias", SERVED),
    Fault(
        "log-probabilities are of what was drawn from",
        SAMPLING,
        "_told(logits[n], token, how[n].logprobs)",
        "_told(logits[n] / how[n].temperature, token, how[n].logprobs)",
        "tests/test_engine.py::test_log_probabilities",
    ),
    Fault(
        "an answer may be a token that stands for nothing",
        ENGINE,
        "logits[:, :vocabulary],",
        "logits,",
        "tests/test_generate.py::test_tokens_beyond_the_tokenizer_are_never_chosen",
    ),
    # its text
    Fault(
        "a character is given out in pieces",
        TEXT,
        "(text.endswith(BROKEN) and not last)",
        "(text.endswith(BROKEN) and last)",
        WHOLE_TEXT,
    ),
    Fault(
        "a piece is decoded without what stands before it",
        TEXT,
        "self._begin, self._decoded = self._decoded, len(self._ids)",
        "self._begin = self._decoded = len(self._ids)",
        WHOLE_TEXT,
    ),
    Fault("what begins like a stop is given out", TEXT, "keep = 0 if last else", "keep = 0 if True else", STOPPED),
    Fault("what only began like a stop is lost", TEXT, "keep = 0 if last else", "keep = 0 if False else", STOPPED),
    # scores
    Fault(
        "a text is scored by the logits behind each token",
        META,
        "logits[start - 1 : -1])",
        "logits[start:])",
        "'tests/test_generate.py::test_evaluate_examples' -k scores",
    ),
)
