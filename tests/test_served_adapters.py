"""Several adapters over one base, chosen by each request: each is what it is alone, whatever runs beside it."""

import functools
import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from models import TINY, Numbers, Tensors, make_tokenizer, weights, write_adapter
from peft import LoraConfig, get_peft_model
from ranks import run_ranks
from test_adapters import peft_file
from test_convert import ARGS, TOKENS, transformers_model
from transformers import MixtralForCausalLM

from accessory.certify import harness, reference
from accessory.checkpoint.open import Checkpoint
from accessory.checkpoint.side_by_side import SideBySide, open_adapters
from accessory.errors import UserError
from accessory.infer.engine import Engine
from accessory.infer.sampling import Sampling
from accessory.model.meta import MetaModel
from accessory.settings import LoraSection, TuningSection
from accessory.tuning.spec import resolve

LAYOUTS = ("mixtral", "mixtral_sparse")
ALL_TARGETS = ("attention", "experts", "router", "embeddings", "output")
EVERYWHERE = TuningSection(lora=LoraSection(rank=3, alpha=2.0, targets=ALL_TARGETS), bias=True)
ONE_LAYER = TuningSection(lora=LoraSection(rank=5, rslora=True, targets=(r"layers\.1\..*w[q2]", "router")))
BEGINNING = [*range(40, 57)]  # more than a page of the cache
PROMPTS = [[5], [*BEGINNING, 9, 1], [*BEGINNING, 33]]


def save_adapter(base, directory, section, seed, args=ARGS, **changed):
    """As a run does: all that ``section`` trains; ``changed``: other values for some tensors."""
    directory.mkdir()
    spec = resolve(section, args)
    tensors = weights(args, seed=seed, dtype=torch.float32, adapters=spec.logical.adapters) | changed
    trained = {name: tensors[name] for name in sorted(spec.trains)}
    write_adapter(directory, spec.logical, trained, Checkpoint(base).fingerprint)


def save_with_peft(base, directory):
    """w1 and w3 share an A; what it adapts the embeddings of, PEFT saves them of too."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "o_proj", "embed_tokens", "lm_head"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model = get_peft_model(MixtralForCausalLM.from_pretrained(base), config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(0.0, 0.2)
    model.save_pretrained(directory)


def save_mixtral_peft(directory, norms=()):
    spec = resolve(TuningSection(lora=LoraSection(rank=4), bias=True), ARGS)
    tensors = peft_file(weights(ARGS, seed=7, dtype=torch.float32, adapters=spec.logical.adapters), 0, 1)
    kept = {key: tensor for key, tensor in tensors.items() if not key.endswith("norm.weight")} | dict(norms)
    directory.mkdir()
    torch.save({"model": kept}, directory / "consolidated.00-of-01.model.pth")
    (directory / "meta.json").write_text('{"llama_type": "mixtral_peft"}')


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base") / "hf"
    transformers_model().save_pretrained(directory)
    make_tokenizer(directory / "tokenizer.model")
    return directory


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """One of every format: with other ranks, matrices and scalings, some with biases."""
    home = tmp_path_factory.mktemp("adapters")
    save_adapter(base, home / "everywhere", EVERYWHERE, seed=5)
    save_adapter(base, home / "one layer", ONE_LAYER, seed=6)
    (home / "one layer/training.json").write_text(json.dumps({"template": "alpaca"}))
    save_with_peft(base, home / "peft")
    save_mixtral_peft(home / "reference")
    return {directory.name: directory for directory in sorted(home.iterdir())}


def load(paths, layout, **options):
    where = {"mp_group": dist.group.WORLD, "device": "cpu", "dtype": torch.float64, "max_seq_len": 200}
    return MetaModel.from_pretrained(paths, layout, **where, **options)


def answer(model, asked):
    """Tokens of the answer to each (prompt, adapter), all together; on the first rank."""
    if model.llma.mesh.mp.rank:
        model.engine.follow()
        return []
    requests = [model.engine.submit(prompt, Sampling(max_tokens=8), adapter) for prompt, adapter in asked]
    for _ in model.engine.run():
        pass
    model.engine.close()
    return [request.answer for request in requests]


def serve(base, adapters):
    """In each layout: logits by each adapter; answers of all to all prompts, in one batch."""
    results = []
    for layout in LAYOUTS:
        model = load(base, layout, adapters=adapters)
        logits = {name: model.compute_logits([TOKENS], adapter=name)[0] for name in (None, *model.adapters)}
        asked = [(prompt, name) for prompt in PROMPTS for name in logits]
        answers = answer(model, asked)
        plain = load(base, layout).compute_logits([TOKENS])[0]
        results.append((logits, dict(zip(((*prompt, name) for prompt, name in asked), answers, strict=False)), plain))
    return results


def serve_alone(base, adapters):
    """Answers of the base and of each adapter, loaded as the only one."""
    found = {}
    for name in (None, *adapters):
        model = load([base, adapters[name]] if name else base, "mixtral")
        asked = [(prompt, None) for prompt in PROMPTS]
        found |= dict(zip(((*prompt, name) for prompt in PROMPTS), answer(model, asked), strict=True))
    return found


@pytest.fixture(scope="module")
def alone(base, adapters):
    (found,) = run_ranks(1, serve_alone, base, adapters)
    assert len({tuple(answer) for answer in found.values()}) > 10, "the adapters make no difference"
    return found


@functools.cache
def merged_logits(paths):
    """Of the reference, with every matrix' own W + scaling * B A."""
    source = Checkpoint(list(paths))
    tensors = {name: source.read(name, source.logical.whole(name)).double() for name in source.logical.shapes}
    for matrix, adapter in source.logical.adapters.items():
        stem = matrix.removesuffix("weight") if matrix.endswith("weight") else f"{matrix}_"
        if adapter.tied:
            tensors[f"{stem}lora_a"] = tensors[f"{stem.replace('w3_', 'w1_')}lora_a"]
        if adapter.rank:
            tensors[f"{stem}lora_b"] = adapter.scaling * tensors[f"{stem}lora_b"]
    return reference.forward(tensors, source.args, torch.tensor(TOKENS))[0]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_is_what_it_is_alone(size, base, adapters, alone):
    ranks = run_ranks(size, serve, base, adapters)
    for rank, results in enumerate(ranks):
        for logits, answers, plain in results:
            assert logits.keys() == {None, *adapters} and torch.equal(logits[None], plain)
            for name, ours in logits.items():
                expected = merged_logits((base, adapters[name]) if name else (base,))
                torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10 * expected.abs().max().item(), msg=name)
            assert rank or answers == alone


def use(base, adapters):
    """MetaModel's own ways to ask, and what is refused."""
    model = load(base, None, adapters=adapters)
    alone = load([base, adapters["one layer"]], None)
    said = []
    for one, name in ((model, {"adapter": "one layer"}), (alone, {})):
        said.append(
            [
                one.asked("a list", **name),
                one.chat(["the list of words"], max_gen_len=5, **name),
                one.generate(["the list"], max_gen_len=5, **name),
                list(one.stream_generate("the list", max_gen_len=3, **name)),
                one.evaluate_examples(["the list of tokens"], **name)["log_likelihood"][0],
            ]
        )
    refused = []
    for ask in (lambda name: model.engine.submit([1], Sampling(), name), lambda name: alone.generate(["a"], adapter=name)):
        with pytest.raises(UserError) as error:
            ask("nobody")
        refused.append(str(error.value))
    return said, refused, model.asked("a list"), model.engine.is_idle


def test_asked_through_the_model(base, adapters):
    """An adapter is asked in the template of its own training; one that is not there is never the base."""
    ((said, refused, asked_of_base, idle),) = run_ranks(1, use, base, adapters)
    (*ours, our_score), (*theirs, their_score) = said
    assert ours == theirs and our_score == pytest.approx(their_score, rel=1e-10)
    assert asked_of_base != ours[0] and idle
    assert refused == [
        "no adapter is called 'nobody': there are everywhere, one layer, peft, reference",
        "no adapter is called 'nobody': the model was loaded without adapters",
    ]


def test_what_an_answer_leaves_in_the_cache_is_its_adapters():
    adapters = resolve(TuningSection(lora=LoraSection(rank=2)), TINY).logical.adapters
    given = {name: (adapters, Tensors(weights(seed=seed, adapters=adapters))) for seed, name in enumerate("ab", 1)}
    source = SideBySide(TINY, Tensors(weights()), given)
    engine = Engine(harness.build(source.logical, "mixtral", source), Numbers(TINY.vocab_size), max_seq_len=64)
    first = engine.submit([5], Sampling(max_tokens=20), "a")
    for adapter, known in ((None, 0), ("b", 0), ("a", 16)):
        list(engine.run())
        before = engine.shared_tokens
        engine.submit([*first.tokens, 1], Sampling(max_tokens=1), adapter)
        list(engine.run())
        assert engine.shared_tokens - before == known, adapter


# ---- what cannot stand beside others


def refusal(base, directory):
    with pytest.raises(UserError) as error:
        open_adapters(Checkpoint(base), {"mine": directory})
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_changes_the_base_is_refused(base, tmp_path):
    norm = 1.1 * torch.ones(ARGS.dim)
    section = replace(EVERYWHERE, train=("norms",))
    save_adapter(base, tmp_path / "as it was", section, seed=5)
    assert open_adapters(Checkpoint(base), {"mine": tmp_path / "as it was"})
    save_adapter(base, tmp_path / "norms", section, seed=5, **{"norm.weight": norm})
    save_mixtral_peft(tmp_path / "reference", {"llma.norm.weight": norm})
    for name in ("norms", "reference"):
        told = refusal(base, tmp_path / name)
        assert told.startswith(f"adapter 'mine' ({tmp_path / name}): was trained together with the base's own norm.weight,")
        assert "accessory merge" in told


def test_what_is_no_adapter_of_this_base_is_refused(base, adapters, tmp_path):
    labelled = replace(ARGS, labels=("no", "yes"))
    save_adapter(base, tmp_path / "labels", TuningSection(lora=LoraSection(rank=2)), seed=5, args=labelled)
    assert "makes a classifier of the base" in refusal(base, tmp_path / "labels")
    assert "no adapter in it" in refusal(base, base)
    MixtralForCausalLM(transformers_model().config).save_pretrained(tmp_path / "other")
    assert "no adapter in it" in refusal(base, tmp_path / "other"), "another whole model"
    assert "belongs to another base" in refusal(tmp_path / "other", adapters["one layer"])
    with pytest.raises(UserError, match="holds an adapter, and others cannot stand beside it"):
        open_adapters(Checkpoint([base, adapters["peft"]]), {"mine": adapters["one layer"]})


def test_one_that_is_damaged_would_spoil_the_others(base, adapters, tmp_path):
    name = "layers.1.attention.wq.lora_b"
    save_adapter(base, tmp_path / "damaged", ONE_LAYER, seed=5, **{name: torch.full((64, 5), torch.nan)})
    opened = open_adapters(Checkpoint(base), {"good": adapters["one layer"], "bad": tmp_path / "damaged"})
    both = SideBySide(ARGS, Checkpoint(base), {name: (one.logical.adapters, one) for name, one in opened.items()})
    with pytest.raises(UserError, match=f"adapter 'bad': {name} holds NaN"):
        both.read(name, both.logical.whole(name))
