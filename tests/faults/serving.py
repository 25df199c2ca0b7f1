"""What clients of the server get: its answers, its forms, its limits."""

from faults.fault import Fault

ENGINE, GRAMMAR, SAMPLING = "accessory/infer/engine.py", "accessory/infer/grammar.py", "accessory/infer/sampling.py"
API, SERVER, SERVICE = "accessory/infer/openai_api.py", "accessory/infer/server.py", "accessory/infer/service.py"
CALLS, QUESTIONS = "accessory/infer/tool_calls.py", "accessory/infer/client_questions.py"
PIECES = "accessory/data/tokenizer_models.py"
TEST = "tests/test_server.py::test_"
STREAM, FORMS, LOGPROBS = f"{TEST}a_stream_is_the_same_in_pieces", f"{TEST}answers_of_a_form", f"{TEST}logprobs"
LEAVES, LOAD = f"{TEST}a_client_that_leaves_is_not_worked_for", f"{TEST}the_experts_that_an_answer_took"
REFUSED = f"{TEST}what_cannot_be_asked_is_refused_in_a_sentence"
PIECED = "tests/test_engine.py::test_pieces_are_what_tokens_write"
ENDS = f"{TEST}what_was_begun_is_ended_before_the_server_is"
CALLING = "tests/test_tool_calls.py::test_"
PARTED, CALLED = f"{CALLING}calls_are_parted_from_what_is_said_however_the_text_comes", f"{CALLING}a_call_can_be_asked_for"
EMBEDDING = f"{TEST}an_embedding_is_the_mean_of_transformers_hidden_states"

FAULTS = (
    Fault(
        "every sample has the first one's seed",
        SERVER,
        "sampling.seeded(n))",
        "sampling.seeded(0))",
        f"{TEST}samples_have_seeds_that_follow_one_another",
    ),
    Fault(
        "what comes while a client reads takes the place of what came before",
        SERVICE,
        "        self._news += news\n",
        "        self._news = list(news)\n",
        f"{TEST}sixty_four_clients",
    ),
    Fault(
        "a completion loses the blank it begins with",
        QUESTIONS,
        "joined=True",
        "joined=False",
        f"{TEST}texts_are_gone_on_with",
    ),
    Fault(
        "a form's leading blank is no part of the answer",
        ENGINE,
        "joined=sampling.joined or matcher is not None",
        "joined=sampling.joined",
        FORMS,
    ),
    Fault(
        "the request's own blank is taken off a form",
        API,
        " and not self._call.wants_form:",
        ":",
        FORMS,
    ),
    Fault(
        "a form without its type is none",
        API,
        "self.response_format not in (None, TEXT)\n\n",
        '(self.response_format or {}).get("type", "text") != "text"\n\n',
        REFUSED,
    ),
    Fault(
        "a token that has written nothing yet is not told of",
        API,
        'choice.get("delta") or choice["logprobs"] or end',
        'choice.get("delta") or end',
        LOGPROBS,
    ),
    Fault(
        "of a forced call the stream has a chunk for every token, though it tells nothing",
        API,
        "return self._chunk([choice]) if told else None",
        "return self._chunk([choice])",
        "tests/test_tool_calls.py::test_a_call_can_be_asked_for",
    ),
    Fault(
        "an answer goes on when its reader has left",
        SERVER,
        '"server_error"))\n    finally:\n        answers.cancel()',
        '"server_error"))\n    finally:\n        pass',
        LEAVES,
    ),
    Fault(
        "an answer in one piece goes on when its client has left",
        SERVER,
        "            gone.cancel(), whole.cancel()\n            answers.cancel()\n",
        "            gone.cancel(), whole.cancel()\n",
        LEAVES,
    ),
    Fault(
        "a prompt is counted for each of its answers",
        API,
        "for request in requests[:: self._call.n])",
        "for request in requests)",
        f"{TEST}usage_counts_a_prompt_once",
    ),
    Fault(
        "a chat ends at no stop of its template",
        QUESTIONS,
        ".stopping_at(stops)",
        ".stopping_at(())",
        f"{TEST}a_chat_ends_where_its_template_does",
    ),
    Fault("a logit bias finds no token", API, "int(token) if str(token).isdecimal()", "0 if str(token).isdecimal()", FORMS),
    Fault("the form stays at its beginning", ENGINE, "request.matcher.add(choice.token)", "pass", FORMS),
    Fault(
        "the form is asked for what it forbids", SAMPLING, "row.masked_fill_(~possible", "row.masked_fill_(possible", FORMS
    ),
    Fault(
        "answers share how far they have come in their form",
        GRAMMAR,
        "Matcher(self._begin.deep_copy())",
        "Matcher(self._begin)",
        FORMS,
    ),
    Fault("JSON has blanks in it", GRAMMAR, '{"whitespace_flexible": False}', '{"whitespace_flexible": True}', FORMS),
    Fault("a byte's token writes its name", PIECES, "return bytes([int(byte[1], 16)])", "return piece.encode()", PIECED),
    Fault(
        "only the last step's experts are counted",
        ENGINE,
        "counts[:, number] + (0 if request.expert_load is None else request.expert_load)",
        "counts[:, number]",
        LOAD,
    ),
    Fault("the server counts its experts' documents", ENGINE, "counts.sum(1)", "(counts > 0).sum(1)", LOAD),
    Fault("any key opens", SERVER, "if key and not hmac", "if False and not hmac", f"{TEST}too_many_are_told_to_come_again"),
    Fault("any number may wait", SERVICE, "> self._most_waiting:", "> 10**9:", f"{TEST}too_many_are_told_to_come_again"),
    Fault(
        "whichever adapter is asked, the base answers",
        SERVER,
        "return None if model == self.name else model",
        "return None",
        f"{TEST}an_adapter_is_asked_for_by_its_name",
    ),
    Fault("a tag in pieces is said", CALLS, " - overlap(self._held, self._form.begin)]", "]", PARTED),
    Fault(
        "what cannot be read as a call is lost",
        CALLS,
        "* (not self._forced) + written + end",
        "* (not self._forced)",
        PARTED,
    ),
    Fault(
        "a form is begun with a blank that the tokenizer puts before it",
        GRAMMAR,
        'if b"".join(self.tokens[token] for token in ids) == text:',
        "if ids:",
        f"{CALLING}what_the_model_calls_comes_as_calls_whole_or_in_pieces",
    ),
    Fault("calls have one number", CALLS, "enumerate(calls, self.count)", "enumerate(calls)", PARTED),
    Fault("whichever tool is asked for, any is called", CALLS, 'if name in (None, function.get("name"))', "if True", CALLED),
    Fault(
        "where one call is wanted, the answer goes on to others",
        QUESTIONS,
        "if single and form.end:",
        "if False:",
        f"{CALLING}what_the_model_calls_comes_as_calls_whole_or_in_pieces",
    ),
    Fault(
        "where one call is wanted, all of a list are made",
        CALLS,
        "found[:1] if self._single else found",
        "found",
        f"'{CALLING}the_first_of_several_calls_is_the_only_one_where_one_is_wanted[[TOOL_CALLS]]'",
    ),
    Fault("the token before calls writes nothing", QUESTIONS, "shown=(form.begin, form.end)", "shown=()", CALLED),
    Fault("an embedding is its last token's", "accessory/model/head.py", "part.mean(0)", "part[-1]", EMBEDDING),
    Fault("an embedding has any length", API, "embedding / embedding.norm()", "embedding", EMBEDDING),
    Fault("a body has no end", SERVER, "if len(body) > most_bytes:", "if False:", REFUSED),
    Fault("whatever a model is called, it is answered for", SERVER, "if model not in self.names:", "if False:", REFUSED),
    Fault("a text is read as JSON", SERVER, '!= "application/json":', '== "x":', f"{TEST}a_page_in_a_browser_cannot_ask"),
    Fault("what ends takes more", SERVICE, "            if self.is_closing:\n                raise Closing\n", "", ENDS),
    Fault("what ends cuts off", SERVICE, "(engine.is_idle or time.monotonic()", "(True or time.monotonic()", ENDS),
)
