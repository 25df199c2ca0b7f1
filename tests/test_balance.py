"""The router's losses: their formulas, what they depend on, and the bias that takes their place."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from jobs import command
from models import (
    OPTIM,
    TINY,
    Tensors,
    assemble,
    build,
    evaluate,
    make_tokenizer,
    mesh_for,
    samples,
    train,
    weights,
)
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from accessory.certify import harness, reference
from accessory.checkpoint.convert import Target, convert
from accessory.checkpoint.open import Checkpoint
from accessory.checkpoint.verify import compare
from accessory.data.loader import BatchPlan, sample_lengths
from accessory.data.packing import Rows
from accessory.errors import UserError
from accessory.model.args import MoEArgs
from accessory.model.documents import Documents
from accessory.model.moe.router import Routing, router_stats
from accessory.parallel.mesh import make_mesh
from accessory.settings import RunConfig
from accessory.train.balance import (
    RouterLosses,
    balance_note,
    count_loads,
    document_balance,
    global_balance,
    microbatch_balance,
    pooled_balance,
    shift_score_biases,
    z_loss,
)
from accessory.train.objective import MeanOfMeans, NextToken
from accessory.train.step import train_step

K, E, L = 2, 8, 2
STEPS = [samples(8, seed=1), samples(8, seed=2)]
BIASED = replace(TINY, moe=MoEArgs(E, K, score_bias=True))
EXACT, CUT = ("global", "document", "bias"), ("microbatch", "hf")
EVERY = EXACT + CUT


# ---- the formulas, of made-up logits


def random_batch(lengths):
    """Documents, and router logits [L, T, E] for them."""
    generator = torch.Generator().manual_seed(sum(lengths))
    documents = Documents.of(lengths)
    logits = 2 * torch.randn(L, max(1, sum(lengths)), E, generator=generator, dtype=torch.float64)
    return documents, logits + torch.linspace(0, 2, E, dtype=torch.float64)


def stats_of(logits, documents):
    layers = []
    for of_layer in logits:
        probs = of_layer.softmax(-1)
        weights, experts = probs.topk(K)
        layers.append(Routing(of_layer, probs, weights, experts))
    return router_stats(layers, documents)


def switch_loss(logits):
    """Fedus et al. 2021 of tokens [T, E], token by token."""
    fractions, means = torch.zeros(E, dtype=torch.float64), torch.zeros(E, dtype=torch.float64)
    for token in logits:
        p = token.exp() / token.exp().sum()
        for e in sorted(range(E), key=lambda e: -p[e].item())[:K]:
            fractions[e] += 1 / (len(logits) * K)
        means = means + p / len(logits)
    return E * (fractions * means).sum()


SHAPES = {"some": [5, 3, 7], "short": [2, 4, 1, 3, 2], "one": [7]}


@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES)
def test_formulas_are_those_of_the_papers(lengths):
    documents, logits = random_batch(lengths)
    logits.requires_grad_()
    stats, number = stats_of(logits, documents), documents.document_of
    tokens = torch.tensor(sum(lengths))
    real = list(logits)
    per_document = [
        (switch_loss(of_layer[number == d]) * (number == d).sum() / tokens)
        for of_layer in logits
        for d in range(1, documents.count + 1)
    ]
    counts = stats.counts.sum(1)
    z = sum(torch.log(torch.exp(t).sum()) ** 2 for of_layer in real for t in of_layer) / (L * tokens)
    pairs = {
        "global": (global_balance(stats, counts, K), sum(map(switch_loss, real)) / L),
        "document": (document_balance(stats, tokens, K), sum(per_document) / L),
        "microbatch": (microbatch_balance(stats, K), sum(map(switch_loss, real)) / L),
        "hf": (pooled_balance(stats, K), K * switch_loss(torch.cat(real))),
        "z": (z_loss(stats, tokens), z),
    }
    for name, (ours, expected) in pairs.items():
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0, msg=name)
        gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (ours, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14, msg=name)


def test_a_rank_without_documents_counts_nowhere():
    documents, logits = random_batch([])
    stats = stats_of(logits.requires_grad_(), documents)
    assert stats.counts.shape == (L, 0, E) and logits.shape[1] == 1
    losses = global_balance(stats, torch.ones(L, E), K), document_balance(stats, torch.tensor(9), K)
    for loss in (*losses, microbatch_balance(stats, K), pooled_balance(stats, K), z_loss(stats, torch.tensor(9))):
        assert loss == 0 and not torch.autograd.grad(loss, logits, retain_graph=True)[0].any()


def test_hf_is_transformers_own_function():
    # imported here, because every rank imports this file and that takes seconds
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    documents, logits = random_batch(SHAPES["some"])
    theirs = load_balancing_loss_func(tuple(logits), E, K)
    assert pooled_balance(stats_of(logits, documents), K).item() == pytest.approx(theirs.item(), rel=1e-5)


def test_opposite_imbalances_of_layers_do_not_cancel():
    """Layer 0 sends everything to experts 0 and 1, layer 1 to the others: the pooled figure calls that balanced."""
    logits = torch.full((2, 10, 4), -20.0, dtype=torch.float64)
    logits[0, :, :2], logits[1, :, 2:] = 0.0, 0.0
    stats = stats_of(logits, Documents.of([10]))
    tokens, counts = torch.tensor(10), stats.counts.sum(1)
    assert pooled_balance(stats, 2).item() / 2 == pytest.approx(1.0, abs=1e-6), "what a balanced router has"
    for ours in (
        global_balance(stats, counts, 2),
        document_balance(stats, tokens, 2),
        microbatch_balance(stats, 2),
    ):
        assert ours.item() == pytest.approx(2.0, abs=1e-6), "the worst that a router of 4 experts and 2 choices can have"


def test_balanced_is_one_whatever_the_number_of_layers():
    probs = torch.full((12, E), 1 / E, dtype=torch.float64)
    experts = torch.arange(24).view(12, K) % E
    one = Routing(probs.log(), probs, probs[:, :K], experts)
    for layers in (1, 3):
        stats = router_stats([one] * layers, Documents.of([12]))
        tokens, counts = torch.tensor(12), stats.counts.sum(1)
        assert global_balance(stats, counts, K).item() == pytest.approx(1, rel=1e-12)
        assert document_balance(stats, tokens, K).item() == pytest.approx(1, rel=1e-12)
        assert microbatch_balance(stats, K).item() == pytest.approx(1, rel=1e-12)
        assert pooled_balance(stats, K).item() == pytest.approx(K, rel=1e-12)


# ---- what they depend on: steps of real ranks against one plain process


def joined(lists):
    return [x for some in lists for x in some]


def cut(batch, accumulation, dp, width=None):
    """The micro-batches of every rank, as lists of samples: [accumulation][dp]. The definition of BatchPlan."""
    places = Rows.packed(range(len(batch)), sample_lengths(batch), width) if width else [[i] for i in range(len(batch))]
    held = sorted(([batch[i] for i in row] for row in places), key=lambda row: sum(len(s.tokens) for s in row))
    size = -(-len(held) // (accumulation * dp))
    chunks = [joined(held[i * size : (i + 1) * size]) for i in range(accumulation * dp)]
    return [chunks[i * dp : (i + 1) * dp] for i in range(accumulation)]


def oracle_loss(w, args, micro_steps, mode, z_weight=0.01):
    """The training loss by ``mode`` of [accumulation][dp] micro-batches, each statistic over tokens pooled by hand."""
    ce, z, targets, tokens, per_rank, all_counts = 0.0, 0.0, 0, 0, [], 0
    for ranks in micro_steps:
        per_rank.append([])
        for micro_batch in ranks:
            documents = []
            for s in micro_batch:
                logits, routers, chosen = reference.forward(w, args, torch.tensor(s.tokens))
                trained = [i for i in range(1, len(s.tokens)) if s.trained[i]]
                ce = ce - sum(logits[i - 1].log_softmax(-1)[s.tokens[i]] for i in trained)
                targets, tokens = targets + len(trained), tokens + len(s.tokens)
                z = z + routers.logsumexp(-1).pow(2).sum() / len(routers)
                documents.append((routers.softmax(-1), F.one_hot(chosen, E).sum(2).double()))
                all_counts = all_counts + documents[-1][1].sum(1)
            per_rank[-1].append(documents)

    def pooled(documents):
        return [torch.cat(x, 1) for x in zip(*documents, strict=True)]

    def uneven(documents, merge=False):
        probs, counts = pooled(documents)
        if merge:
            probs, counts = (x.flatten(0, 1).unsqueeze(0) for x in (probs, counts))
        return (E * (counts.sum(1) / (counts.shape[1] * K)) * probs.mean(1)).sum(-1).mean()

    parts = joined(per_rank)
    groups = {
        "global": [joined(parts)],
        "document": [[d] for documents in parts for d in documents],
    }
    if mode in groups:
        balance = sum(uneven(g) * sum(d[0].shape[1] for d in g) for g in groups[mode] if g) / tokens
    elif mode == "bias":
        balance = 0.0
    else:
        balance = sum(uneven(g, mode == "hf") * (K if mode == "hf" else 1) for g in parts if g) / len(parts)
    return ce / targets + args.load_balancing_weight * balance + z_weight * z / tokens, all_counts


def oracle(mode, accumulation, dp, width=None, args=TINY, rate=0.001):
    """First gradients (clipped) and the weights after STEPS; plain AdamW, and with "bias" the sign rule."""
    args = BIASED if mode == "bias" else args
    w = weights(args)
    fixed = {name: w.pop(name).float() for name in list(w) if name.endswith("score_bias")}
    w = {name: t.clone().requires_grad_() for name, t in w.items()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [t for t in w.values() if t.dim() > 1], "weight_decay": OPTIM.weight_decay},
            {"params": [t for t in w.values() if t.dim() == 1], "weight_decay": 0.0},
        ],
        lr=OPTIM.lr,
        betas=OPTIM.betas,
        eps=OPTIM.eps,
    )
    gradients = None
    for batch in STEPS:
        optimizer.zero_grad()
        loss, counts = oracle_loss(w | fixed, args, cut(batch, accumulation, dp, width), mode)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(w.values()), OPTIM.clip_grad)
        gradients = gradients or {name: t.grad.clone() for name, t in w.items()}
        optimizer.step()
        for n, bias in enumerate(fixed.values()):
            mean = counts[n].sum() / E
            for e in range(E):
                bias[e] += rate * (1 if counts[n][e] < mean else -1 if counts[n][e] > mean else 0)
    return gradients, {name: t.detach() for name, t in w.items()} | fixed


PARTITIONS = {  # world: (layout, model parallel, data parallel mode, accumulation, packed into rows of, recompute)
    1: [("mixtral", 1, "fsdp", 1, None, "none"), ("mixtral_sparse", 1, "fsdp", 2, 28, "block")],
    2: [("mixtral", 1, "sdp", 2, None, "norms_and_experts"), ("mixtral_sparse", 2, "fsdp", 1, None, "none")],
    4: [("mixtral", 2, "fsdp", 2, None, "block")],
}


SINGLE = [part for world in (1, 2) for part in PARTITIONS[world]]  # those of which single steps are taken as well
SAME = [samples(1, seed=9)[0]] * 4
MODES = [mode for mode in EVERY if mode != "bias"]
WEIGHED = [("document", 0.0), ("document", 0.0, 0.1), ("document", 0.0, 0.2)]  # (mode, weight, weight of the z-loss)
WEIGHED += [(mode, weight) for mode in MODES for weight in (0.1, 0.2)]


def on_every_rank(partitions):
    out = {}
    for part in partitions:
        layout, mp, mode, accumulation, width, recompute = part
        options = {"accumulation": accumulation, "width": width, "recompute": recompute}
        for balance in EVERY:
            args = BIASED if balance == "bias" else TINY
            out[part, balance] = train(args, layout, mp, mode, STEPS, balance=balance, **options)
        if part not in SINGLE:
            continue
        for losses in WEIGHED:
            out[part, *losses] = one_step(part, SAME, *losses)["gradients"]
        out[part, "reference"] = one_step(part, STEPS[0], "microbatch", 0.1, as_reference=True)
    if PARTITIONS[1][0] in partitions:
        out["evening out"] = evening_out()
    return out


def one_step(part, batch, balance, weight=0.0, z_weight=0.0, as_reference=False):
    """The reported losses and the gradients, not clipped."""
    args = replace(TINY, load_balancing_weight=weight)
    layout, mp, mode, accumulation, _, recompute = part
    mesh = mesh_for(mp, mode)
    model = build(args, layout, Tensors(weights()), mesh=mesh, mode=mode, recompute=recompute)
    dp = mesh.dp
    plan = BatchPlan(len(batch) // (accumulation * dp.size), accumulation, dp.rank, dp.size, pads=as_reference)
    (micro_batches,) = plan.epoch(batch, Rows.alone(range(len(batch))))
    optimizer = torch.optim.SGD(model.parameters())
    seen = {}
    optimizer.register_step_pre_hook(lambda *_: seen.update(gradients=harness.gradients(model)))
    objective = MeanOfMeans(NextToken()) if as_reference else NextToken()
    result = train_step(model, optimizer, micro_batches, objective, RouterLosses(balance, z_weight), clip_grad=1e9)
    loss_sum, balance = dp.all_reduce(result.loss_sum), dp.all_reduce(result.balance)
    return seen | {"loss": (loss_sum / result.targets).item(), "balance": balance.item()}


@pytest.fixture(scope="module")
def worlds():
    return {world: run_ranks(world, on_every_rank, partitions, timeout=300) for world, partitions in PARTITIONS.items()}


def trained(worlds, what, balance):
    """{partition: full tensors}"""
    args = BIASED if balance == "bias" else TINY
    return {
        part: assemble([rank[part, balance][what] for rank in worlds[world]], args)
        for world, partitions in PARTITIONS.items()
        for part in partitions
    }


def world_of(part):
    return next(world for world, partitions in PARTITIONS.items() if part in partitions)


def difference(a, b):
    """The largest error relative to a tensor's largest value."""
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).abs().max() / b[name].abs().max()).item() for name in b)


@pytest.mark.parametrize("balance", EVERY)
def test_every_partition_equals_the_plain_process(worlds, balance):
    """The modes that depend on the cut are held against a process that is told how it was cut."""
    for what, index in (("gradients", 0), ("weights", 1)):
        by_cut = {}
        for part, full in trained(worlds, what, balance).items():
            _, mp, _, accumulation, width, _ = part
            key = () if balance in EXACT else (accumulation, world_of(part) // mp, width)
            if key not in by_cut:
                by_cut[key] = oracle(balance, *(key or (1, 1)))
            assert difference(full, by_cut[key][index]) <= 1e-10, (part, what)


@pytest.mark.parametrize("balance", CUT)
def test_what_is_flagged_as_depending_on_the_cut_does(worlds, balance):
    whole, packed, two_ranks, sparse, four_ranks = trained(worlds, "gradients", balance).values()
    assert difference(whole, sparse) < 1e-10, "the layout changes nothing"
    assert difference(two_ranks, four_ranks) < 1e-10, "nor does model parallelism"
    assert difference(packed, whole) > 1e-4, "accumulation does"
    assert difference(two_ranks, whole) > 1e-4
    assert difference(oracle(balance, 1, 1)[0], oracle(balance, 1, 2)[0]) > 1e-4, "ranks do"


@pytest.mark.parametrize("loss", [*MODES, "z"])
def test_the_weight_means_what_it_says(worlds, loss):
    """Of a batch of equal samples: linear in the weight, and scaled by neither ranks, accumulation nor recompute."""
    gates = [f"layers.{n}.feed_forward.gate.weight" for n in range(L)]
    once, twice = [("document", 0.0, w) if loss == "z" else (loss, w) for w in (0.1, 0.2)]
    added = []
    for part in SINGLE:
        full = [assemble([r[part, *key] for r in worlds[world_of(part)]]) for key in (("document", 0.0), once, twice)]
        zero, one, two = ([gradients[gate] for gate in gates] for gradients in full)
        added.append([b - a for a, b in zip(zero, one, strict=True)])
        doubled = [b - a for a, b in zip(zero, two, strict=True)]
        torch.testing.assert_close(doubled, [2 * x for x in added[-1]], rtol=1e-9, atol=1e-13)
    assert all(x.abs().max() > 1e-5 for x in added[0])
    for other in added[1:]:
        torch.testing.assert_close(other, added[0], rtol=1e-9, atol=1e-13)


def reference_project(w, micro_batches):
    """LLaMA2-Accessory's (cross-entropy, balance): padding, id 0, is routed and counted, and the means are of means."""
    results = []
    for micro_batch in micro_batches:
        longest = max(len(s.tokens) for s in micro_batch)
        examples = torch.tensor([s.tokens + [0] * (longest - len(s.tokens)) for s in micro_batch])
        trained = torch.tensor([s.trained + [False] * (longest - len(s.tokens)) for s in micro_batch])
        logits, routers, chosen = zip(*(reference.forward(w, TINY, row) for row in examples), strict=True)
        labels = torch.where(trained, examples, -1)[:, 1:]
        ce = F.cross_entropy(torch.stack(logits)[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-1)
        balance = 0.0
        for n in range(TINY.n_layers):
            scores = torch.cat([x[n] for x in routers]).softmax(-1)
            index = torch.cat([x[n] for x in chosen])
            count = torch.stack([(index == e).sum() for e in range(E)])
            balance = balance + E / (len(scores) * K) * (count * scores.mean(0)).sum() / TINY.n_layers
        results.append(torch.stack([ce, balance]))
    return torch.stack(results).mean(0)


def test_the_references_numbers_on_request(worlds):
    for part in SINGLE:
        _, mp, _, accumulation, _, _ = part
        ranks = worlds[world_of(part)]
        w = {name: t.requires_grad_() for name, t in weights().items()}
        micro_batches = joined(cut(STEPS[0], accumulation, world_of(part) // mp))
        ce, balance = reference_project(w, micro_batches)
        (ce + TINY.load_balancing_weight * balance).backward()
        ours = [rank[part, "reference"] for rank in ranks]
        assert ours[0]["loss"] == pytest.approx(ce.item(), rel=1e-6)
        assert ours[0]["balance"] == pytest.approx(balance.item(), rel=1e-6)
        full = assemble([x["gradients"] for x in ours])
        assert difference(full, {name: t.grad for name, t in w.items()}) <= 1e-10, part


# ---- the bias: state of the model


def evening_out():
    """The largest load of a layer, as a multiple of the mean, before and after the bias moved 100 times."""
    start = {name: t * (0 if name.endswith("score_bias") else 1) for name, t in weights(BIASED).items()}
    model = build(BIASED, "mixtral", Tensors(start))
    rows = Rows.alone(range(16))
    (micro_batches,) = BatchPlan(8, 2, 0, 1).epoch(STEPS[0] + STEPS[1], rows)
    largest = []
    for _ in range(100):
        loads = count_loads(model, micro_batches)
        largest.append((loads.max(1).values * E / loads.sum(1)).tolist())
        shift_score_biases(model, loads, 0.005)
    return largest


def test_the_bias_evens_the_load_out(worlds):
    largest = worlds[1][0]["evening out"]
    assert min(largest[0]) > 1.5 and max(largest[-1]) < 1.25, (largest[0], largest[-1])


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    home = tmp_path_factory.mktemp("bias")
    make_tokenizer(home / "tokenizer.model")
    record = {"instruction": "a list of words", "output": "the answer is made from tokens"}
    (home / "records.jsonl").write_text("\n".join(json.dumps(record) for _ in range(24)))
    (home / "mix.yaml").write_text("META: [{path: records.jsonl}]")
    description = replace(TINY, vocab_size=304, max_seq_len=256).to_dict() | {"rope_scaling": None, "sliding_window": None}
    (home / "model.json").write_text(json.dumps(description))
    (home / "run.yaml").write_text(
        f"""
model: {{config: {home}/model.json, tokenizer: {home}/tokenizer.model, layout: mixtral}}
data: {{mix: {home}/mix.yaml, validation: 0}}
train: {{epochs: 2, batch_size: 2, accumulation: 2, max_steps: 2, balance: bias, bias_rate: 0.01}}
log: {{tensorboard: false}}
out: {home}/run
"""
    )
    return home / "run.yaml"


@pytest.fixture(scope="module")
def saved(run_file):
    """What a bf16 run over two data-parallel ranks saved."""
    codes, out, err = command("finetune", run_file, ranks=2)
    assert codes == [0, 0] and "a bias in each router's choice of experts, no loss" in out, err
    return run_file.parent / "run/epoch0-iter2"


def biases(directory):
    tensors = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    found = [{k.removeprefix("llma."): t for k, t in of_rank.items() if k.endswith("score_bias")} for of_rank in tensors]
    assert all(len(x) == L and all(torch.equal(x[k], found[0][k]) for k in x) for x in found), "on every rank the same"
    return found[0]


def test_the_bias_is_saved_in_full_precision(saved):
    assert json.loads((saved / "config.json").read_text())["moe"]["score_bias"] is True
    for bias in biases(saved).values():
        assert bias.dtype == torch.float32 and bias.abs().max() > 0
        steps = bias / 0.01  # each of two steps adds the rate, takes it away, or (an even load) neither
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-5)
        assert steps.abs().max() <= 2.001


def test_the_bias_goes_on_in_the_other_layout_and_stays_where_it_is_not_asked_for(saved, run_file, tmp_path):
    words = [f"model.checkpoint={saved}", "model.config=null", "model.tokenizer=null", "model.layout=mixtral_sparse"]
    words += ["parallel.model_parallel=2", "train.balance=global", "train.balance_weight=0.01", f"out={tmp_path}/run"]
    codes, out, err = command("finetune", run_file, *words, ranks=2)
    assert codes == [0, 0] and "accumulation costs one more forward" in out, err
    before, after = biases(saved), biases(tmp_path / "run/epoch0-iter2")
    assert all(torch.equal(after[name], before[name]) for name in before)
    described = json.loads((tmp_path / "run/epoch0-iter2/config.json").read_text())
    assert described["load_balancing_weight"] == 0.01 and described["moe"]["score_bias"] is True


def test_a_run_resumes_with_its_bias(run_file, tmp_path):
    """Four steps at a stretch, and the last two of them in the other layout at another size."""
    words = ["train.max_steps=4", "save.state_every=2", "save.keep_states=2", "parallel.precision=fp64"]
    codes, _, err = command("finetune", run_file, *words, f"out={tmp_path}/whole", ranks=2)
    assert codes == [0, 0], err
    resume = [f"resume={tmp_path}/whole/states/step2", f"out={tmp_path}/resumed", "model.layout=mixtral_sparse"]
    again = ["parallel.model_parallel=2", "train.accumulation=4"]
    codes, _, err = command("finetune", run_file, *words, *resume, *again, ranks=2)
    assert codes == [0, 0], err
    whole, resumed = (biases(tmp_path / name / "epoch1-iter4") for name in ("whole", "resumed"))
    assert all(torch.equal(resumed[name], bias) and bias.any() for name, bias in whole.items())
    codes, _, err = command(
        "finetune", run_file, *words, *resume, "train.balance=global", "parallel.model_parallel=2", ranks=2
    )
    assert codes == [1, 1] and "score_bias: resume with the tuning and train.balance that it was saved with" in err


def reload(directories):
    results = {}
    for directory in directories:
        source = Checkpoint(directory)
        for layout in ("mixtral", "mixtral_sparse"):
            for size in (1, 2):
                model = build(source.args, layout, source, mesh=make_mesh(size))
                results[directory, layout, size] = evaluate(model, list(range(1, 30)))
    return results


def test_the_bias_decides_in_every_layout_and_size(saved, tmp_path):
    convert(Checkpoint(saved), tmp_path / "sparse", Target("mixtral_sparse", 4))
    assert all(torch.equal(biases(tmp_path / "sparse")[name], bias) for name, bias in biases(saved).items())
    assert all(comparison.exact for comparison in compare(Checkpoint(saved), Checkpoint(tmp_path / "sparse")))
    large = tmp_path / "large"
    shutil.copytree(saved, large)
    for path in large.glob("*.safetensors"):
        save_file({k: t * 60 if k.endswith("score_bias") else t for k, t in load_file(path).items()}, path)
    logits = {}
    for directory in (saved, large):
        source = Checkpoint(directory)
        whole = {name: source.logical.whole(name) for name in source.logical.shapes}
        w = {name: source.read(name, region).double() for name, region in whole.items()}
        logits[directory] = reference.forward(w, source.args, torch.arange(1, 30))[0]
    for rank in run_ranks(2, reload, [saved, large]):
        for key, ours in rank.items():
            torch.testing.assert_close(ours, logits[key[0]], rtol=1e-10, atol=1e-10, msg=str(key))
    assert difference({"": logits[large]}, {"": logits[saved]}) > 1e-3, "a larger bias chooses other experts"
    codes, _, err = command("generate", saved, "a list of", "--max-gen-len", 4)
    assert codes == [0], err


@pytest.mark.parametrize(
    "target", [Target("hf"), Target("mistral"), Target("mixtral", suffix="pth")], ids=lambda t: t.format
)
def test_formats_without_a_place_for_the_bias_refuse_it(saved, tmp_path, target):
    with pytest.raises(UserError, match="no place for the routers' score biases"):
        convert(Checkpoint(saved), tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


BAD = {
    "bias and adapters": ("train: {balance: bias}, tuning: {bias: true}", "choose another train.balance"),
    "reference without its balance": ("train: {reference_loss: true}", "set train.balance=microbatch"),
    "a negative weight": ("train: {balance_weight: -1.0}", "train.balance_weight must be at least 0"),
    "an unknown mode": ("train: {balance: globle}", "'globle' is not one of 'document', 'global'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_settings_that_contradict_each_other(kind, tmp_path):
    settings, sentence = BAD[kind]
    (tmp_path / "run.yaml").write_text(f"{{data: {{mix: m}}, out: o, model: {{checkpoint: c}}, {settings}}}")
    with pytest.raises(UserError, match=sentence):
        RunConfig.load(tmp_path / "run.yaml", [])


def test_the_pth_files_of_a_run_are_refused_before_it_starts(run_file, tmp_path):
    codes, _, err = command("finetune", run_file, "save.format=pth", f"out={tmp_path}/run")
    assert codes == [1] and "no place for the routers' score biases" in err


def test_what_depends_on_the_cut_is_said_at_the_start():
    assert balance_note("global", 1, 0.1) is None and balance_note("document", 8, 0.1) is None
    assert "accumulation costs one more forward" in balance_note("global", 2, 0.1)
    for mode in ("microbatch", "hf"):
        assert "it depends on ranks, batch_size and accumulation" in balance_note(mode, 1, 0.1)
        assert balance_note(mode, 1, 0.0) is None
