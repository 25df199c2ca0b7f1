"""``accessory serve``, asked by OpenAI's own client and by those who mean no good."""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import httpx
import openai
import pytest
import torch
from jobs import Job
from models import weights
from ranks import run_ranks
from test_chat import ARGS, QUESTIONS, TALK, write_model
from test_served_adapters import EVERYWHERE, save_adapter
from test_transformers import transformers_model

from accessory.infer.sampling import Sampling
from accessory.model.meta import MetaModel

KEY = "correct horse"
MESSAGES = [{"role": "user", "content": QUESTIONS[0]}]
GREEDY = {"model": "model", "temperature": 0, "max_tokens": 12}
TEXTS = ["the list of", "a", "and then every answer is not", "words " * 9, "made from tokens"]


def expected(home):
    """What the model answers by itself: chats, texts gone on with, the log-probabilities of one of them; and with an
    adapter laid over it."""
    chats = write_model(home)
    save_adapter(home / "model", home / "mine", EVERYWHERE, 5, ARGS)
    model = MetaModel.from_pretrained(home / "model", dtype=torch.float64, device="cpu")
    mine = MetaModel.from_pretrained([home / "model", home / "mine"], dtype=torch.float64, device="cpu")
    continued = []
    for ids in (model.tokenizer.encode(text, bos=True, eos=False) for text in TEXTS):
        request = model.engine.submit(ids, Sampling(max_tokens=12))
        assert list(model.engine.run())
        continued.append(model.tokenizer.decode(ids + request.answer).removeprefix(model.tokenizer.decode(ids)))
    ids = model.tokenizer.encode(TEXTS[0], bos=True, eos=False)
    (logits,) = model.compute_logits([ids])
    top = logits[-1].log_softmax(-1).topk(3).values.tolist()
    theirs = transformers_model(weights(ARGS, dtype=torch.float32), ARGS).model
    with torch.no_grad():
        means = [
            theirs(torch.tensor([model.tokenizer.encode(text, True, False)])).last_hidden_state[0].mean(0) for text in TEXTS
        ]
    adapted = mine.chat([QUESTIONS[0]], max_gen_len=12)[0].lstrip()
    return {"chats": [answer.lstrip() for answer in chats], "texts": continued, "top": top, "mine": adapted, "means": means}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def right(home):
    return run_ranks(1, expected, home)[0]


@contextlib.contextmanager
def serving(home, *words, key=""):
    """A server and its address."""
    before = os.environ.get("ACCESSORY_API_KEY")
    os.environ["ACCESSORY_API_KEY"] = key
    job = Job("serve", home / "model", "--precision", "fp64", "--port", 0, *words)
    os.environ.pop("ACCESSORY_API_KEY")
    assert before is None
    with job:
        job.reach("Ctrl-C ends it.")
        yield job, re.search(r"http://[^/]+", job.out())[0]


@pytest.fixture(scope="module")
def address(home, right):
    with serving(home, "--lora", f"mine={home}/mine") as (_, address):
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def metric(address, name, **labels):
    """The sum of a metric's lines with these labels."""
    lines = [line for line in httpx.get(f"{address}/metrics").text.splitlines() if line.startswith(f"{name}{{")]
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(float(line.split()[-1]) for line in lines if all(label in line for label in wanted))


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- what OpenAI's client sees


def test_models(client):
    base, adapter = client.models.list()
    assert (base.id, adapter.id, adapter.parent) == ("model", "mine", "model")
    assert client.models.retrieve("model").max_model_len == 4096
    with pytest.raises(openai.NotFoundError, match="'yours' is not here; there is model, mine"):
        client.models.retrieve("yours")


def test_a_chat_is_answered_as_without_a_server(client, right):
    answer = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    (choice,) = answer.choices
    assert choice.message.content == right["chats"][0] and choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 12 and answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    again = client.chat.completions.create(messages=TALK, **GREEDY)
    assert again.choices[0].message.content == right["chats"][3]


def test_an_embedding_is_the_mean_of_transformers_hidden_states(client, right):
    expected = torch.stack([mean / mean.norm() for mean in right["means"]]).float()
    for encoding in ({}, {"encoding_format": "float"}):  # the client asks for base64 by itself
        answer = client.embeddings.create(model="model", input=TEXTS, **encoding)
        found = torch.tensor([one.embedding for one in answer.data])
        assert (found - expected).norm() < 1e-5 and answer.usage.prompt_tokens == answer.usage.total_tokens > len(TEXTS)
    for body, sentence in (
        ({"model": "mine", "input": "a"}, "embeddings are the base's"),
        ({"model": "model", "input": [[300]]}, "tokens from 0 to 299"),
        ({"model": "model", "input": "word " * 9000}, "there may be 4096"),
        ({"model": "model", "input": "a", "dimensions": 3}, "unknown key 'dimensions'"),
    ):
        with pytest.raises(openai.BadRequestError, match=sentence):
            client.embeddings.create(**body)


def test_an_adapter_is_asked_for_by_its_name(client, right):
    (mine, base) = (
        client.chat.completions.create(messages=MESSAGES, **GREEDY | {"model": model}).choices[0].message.content
        for model in ("mine", "model")
    )
    assert mine == right["mine"] and base == right["chats"][0] != mine


def test_a_stream_is_the_same_in_pieces(client, right):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.chat.completions.create(messages=MESSAGES, **GREEDY, **options)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == right["chats"][0] and len(pieces) > 5
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
    assert last.choices == [] and last.usage.completion_tokens == 12


def test_texts_are_gone_on_with(client, right):
    answer = client.completions.create(prompt=TEXTS, **GREEDY)
    assert [choice.text for choice in answer.choices] == right["texts"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3, 4]


def test_logprobs(client, right):
    told = client.completions.create(prompt=TEXTS[0], logprobs=3, **GREEDY).choices[0].logprobs
    assert sorted(told.top_logprobs[0].values(), reverse=True) == pytest.approx(right["top"])
    assert told.token_logprobs[0] == pytest.approx(right["top"][0])
    chat = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY).choices[0]
    assert len(chat.logprobs.content) == 12 and len(chat.logprobs.content[0].top_logprobs) == 2
    written = b"".join(bytes(token.bytes or []) for token in chat.logprobs.content).decode()
    assert written.lstrip() == chat.message.content
    chunks = client.chat.completions.create(messages=MESSAGES, logprobs=True, stream=True, **GREEDY)
    streamed = [one.logprob for chunk in chunks if (told := chunk.choices[0].logprobs) for one in told.content]
    assert streamed == pytest.approx([token.logprob for token in chat.logprobs.content])  # the prompt was in the cache


def test_usage_counts_a_prompt_once(client):
    usage = client.completions.create(prompt=[[5, 6, 7], [8]], n=2, **GREEDY | {"max_tokens": 3}).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 12, 16)


def test_a_chat_ends_where_its_template_does(client):
    """The dialog template's answers end with a line that begins with ###."""
    asked = {"model": "model", "messages": MESSAGES, "max_tokens": 30, "temperature": 0}
    written = {"structured_outputs": {"regex": "the list\n### Human: and then"}}
    choice = client.chat.completions.create(extra_body=written, **asked).choices[0]
    assert choice.message.content == "the list" and choice.finish_reason == "stop"


def test_samples_have_seeds_that_follow_one_another(client):
    asked = {"model": "model", "temperature": 1.3, "max_tokens": 12, "prompt": TEXTS[0]}
    several = [choice.text for choice in client.completions.create(n=3, seed=-2, **asked).choices]
    alone = [client.completions.create(seed=seed, **asked).choices[0].text for seed in (-2, -1, 0)]
    assert several == alone and len(set(several)) == 3
    everything = client.completions.create(seed=-2, extra_body={"top_k": -1}, **asked).choices[0].text
    assert everything == alone[0], "as vLLM's clients say it"


def test_a_stop_is_cut_off(client, right):
    text = right["texts"][0]
    stop = text[3:5]
    answer = client.completions.create(prompt=TEXTS[0], stop=[stop], **GREEDY).choices[0]
    assert answer.text == text[: text.index(stop)] and answer.finish_reason == "stop"


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["list", "words"]}, "sizes": {"type": "array", "items": {"type": "integer"}}},
    "required": ["name", "sizes"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_answers_of_a_form(client, temperature):
    asked = {"model": "model", "temperature": temperature, "max_tokens": 200, "seed": 1, "messages": MESSAGES}
    form = {"type": "json_schema", "json_schema": {"name": "words", "schema": SCHEMA}}
    bias = {"logit_bias": {"96": 20}}  # "]", so that it comes to an end
    answer = client.chat.completions.create(response_format=form, **asked, **bias).choices[0]
    found = json.loads(answer.message.content)
    assert answer.message.content == json.dumps(found, separators=(",", ":"))
    assert answer.finish_reason == "stop" and found["name"] in ("list", "words") and isinstance(found["sizes"], list)
    regex = {"structured_outputs": {"regex": "the (list|words){2,4}!"}}
    for sample in client.chat.completions.create(extra_body=regex, n=2, **asked).choices:
        assert re.fullmatch("the (list|words){2,4}!", sample.message.content)
    blanks = client.chat.completions.create(extra_body={"structured_outputs": {"regex": " {1,2}the "}}, **asked).choices[0]
    assert re.fullmatch(" {1,2}the ", blanks.message.content), "the blanks are part of the form"


def test_the_experts_that_an_answer_took(client, address):
    before = metric(address, "accessory:expert_tokens_total", layer="1")
    answer = client.completions.create(prompt=list(range(3, 40)), extra_body={"expert_load": True}, **GREEDY)
    layers = answer.choices[0].model_extra["expert_load"]
    assert [sum(layer) for layer in layers] == [2 * (37 + 11)] * 2, "two for each token but the last"
    assert metric(address, "accessory:expert_tokens_total", layer="1") - before == 2 * (37 + 11)


def test_a_client_that_leaves_is_not_worked_for(client, address):
    before = metric(address, "vllm:request_success_total", finished_reason="cancelled")
    stream = client.chat.completions.create(model="model", messages=MESSAGES, stream=True, max_tokens=4000, temperature=0)
    for _ in zip(range(4), stream, strict=False):
        pass
    stream.close()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{address}/v1/completions",
            json={"model": "model", "prompt": "a", "max_tokens": 4000, "temperature": 0},
            timeout=2,
        )
    until(lambda: metric(address, "vllm:request_success_total", finished_reason="cancelled") == before + 2)
    assert metric(address, "vllm:num_requests_running") == 0
    assert metric(address, "vllm:kv_cache_usage_perc") == 0


# ---- what is refused

CHAT = {"model": "model", "messages": MESSAGES}


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ("{", 400, "not JSON"),
        ("[" * 100_000, 400, "not JSON"),
        ([], 400, "must be an object"),
        ({}, 400, "the key 'model' is missing"),
        ({"model": "gpt"}, 400, "the key 'messages' is missing"),
        (CHAT | {"model": "gpt"}, 404, "the model 'gpt' is not here; there is model, mine"),
        (CHAT | {"temprature": 1}, 400, "unknown key 'temprature'; did you mean 'temperature'?"),
        (CHAT | {"temperature": -1}, 400, "temperature must be at least 0, found -1"),
        (CHAT | {"temperature": float("nan")}, 400, "temperature must be a finite number"),
        (CHAT | {"max_tokens": 0}, 400, "max_tokens must be at least 1"),
        (CHAT | {"max_tokens": "9"}, 400, "max_tokens: expected int"),
        (CHAT | {"n": 17}, 400, "n must be at least 1 and at most 16"),
        (CHAT | {"logit_bias": {"x": 1}}, 400, "logit_bias: expected int, found 'x'"),
        (CHAT | {"logit_bias": {"300": 1}}, 400, "logit_bias names token 300"),
        (CHAT | {"top_logprobs": 2}, 400, "logprobs must be true or false"),
        (CHAT | {"stop": 3}, 400, "stop: expected list"),
        (CHAT | {"grammar": {}}, 400, "unknown key 'grammar'"),
        (CHAT | {"shown": ["</s>"]}, 400, "unknown key 'shown'"),
        (CHAT | {"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, 'no place for a list of tools"'),
        (CHAT | {"messages": [MESSAGES[0] | {"name": "Bob"}]}, 400, "nothing here uses 'name': leave it out\""),
        (CHAT | {"tool_choice": "required"}, 400, "a call where tools are given"),
        (CHAT | {"messages": []}, 400, "'messages' must be a list of turns"),
        (CHAT | {"messages": ["a"]}, 400, "messages: expected"),
        (CHAT | {"messages": [*MESSAGES, *MESSAGES]}, 400, "turn 2 is from 'user', expected 'assistant'"),
        (CHAT | {"messages": TALK[:2]}, 400, "there is no question to answer"),
        (
            CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "'image_url' must be a text, or an object",
        ),
        (CHAT | {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "half a character"),
        (CHAT | {"model": "\ud800"}, 400, "half a character"),
        (CHAT | {"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "no room to answer in max_seq_len 4096"),
        (CHAT | {"response_format": {"type": "xml"}}, 400, "response_format must be"),
        (CHAT | {"response_format": {"json_schema": {"schema": {}}}}, 400, "response_format must be"),
        (CHAT | {"response_format": {"type": "json_object", "schema": {}}}, 400, "response_format must be"),
        (CHAT | {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, 400, "has one form"),
        (CHAT | {"structured_outputs": {}}, 400, "structured_outputs must be"),
        (CHAT | {"structured_outputs": {"regex": "("}}, 400, "not a regular expression"),
        (
            CHAT | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
            400,
            "not a JSON schema",
        ),
        (b" " * (2 * 2**20 + 1), 413, "may have 2097152 bytes"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(address, body, status, sentence):
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    answer = httpx.post(
        f"{address}/v1/chat/completions", content=content, headers={"content-type": "application/json"}, timeout=60
    )
    assert answer.status_code == status and sentence in json.dumps(answer.json()["error"]["message"], ensure_ascii=False)
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [("", None), ([], "prompt must be"), ([300], "tokens from 0 to 299"), ([[1], "a"], None), ([["a"]], "prompt must be")],
    ids=str,
)
def test_prompts_of_all_kinds(address, prompt, sentence):
    answer = httpx.post(f"{address}/v1/completions", json=GREEDY | {"prompt": prompt}, timeout=60).json()
    assert sentence in answer["error"]["message"] if sentence else answer["choices"]


def test_a_page_in_a_browser_cannot_ask(address):
    """It may send a form or a text to any server, but JSON only to one that lets it."""
    answer = httpx.post(f"{address}/v1/completions", content=json.dumps(GREEDY | {"prompt": "a"}))
    assert answer.status_code == 415 and "access-control-allow-origin" not in answer.headers


def test_a_public_server_needs_a_key(home, right):
    with Job("serve", home / "model", "--host", "0.0.0.0", "--port", 0) as job:
        assert job.codes() == [1] and "set ACCESSORY_API_KEY" in job.err()


@pytest.mark.parametrize(
    ("words", "missing", "extra"),
    [(("serve",), "uvicorn", "serve"), (("evaluate", "--tasks", "arc"), "lm_eval", "evaluate")],
    ids=["serve", "evaluate"],
)
def test_what_is_not_installed_is_named(home, right, words, missing, extra):
    with Job(words[0], home / "model", *words[1:], plant=f"import sys\nsys.modules[{missing!r}] = None") as job:
        assert (
            job.codes() == [1]
            and f'needs {missing}, which is not installed: pip install "accessory-moe[{extra}]"' in job.err()
        )
        assert "Traceback" not in job.err()


# ---- many at once


async def _mixed(address, right, rng):
    """One client's calls: each right, or ended by itself."""
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120) as client:
        for _ in range(2):
            number, kind = rng.randrange(len(TEXTS)), rng.randrange(6)
            if kind == 0:
                answer = await client.chat.completions.create(messages=MESSAGES, **GREEDY)
                assert answer.choices[0].message.content == right["chats"][0]
            elif kind == 1:  # reads slowly
                pieces = []
                async for chunk in await client.completions.create(prompt=TEXTS[number], stream=True, **GREEDY):
                    pieces.append(chunk.choices[0].text)
                    await asyncio.sleep(0.01)
                assert "".join(pieces) == right["texts"][number]
            elif kind == 2:  # leaves
                stream = await client.completions.create(
                    model="model", prompt=TEXTS[number], stream=True, max_tokens=3000, temperature=0
                )
                await anext(aiter(stream))
                await stream.close()
            elif kind == 3:
                with pytest.raises(openai.BadRequestError):
                    await client.completions.create(prompt=[10**6], **GREEDY)
            else:
                answer = await client.completions.create(prompt=TEXTS[number : number + 2], **GREEDY)
                assert [choice.text for choice in answer.choices] == right["texts"][number : number + 2]


async def _crowd(address, right, seed):
    await asyncio.gather(*(_mixed(address, right, random.Random(f"{seed}/{n}")) for n in range(64)))


def _resident(pid):
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def test_sixty_four_clients(home, right):
    with serving(home) as (job, address):
        memory = []
        for seed in range(3):
            asyncio.run(_crowd(address, right, seed))
            until(lambda: metric(address, "vllm:num_requests_running") == 0)
            memory.append(_resident(job.processes[0].pid))
        assert metric(address, "vllm:kv_cache_usage_perc") == metric(address, "vllm:num_requests_waiting") == 0
        assert memory[2] - memory[1] < 20, f"MB: {memory}"
        assert job.err() == ""


def test_too_many_are_told_to_come_again(home, right):
    options = ("--max-seq-len", 64, "--cache-tokens", 64, "--max-waiting", 1)
    with serving(home, *options, key=KEY) as (_, address):
        url, headers = f"{address}/v1/completions", {"authorization": f"Bearer {KEY}"}
        body = {"model": "model", "prompt": "a", "max_tokens": 60, "temperature": 0, "n": 4}
        wrong = [httpx.post(url, json=body, headers={"authorization": "Bearer x"}), httpx.post(url, json=body)]
        assert [answer.status_code for answer in wrong] == [401, 401]
        assert wrong[0].json()["error"]["code"] == "invalid_api_key"

        async def ask():
            async with httpx.AsyncClient(timeout=120) as client:
                first = asyncio.create_task(client.post(url, json=body, headers=headers))
                while not metric(address, "vllm:num_requests_waiting"):
                    await asyncio.sleep(0.02)
                return await client.post(url, json=body, headers=headers), await first

        second, first = asyncio.run(ask())
        assert second.status_code == 429 and int(second.headers["retry-after"]) >= 1
        assert first.status_code == 200 and len(first.json()["choices"]) == 4


# ---- its end


def test_what_was_begun_is_ended_before_the_server_is(home, right):
    with serving(home) as (job, address):
        with httpx.stream(
            "POST", f"{address}/v1/completions", json=GREEDY | {"prompt": TEXTS[0], "stream": True, "max_tokens": 150}
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            job.send(signal.SIGTERM)
            until(lambda: httpx.get(f"{address}/health").status_code == 503)
            refused = httpx.post(f"{address}/v1/completions", json=GREEDY | {"prompt": "a"})
            assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert job.codes() == [0] and "every answer was given" in job.out()


def test_no_longer_than_its_grace(home, right):
    with (
        serving(home, "--grace", 0.5) as (job, address),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = client.completions.create(model="model", prompt="a", stream=True, max_tokens=4000, temperature=0)
        next(stream)
        job.send(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert job.codes() == [0] and "1 answers were cut off" in job.out()


def test_ranks_and_one_that_is_lost(home, right):
    """Two ranks answer as one does; when one is killed the other ends, and its client hears of it."""
    with serving(home, "--mp", 2) as (job, address):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:
            answer = client.chat.completions.create(messages=MESSAGES, **GREEDY)
            assert answer.choices[0].message.content == right["chats"][0]
            stream = client.completions.create(model="model", prompt="a", stream=True, max_tokens=4000, temperature=0)
            next(stream)
            others = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _parent(pid) == job.processes[0].pid]
            for pid in others:
                os.kill(pid, signal.SIGKILL)
            with pytest.raises((openai.APIError, httpx.HTTPError)):
                list(stream)
        assert job.codes() == [1] and "rank 1" in job.err()


def _parent(pid):
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
