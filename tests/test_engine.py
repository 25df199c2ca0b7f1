"""The engine: what runs together gives what it gives alone, and memory is bounded and given back."""

import functools
from dataclasses import replace

import pytest
import tokenizers
import torch
from models import TINY, Numbers, Tensors, answer_ids, build, make_tokenizer, mesh_for, weights
from ranks import run_ranks

from accessory.certify.parity import load_in_transformers
from accessory.certify.problem import SMALL, Problem
from accessory.certify.serving import ServingCell, run_serving, wrong_tokens
from accessory.data.tokenizer import Tokenizer
from accessory.data.tokenizer_json import write_tokenizer_json
from accessory.errors import UserError
from accessory.infer.engine import Engine
from accessory.infer.plan import StepPlan
from accessory.infer.sampling import Sampling, choose
from accessory.infer.text import TextStream

LAYOUTS = ("mixtral", "mixtral_sparse")
CPU = torch.device("cpu")


@functools.cache
def small(window=None):
    return build(replace(TINY, sliding_window=window), "mixtral", Tensors(weights()))


def engine(model=None, max_seq_len=64, **options):
    model = model or small()
    return Engine(model, Numbers(model.args.vocab_size), max_seq_len=max_seq_len, **options)


def finish(engine):
    return [progress for step in engine.run() for progress in step]


def leaked(engine):
    return engine.pool.count - engine.pool.free


# ---- together as alone


def serve(problems, cells):
    return [run_serving(problem, cell, CPU) for problem in problems for cell in cells]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 9, 33])
def test_random_schedules(window, packed):
    """Requests of every kind join, wait for pages, share beginnings, and are cancelled: each is as if alone."""
    problems = [Problem(replace(SMALL, sliding_window=window), seed=seed) for seed in (1, 2)]
    cell = ServingCell(1, "mixtral", "full", packed)
    (told,) = run_ranks(1, serve, problems, [cell])
    for problem, one in zip(problems, told, strict=True):
        assert wrong_tokens(problem, cell, one) == 0 and one["leaked"] == 0
        assert sum(len(request["answer"]) for request in one["requests"]) > 150
        assert any(request["finish_reason"] == "cancelled" for request in one["requests"])


PROMPTS = [[5], [9, 1, 33], list(range(3, 60)), [7, 60, 3, 3, 21, 40, 2] * 3]


def answers(problem, sizes):
    return {
        (size, layout): answer_ids(
            build(problem.args, layout, Tensors(problem.weights()), mesh=mesh_for(size), dtype=torch.float32),
            PROMPTS,
            12,
            120,
        )
        for size in sizes
        for layout in LAYOUTS
    }


@pytest.fixture(scope="module")
def in_transformers():
    """Greedy answers, prompt by prompt; the window is shorter than two of them."""
    problem = Problem(dtype=torch.float32)
    model = load_in_transformers(problem)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in PROMPTS]


@pytest.mark.parametrize(("world", "sizes"), [(1, [1]), (4, [2, 4])])
def test_greedy_answers_are_those_of_transformers(world, sizes, in_transformers):
    for rank in run_ranks(world, answers, Problem(dtype=torch.float32), sizes):
        assert all(ours == in_transformers for ours in rank.values()), rank


# ---- memory


def test_samples_of_a_prompt_compute_it_once():
    prompt, sampling = list(range(40)), Sampling(max_tokens=5, temperature=1.5, seed=3)
    together = engine(chunk_tokens=16)
    samples = [together.submit(prompt, sampling.seeded(n)) for n in range(4)]
    finish(together)
    assert together.shared_tokens == 3 * 32, "two full pages, for all but the first"
    assert len({tuple(sample.answer) for sample in samples}) > 1
    for n, sample in enumerate(samples):
        alone = engine()
        one = alone.submit(prompt, sampling.seeded(n))
        finish(alone)
        assert one.answer == sample.answer


def test_a_second_turn_finds_the_first_in_the_cache():
    talk = engine()
    first = talk.submit(list(range(20)), Sampling(max_tokens=14))
    finish(talk)
    talk.submit([*first.tokens, 1, 2, 3], Sampling(max_tokens=2))
    finish(talk)
    assert talk.shared_tokens == 32, "of 33 tokens that the cache had"


def test_the_same_tokens_behind_others_are_no_shared_beginning():
    first, second, other = [7] * 16, [8] * 16, [9] * 16
    apart = engine()
    for prompt in (first + second, other + first, first + first):
        request = apart.submit([*prompt, 1], Sampling(max_tokens=6))
        finish(apart)
        alone = engine()
        again = alone.submit([*prompt, 1], Sampling(max_tokens=6))
        finish(alone)
        assert request.answer == again.answer
    assert apart.shared_tokens == 16, "the first page of the last prompt"


def test_a_page_stays_while_one_of_its_holders_does():
    """What waits for room gets none of a page that a second request still reads, although the first has given it back."""
    prompt = list(range(33))
    full = engine(cache_tokens=96)
    short, long = (full.submit(prompt, Sampling(max_tokens=count)) for count in (2, 20))
    waits = full.submit([5] * 50, Sampling(max_tokens=10))
    finish(full)
    for request in (short, long, waits):
        alone = engine()
        again = alone.submit(request.prompt, request.sampling)
        finish(alone)
        assert request.answer == again.answer
    assert full.shared_tokens == 32 and leaked(full) == 0


def test_a_prompt_that_the_cache_has_whole():
    """Its last token is run again: the next one is chosen from its logits."""
    twice = engine()
    first, second = (twice.submit([*range(32)], Sampling(max_tokens=6)) for _ in range(2))
    finish(twice)
    assert first.answer == second.answer and twice.shared_tokens == 16


def test_pages_behind_the_window_are_given_back():
    windowed = engine(small(window=6), max_seq_len=640)
    windowed.submit([1] * 300, Sampling(max_tokens=300))
    held = []
    for _ in windowed.run():
        held += [len(request.pages) for request in windowed.running]
    assert max(held[3:]) <= 2 and leaked(windowed) == 0


def test_what_does_not_fit_waits_and_nothing_is_lost():
    tight = engine(cache_tokens=80)
    requests = [tight.submit([n] * 30, Sampling(max_tokens=20)) for n in range(1, 6)]
    most = 0
    while not tight.is_idle:
        tight.step()
        most = max(most, len(tight.running))
    assert most == 1 and all(request.finish_reason == "length" for request in requests) and leaked(tight) == 0


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_cancelled_request_leaves_at_once(steps):
    """While it waits, in the middle of its prompt, and of its answer."""
    busy = engine(chunk_tokens=8)
    request = busy.submit(list(range(20)), Sampling(max_tokens=20))
    for _ in range(steps):
        busy.step()
    busy.cancel(request)
    assert request.finish_reason == "cancelled" and busy.is_idle and leaked(busy) == 0


def test_a_plan_goes_through_numbers():
    plan = StepPlan([0, 2], [[4, -5, -5], [7]], [0, 33], [0, 16], [[1], [9, 2]], [1], [0, 3], [5])
    assert StepPlan.from_numbers(plan.to_numbers()) == plan


@pytest.mark.parametrize(
    ("prompt", "sampling", "sentence"),
    [
        ([], {}, "at least one token"),
        ([1] * 64, {}, "leaves no room"),
        ([64], {}, "tokens from 0 to 63"),
        ([1], {"logit_bias": {64: 1.0}}, "logit_bias names token 64"),
    ],
)
def test_what_cannot_be_answered_is_refused(prompt, sampling, sentence):
    with pytest.raises(UserError, match=sentence):
        engine().submit(prompt, Sampling(**sampling))


def test_a_cache_that_no_sequence_fits_in_is_refused():
    with pytest.raises(UserError, match="room for 48 tokens, and one sequence may have 64"):
        engine(cache_tokens=50)


# ---- what is told of tokens


def test_log_probabilities():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    expected = logits.log_softmax(-1)[0]
    (choice,) = choose(logits, [[0]], [[]], [Sampling(logit_bias={3: 100.0}, logprobs=2, seed=0)], [None])
    assert choice.token == 3 and choice.logprob == pytest.approx(expected[3].item())  # the model's own, whatever is asked
    assert choice.likeliest == ((1, pytest.approx(expected[1].item())), (2, pytest.approx(expected[2].item())))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_repetition_is_made_unlikelier_whatever_the_sign_of_its_logit(sign):
    logits = torch.tensor([[0.0, -0.1]]) + sign
    (choice,) = choose(logits, [[0]], [[]], [Sampling(repetition_penalty=1.5, seed=0)], [None])
    assert choice.token == 1


# ---- text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"))


@pytest.mark.parametrize("kind", ["SentencePiece", "of SentencePiece as JSON", "of bytes as GPT-2's"])
def test_pieces_are_what_tokens_write(kind, tokenizer, tmp_path):
    if kind == "of SentencePiece as JSON":
        assert write_tokenizer_json(tokenizer.path, tmp_path)
    elif kind == "of bytes as GPT-2's":
        theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
        theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        learnt = tokenizers.trainers.BpeTrainer(vocab_size=280, special_tokens=["</s>"], initial_alphabet=alphabet)
        theirs.train_from_iterator(["the words and the list"] * 9, learnt)
        theirs.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer if kind == "SentencePiece" else Tokenizer(tmp_path / "tokenizer.json")
    text = "the words 👍🏽 and é,\n漢字\x00~"
    ids = tokenizer.encode(text, bos=False, eos=True)
    assert b"".join(tokenizer.pieces[token] for token in ids).decode().removeprefix(" ") == text
    assert len(ids) > len(text) and tokenizer.pieces[ids[-1]] == b""


def stream(tokenizer, ids, stops=()):
    text = TextStream(tokenizer, stops)
    parts = [text.add(token) for token in ids if not text.stopped]
    return [*parts, text.finish()], text


@pytest.mark.parametrize("seed", range(5))
def test_text_in_parts_is_the_text_as_a_whole(tokenizer, seed):
    """Any tokens: pieces, bytes of characters, bytes of none."""
    rng = torch.Generator().manual_seed(seed)
    for text in ("the words 👍🏽 and é, 漢字", "", "and\n\n  the"):
        noise = torch.randint(3, tokenizer.n_words, (30,), generator=rng).tolist()
        for ids in (tokenizer.encode(text, False, False) + noise, noise + tokenizer.encode(text, False, False)):
            parts, whole = stream(tokenizer, ids)
            assert "".join(parts) == whole.text == tokenizer.decode(ids)


def test_what_follows_a_text_keeps_its_blank(tokenizer):
    ids = tokenizer.encode("the words 👍🏽 and é,  then some", False, False)
    for begin in (1, 2, len(ids) - 3):
        text = TextStream(tokenizer, joined=True)
        written = "".join([*map(text.add, ids[begin:]), text.finish()])
        assert tokenizer.decode(ids[:begin]) + written == tokenizer.decode(ids)
    assert written.startswith(" ")


def test_no_part_ends_in_a_broken_character(tokenizer):
    ids = tokenizer.encode("a 👍🏽 b 漢字 é", False, False)
    parts, _ = stream(tokenizer, ids)
    assert len(parts) > 10 and "\ufffd" not in "".join(parts)


@pytest.mark.parametrize("stop", ["and", "d th", " then some.", "words"])
def test_a_stop_is_cut_off_and_nothing_of_it_is_given_out_before(tokenizer, stop):
    text = "the list of words and then some."
    parts, whole = stream(tokenizer, tokenizer.encode(text, False, False), ("never", stop))
    assert "".join(parts) == whole.text == text.split(stop)[0] and whole.stopped
    parts, whole = stream(tokenizer, tokenizer.encode("the an", False, False), ("and",))
    assert "".join(parts) == "the an" and not whole.stopped, "what only began like a stop is given out at the end"
