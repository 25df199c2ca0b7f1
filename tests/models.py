"""Small models and data for the tests, and what every rank of a test does with them."""

import random
from dataclasses import replace

import torch
import torch.distributed as dist

from accessory.certify import harness, reference
from accessory.certify.harness import Tensors
from accessory.certify.problem import SMALL
from accessory.certify.serving import Numbers
from accessory.checkpoint import adapter
from accessory.checkpoint.storage import TensorWriter
from accessory.data.mix import Sample
from accessory.data.tokenizer import train_tokenizer
from accessory.infer.engine import Engine
from accessory.infer.sampling import Sampling
from accessory.model.args import MoEArgs
from accessory.model.build import RandomWeights
from accessory.model.decoder import Inputs
from accessory.model.documents import Documents
from accessory.model.head import Logits
from accessory.model.logical import LogicalModel
from accessory.parallel.mesh import make_mesh
from accessory.settings import OptimSection, ParallelSection

TINY = replace(
    SMALL,
    head_dim=8,
    n_heads=8,
    n_kv_heads=4,
    sliding_window=6,
    max_seq_len=64,
    moe=MoEArgs(8, num_experts_per_tok=2),
)
OPTIM = OptimSection(lr=1e-2, weight_decay=0.1, clip_grad=0.5, betas=(0.9, 0.95), eps=1e-8)


WORDS = ["the", "a", "list", "of", "tokens", "is", "made", "from", "words", "and", "then", "every", "answer", "not"]


def make_tokenizer(path, pieces=300):
    """A small tokenizer.model at ``path``."""
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=8)) + ", and then some." for _ in range(200)]
    return train_tokenizer(lines, path, pieces)


def weights(args=TINY, seed=0, scale=10.0, dtype=torch.float64, adapters=None):
    """Random logical tensors, large enough for routing and attention to be far from uniform; adapters are not zero."""
    logical = LogicalModel(args, adapters or {})
    source = RandomWeights(logical, seed)
    whole = {name: source.read(name, logical.whole(name)).to(dtype) for name in logical.shapes}
    result = {name: tensor * (scale if tensor.dim() > 1 else 1.0) for name, tensor in whole.items()}
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in result.items():
        if name.endswith(("lora_b", "bias")):
            tensor.normal_(0.0, 0.1, generator=generator)
    return result


def write_adapter(directory, logical, tensors, base):
    """An adapter directory as a run saves it: ``tensors`` beside the model whose fingerprint is ``base``."""
    adapter.lay_out_adapter(directory, logical, {name: tensor.dtype for name, tensor in tensors.items()})
    with TensorWriter(directory / adapter.TENSORS) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
    digests = {name: adapter.digest(tensor) for name, tensor in tensors.items()}
    adapter.write_manifest(directory, logical, digests, {"fingerprint": base})


def samples(count, seed, args=TINY, longest=14):
    """Random sequences with a masked prompt of random length."""
    rng = random.Random(seed)
    result = []
    for _ in range(count):
        length = rng.randint(3, longest)
        prompt = rng.randint(1, length - 1)
        tokens = [rng.randrange(args.vocab_size) for _ in range(length)]
        result.append(Sample(tokens, [False] * prompt + [True] * (length - prompt)))
    return result


def build(args, layout, source, *, adapters=None, **options):
    """A decoder, sharded over data-parallel ranks as in a run."""
    return harness.build(LogicalModel(args, adapters or {}), layout, source, **options)


def mesh_for(mp, mode="fsdp"):
    """The mesh of a run with these settings (a collective)."""
    return make_mesh(mp, ParallelSection(data_parallel=mode).dp_shard())


def assemble(parts, args=TINY, adapters=None):
    """Full logical tensors from what the ranks returned; where several hold the same part they must agree bitwise."""
    full, differ = harness.assemble(parts, LogicalModel(args, adapters or {}).shapes)
    assert not differ, f"ranks disagree about {sorted(differ)}"
    assert not any(tensor.isnan().any() for tensor in full.values())
    return full


def train(
    args, layout, mp, mode, steps, *, accumulation, balance, z_weight=0.01, width=None, w=None, optim=OPTIM, **options
):
    """Train on ``steps`` (lists of samples, one global batch each) and return what happened on this rank.

    ``w``: the first weights. ``width``: pack samples into rows of so many tokens. ``options``: of ``build``.
    """
    source = Tensors(weights(args, adapters=options.get("adapters")) if w is None else w)
    model = build(args, layout, source, mesh=mesh_for(mp, mode), mode=mode, **options)
    logits = [evaluate(model, sample.tokens) for sample in steps[0][:2]]
    how = {"accumulation": accumulation, "balance": balance, "z_weight": z_weight, "width": width}
    return {"logits": logits} | harness.train(model, steps, optim, **how)


def train_in_one_process(w, steps, args=TINY, **options):
    """(weights, first gradients, norms) of the plain reference, trained with OPTIM."""
    batches = [[(sample.tokens, sample.trained) for sample in batch] for batch in steps]
    optim = {name: getattr(OPTIM, name) for name in ("lr", "weight_decay", "betas", "eps")}
    return reference.train(w, args, batches, clip=OPTIM.clip_grad, **optim, **options)


def check_close(ours, expected, bound, where=""):
    """No tensor of ``expected`` is further from ours than ``bound`` of its largest value."""
    for name, tensor in expected.items():
        error = (ours[name] - tensor).abs().max().item() / (tensor.abs().max().item() or 1.0)
        assert error <= bound, f"{where}: {name} differs by {error:.1e}"


@torch.no_grad()
def evaluate(model, tokens):
    """Logits [S, V] of one sequence."""
    return model(Inputs(torch.tensor(tokens), Documents.of([len(tokens)])), Logits())[0]


def answer_ids(model, prompts, max_tokens, max_seq_len, **sampling):
    """Tokens of the answer to each prompt, on every rank."""
    engine = Engine(model, Numbers(model.args.vocab_size), max_seq_len=max_seq_len)
    if model.mesh.mp.rank:
        engine.follow()
        requests = []
    else:
        requests = [engine.submit(prompt, Sampling(max_tokens=max_tokens, **sampling)) for prompt in prompts]
        for _ in engine.run():
            pass
        engine.close()
    answers = [[request.answer for request in requests]]
    if model.mesh.mp.size > 1:
        dist.broadcast_object_list(answers, group=model.mesh.mp.group, group_src=0)
    return answers[0]
