"""Generation, logits and scores of MetaModel equal what the plain reference computes, sequence by sequence."""

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from models import TINY, Tensors, answer_ids, build, make_tokenizer, weights
from ranks import run_ranks

from accessory.certify import formats, reference
from accessory.data.tokenizer import Tokenizer
from accessory.data.tokenizer_json import write_tokenizer_json
from accessory.errors import UserError
from accessory.infer.sampling import Sampling, choose
from accessory.model.meta import MetaModel
from accessory.parallel.mesh import make_mesh
from accessory.train.save import save_model

LAYOUTS = ("mixtral", "mixtral_sparse")
PIECES = 300
ARGS = replace(TINY, vocab_size=PIECES)
PROMPTS = ["the list of tokens", "a", "then every answer is made from the words of questions, and not", "é👍"]
STEPS = 9
LONGEST = 64


@functools.cache
def plain():
    w = weights(ARGS)
    w["output.weight"][3:259] *= 0.3  # pieces rather than bytes
    w["output.weight"][2] = 1.2 * w["output.weight"][285]  # so that some answers end
    return w


def continued(w, args, prompt, steps, eos=None, pieces=None):
    """Greedy continuation by the first ``pieces`` tokens, the whole sequence computed anew for each."""
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(reference.forward(w, args, torch.tensor(tokens))[0][-1][:pieces].argmax()))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]


# token ids, straight through the decoder


IDS = [[5], [9, 1, 33], [7, 60, 3, 3, 21, 40, 2], [8, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
WINDOWS = (None, 1, 4, 6)
LIMITS = (64, 16, 13)  # max_seq_len; below 64 some sequences end before others


def generate_from_ids(sizes):
    results, source = {}, Tensors(weights())
    for size in sizes:
        mesh = make_mesh(size)
        for layout in LAYOUTS:
            for window in WINDOWS:
                args = replace(TINY, sliding_window=window)
                model = build(args, layout, source, mesh=mesh)
                for limit in LIMITS:
                    results[size, layout, window, limit] = answer_ids(model, IDS, STEPS, limit)
    return results


# texts, through MetaModel


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", PIECES))


@pytest.fixture(scope="module")
def answers(tokenizer):
    """Token ids of each prompt's greedy answer, ``</s>`` included."""
    prompts = [tokenizer.encode(prompt, bos=True, eos=False) for prompt in PROMPTS]
    return [continued(plain(), ARGS, prompt, STEPS, tokenizer.eos_id) for prompt in prompts]


def text_of(tokenizer, answer):
    return tokenizer.decode([token for token in answer if token != tokenizer.eos_id])


def use_models(home, tokenizer, stop, examples, contexts):
    """Everything that MetaModel offers, for a model on all ranks in both layouts, and one on each rank alone."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = make_mesh(world)
    for layout in LAYOUTS:
        model = build(ARGS, layout, Tensors(plain()), mesh=mesh)
        save_model(model, home / f"{layout}-{world}", {"tokenizer.model": tokenizer}, torch.float64, "safetensors")
    results = {}
    for saved, layout, group in (
        ("mixtral", None, dist.group.WORLD),
        ("mixtral", "mixtral_sparse", dist.group.WORLD),
        ("mixtral_sparse", "mixtral", dist.group.WORLD),
        ("mixtral_sparse", None, None),
    ):
        options = {"mp_group": group, "dtype": torch.float64, "device": "cpu", "max_seq_len": LONGEST}
        model = MetaModel.from_pretrained(str(home / f"{saved}-{world}"), layout, **options)
        torch.manual_seed(rank)  # other numbers on each rank
        results[saved, layout, group is not None] = {
            "layout": model.llma.layout.name,
            "texts": model.generate(PROMPTS, max_gen_len=STEPS),
            "stopped": model.generate(PROMPTS, max_gen_len=STEPS, additional_stop_symbols=["never", stop]),
            "streams": [list(model.stream_generate(prompt, max_gen_len=STEPS)) for prompt in PROMPTS],
            "logits": [model.compute_logits(examples, bos=True, eos=eos) for eos in (False, True)],
            "id logits": model.compute_logits([[1, 7, 9], [4]]),
            "scores": model.evaluate_examples(examples, bos=True, eos=True),
            "context scores": model.evaluate_examples(examples, contexts=contexts),
            "sampled": [model.generate(PROMPTS, max_gen_len=STEPS, temperature=2.0) for _ in range(2)],
            "kernel of one": model.generate(PROMPTS, max_gen_len=STEPS, temperature=0.7, top_p=1e-9),
            "draws": draws(model),
        }
    return results


def use_tokenizer_json(home, tokenizer, stop):
    """Answers of a checkpoint that has only a tokenizer.json: to texts, to ids, and with token ``stop`` as a stop symbol."""
    write_tokenizer_json(tokenizer, home)
    files = {name: home / name for name in ("tokenizer.json", "tokenizer_config.json")}
    save_model(build(ARGS, "mixtral", Tensors(plain())), home / "model", files, torch.float64, "safetensors")
    model = MetaModel.from_pretrained(home / "model", dtype=torch.float64, device="cpu", max_seq_len=LONGEST)
    ids = [model.tokenizer.encode(prompt, bos=True, eos=False) for prompt in PROMPTS]
    model.tokenizer.special["<stop>"] = stop
    stopped = model.generate(ids, max_gen_len=STEPS, additional_stop_symbols="<stop>")
    return model.generate(PROMPTS, max_gen_len=STEPS), model.generate(ids, max_gen_len=STEPS), stopped


def draws(model):
    """One token, drawn many times from the nucleus."""
    answers = answer_ids(model.llma, [[1, 7, 9]] * 500, 1, 9, temperature=1.5, top_p=0.5)
    return [token for (token,) in answers]


EXAMPLES = ["the list of tokens is made", "a", "then every answer 👍"]


@pytest.fixture(scope="module")
def greedy_example(tokenizer, answers):
    """A prompt with its own greedy answer, as ids, and the prompt."""
    prompt = tokenizer.encode(PROMPTS[0], bos=True, eos=False)
    return prompt + answers[0], prompt


def run_world(home, tokenizer, stop, examples, contexts):
    sizes = [size for size in (1, 2) if size <= dist.get_world_size()]
    return generate_from_ids(sizes), use_models(home, tokenizer, stop, examples, contexts)


@pytest.fixture(scope="module")
def examples(greedy_example):
    """Texts and token ids, and for each the context it begins with."""
    return [*EXAMPLES, greedy_example[0]], ["the list", "", "then every", greedy_example[1]]


@pytest.fixture(scope="module")
def stop(tokenizer, answers):
    """Two characters in the middle of an answer."""
    text = text_of(tokenizer, answers[1])
    return text[len(text) // 2 : len(text) // 2 + 2]


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request, tokenizer, stop, examples, tmp_path_factory):
    return run_ranks(request.param, run_world, tmp_path_factory.mktemp("saved"), tokenizer.path, stop, *examples)


@pytest.fixture(scope="module")
def models(ranks):
    """What every rank said with every model."""
    return [model for _, models in ranks for model in models.values()]


@pytest.fixture(scope="module")
def greedy():
    w = weights()
    return {
        (window, index): continued(w, replace(TINY, sliding_window=window), prompt, STEPS)
        for window in WINDOWS
        for index, prompt in enumerate(IDS)
    }


def test_cached_generation_equals_recomputing(ranks, greedy):
    assert len({tuple(answer) for answer in greedy.values()}) > len(IDS), "the window makes no difference"
    for results, _ in ranks:
        for (size, layout, window, limit), rows in results.items():
            for index, (prompt, row) in enumerate(zip(IDS, rows, strict=True)):
                room = min(STEPS, limit - len(prompt))
                assert row == greedy[window, index][:room], (size, layout, window, limit, index)


def test_the_layout_is_the_one_asked_for(ranks):
    for _, models in ranks:
        assert {key: model["layout"] for key, model in models.items()} == {key: key[1] or key[0] for key in models}


def test_generate(models, tokenizer, answers):
    ended = [tokenizer.eos_id in answer for answer in answers]
    assert any(ended) and not all(ended), "some answers must end, some not"
    for model in models:
        assert model["texts"] == [text_of(tokenizer, answer) for answer in answers]
        assert model["kernel of one"] == model["texts"]


def test_tokenizer_json_and_prompts_as_ids(tokenizer, answers, tmp_path):
    expected = [text_of(tokenizer, answer) for answer in answers]
    stop = answers[0][2]
    [(texts, by_id, stopped)] = run_ranks(1, use_tokenizer_json, tmp_path, tokenizer.path, stop)
    assert texts == by_id == expected
    cut = [answer[: answer.index(stop)] if stop in answer else answer for answer in answers]
    assert stopped == [text_of(tokenizer, answer) for answer in cut] != expected


def test_stop_symbols_are_cut_off(models, tokenizer, answers, stop):
    for model in models:
        assert model["stopped"] == [text_of(tokenizer, answer).split(stop)[0] for answer in answers]
        assert model["stopped"] != model["texts"]


def test_stream_generate(models, tokenizer, answers):
    for model in models:
        for answer, text, stream in zip(answers, model["texts"], model["streams"], strict=True):
            assert stream[-1] == {"text": text, "end_of_content": True}
            assert not any(part["end_of_content"] for part in stream[:-1])
            written = [token for token in answer if token != tokenizer.eos_id]
            whole = [tokenizer.decode(written[: i + 1]).rstrip("\ufffd") for i in range(len(written))]
            assert [part["text"] for part in stream] == [*whole[: len(stream) - 1], text]
            assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(whole))


def expected_logits(tokenizer, example, eos=False):
    ids = tokenizer.encode(example, True, eos) if isinstance(example, str) else example
    return ids, reference.forward(plain(), ARGS, torch.tensor(ids))[0]


def test_compute_logits(models, tokenizer, examples):
    expected = [[expected_logits(tokenizer, example, eos)[1] for example in examples[0]] for eos in (False, True)]
    by_id = [expected_logits(tokenizer, ids)[1] for ids in ([1, 7, 9], [4])]
    for model in models:
        for ours, plain in zip([*model["logits"], model["id logits"]], [*expected, by_id], strict=True):
            for row, logits in zip(ours, plain, strict=True):
                torch.testing.assert_close(row, logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("which", ["scores", "context scores"])
def test_evaluate_examples(models, tokenizer, examples, which):
    for number, (example, context) in enumerate(zip(*examples, strict=True)):
        ids, logits = expected_logits(tokenizer, example, eos=which == "scores")
        start = 1
        if which == "context scores":
            start = len(tokenizer.encode(context, True, False) if isinstance(context, str) else context)
        terms = [logits[i - 1].log_softmax(-1)[ids[i]].item() for i in range(start, len(ids))]
        for model in models:
            result = {name: values[number] for name, values in model[which].items()}
            assert result["log_likelihood"] == pytest.approx(sum(terms), rel=1e-10)
            assert result["ppl"] == pytest.approx(math.exp(-sum(terms) / len(terms)), rel=1e-10)
            assert result["max_equal"] == all(int(logits[i - 1].argmax()) == ids[i] for i in range(start, len(ids)))
            torch.testing.assert_close(result["non_context_logits"], logits[start - 1 : -1], rtol=1e-10, atol=1e-10)
    if which == "context scores":
        assert models[0][which]["max_equal"] == [False, False, False, True]


def test_sampling_is_the_same_on_all_ranks_and_another_each_time(ranks):
    for key in ranks[0][1]:
        together = key[-1]
        sampled = [models[key]["sampled"] for _, models in ranks]
        assert all(first != second for first, second in sampled)
        assert all((one == sampled[0]) == (together or one is sampled[0]) for one in sampled)
        assert all(models[key]["texts"] not in one for (_, models), one in zip(ranks, sampled, strict=True))


def test_draws_are_those_of_the_nucleus(models):
    probs = (reference.forward(plain(), ARGS, torch.tensor([1, 7, 9]))[0][-1] / 1.5).softmax(-1)
    order = probs.argsort(descending=True).tolist()
    nucleus, share = [], 0.0
    while share <= 0.5:
        nucleus.append(order[len(nucleus)])
        share += probs[nucleus[-1]].item()
    assert 3 <= len(nucleus) < PIECES / 2
    for model in models:
        counts = torch.tensor(model["draws"]).bincount(minlength=PIECES)
        assert counts[nucleus].sum() == counts.sum() == 500
        expected = probs[nucleus] / share * 500
        assert ((counts[nucleus] - expected).abs() <= 5 * expected.sqrt() + 1).all()


SHARES = (0.5, 0.25, 0.125, 0.125)
CHOICES = {  # temperature, top_p: probabilities
    (1.0, 1.0): SHARES,
    (0.5, 1.0): (16 / 22, 4 / 22, 1 / 22, 1 / 22),  # squares
    (2.0, 1.0): (0.369398, 0.261204, 0.184699, 0.184699),  # roots
    (2.0, 0.6): (0.585786, 0.414214, 0.0, 0.0),  # the third begins at 0.631; at temperature 1 it would at 0.75
    (0.5, 0.8): (0.8, 0.2, 0.0, 0.0),  # the second at 0.727, the third at 0.909
}


@pytest.mark.parametrize("case", CHOICES)
def test_temperature_and_nucleus(case):
    count = 20_000
    logits = torch.tensor(SHARES).log().expand(count, -1)
    how = [Sampling(temperature=case[0], top_p=case[1], seed=seed) for seed in range(count)]
    nothing = [[]] * count
    chosen = torch.tensor([choice.token for choice in choose(logits, nothing, nothing, how, [None] * len(how))])
    for found, share in zip(chosen.bincount(minlength=len(SHARES)).tolist(), CHOICES[case], strict=True):
        assert abs(found - count * share) <= 5 * math.sqrt(count * share * (1 - share)), case


@pytest.mark.parametrize("temperature", [1e-5, 1e-308, 1e-320])
def test_no_temperature_is_too_low(temperature):
    """Although no number may be as large as a logit by it."""
    logits = torch.tensor([[1.0, 3.0, -2.0], [-9.0, -7.0, -8.0]])
    how = [Sampling(temperature=temperature, seed=seed) for seed in range(2)]
    assert [choice.token for choice in choose(logits, [[], []], [[], []], how, [None, None])] == [1, 1]


TURN = {"role": "user", "content": "the list"}


def use_wrongly(home, tokenizer):
    """What is refused, with which sentence; answers, and those expected, where the vocabulary has more rows than pieces."""
    args = replace(TINY, vocab_size=PIECES + 20)
    w = weights(args)
    w["output.weight"][PIECES:] = 1.5 * w["output.weight"][:20]  # what stands for no piece is likely
    save_model(build(args, "mixtral", Tensors(w)), home / "padded", {"tokenizer.model": tokenizer}, torch.float64, "pth")
    save_model(build(args, "mixtral", Tensors(w)), home / "without", {}, torch.float64, "pth")
    options = {"dtype": torch.float64, "device": "cpu", "max_seq_len": LONGEST}
    model = MetaModel.from_pretrained([home / "padded"], **options)
    calls = {
        "no tokenizer.model": lambda: MetaModel.from_pretrained(home / "without", **options),
        "found an empty list": lambda: MetaModel.from_pretrained([], **options),
        "no such directory": lambda: MetaModel.from_pretrained(home / "none", **options),
        "did you mean 'mixtral'": lambda: MetaModel.from_pretrained(home / "padded", "mixtrl", **options),
        "with_visual": lambda: MetaModel.from_pretrained(home / "padded", with_visual=True),
        "no place for turns": lambda: model.chat([[{"role": "system", "content": "a"}, TURN]], "plain"),
        "write [messages]": lambda: model.chat([TURN]),
        "a list of texts": lambda: model.generate([None]),
        "half a character": lambda: model.generate(["\ud800"]),
        "list of prompts": lambda: model.generate("a text"),
        "images": lambda: model.generate(["a"], images=[1]),
        "leaves no room": lambda: model.generate(["the answer " * 60]),
        "example 0 does not begin": lambda: model.evaluate_examples(["the list"], contexts=["every"]),
        "example 0 has no token to score": lambda: model.evaluate_examples(["the list"], contexts=["the list"]),
        "1 examples but 2 contexts": lambda: model.evaluate_examples(["the list"], contexts=["the", "a"]),
        "expected a list": lambda: model.compute_logits("the list"),
        "at least one token": lambda: model.generate([[1], []]),
        "temperature must be at least 0": lambda: model.generate(["a"], temperature=-1.0),
    }
    messages = {}
    for expected, call in calls.items():
        with pytest.raises(UserError) as error:
            call()
        messages[expected] = str(error.value)
    prompts = [model.tokenizer.encode(prompt, bos=True, eos=False) for prompt in PROMPTS[:2]]
    expected = [continued(w, args, prompt, 5, model.tokenizer.eos_id, pieces=PIECES) for prompt in prompts]
    assert expected != [continued(w, args, prompt, 5, model.tokenizer.eos_id) for prompt in prompts]
    answers = model.generate(PROMPTS[:2], max_gen_len=5)
    return messages, answers, [text_of(model.tokenizer, answer) for answer in expected]


@pytest.fixture(scope="module")
def wrong(tokenizer, tmp_path_factory):
    return run_ranks(1, use_wrongly, tmp_path_factory.mktemp("wrong"), tokenizer.path)[0]


def test_wrong_uses_are_told(wrong):
    for expected, message in wrong[0].items():
        assert expected in message


def test_tokens_beyond_the_tokenizer_are_never_chosen(wrong):
    _, answers, expected = wrong
    assert answers == expected


def route_in_bf16(home, tokenizer, x):
    formats.write(home / "model", {name: tensor.float() for name, tensor in plain().items()}, ARGS, "mixtral")
    model = MetaModel.from_pretrained(home / "model", tokenizer_path=tokenizer, dtype=torch.bfloat16, device="cpu")
    return model.llma.layers[0].feed_forward.gate(x).logits


def test_the_router_is_never_rounded(tmp_path, tokenizer):
    """In bf16 it would send some tokens to other experts than the checkpoint's."""
    x = torch.randn(50, ARGS.dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    (logits,) = run_ranks(1, route_in_bf16, tmp_path, tokenizer.path, x)
    expected = x.double() @ plain()["layers.0.feed_forward.gate.weight"].T
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
