"""Plain generation with a KV cache: greedy, or sampled from the nucleus."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from accessory.errors import UserError
from accessory.model.cache import KVCache
from accessory.model.decoder import Decoder, Inputs
from accessory.model.documents import Documents
from accessory.model.head import Logits
from accessory.parallel.mesh import Axis


def make_cache(model: Decoder, slots: int, length: int) -> KVCache:
    """An empty cache for ``slots`` sequences of at most ``length`` tokens."""
    args = model.args
    kv_heads = max(1, args.n_kv_heads // model.mesh.mp.size)
    return KVCache(args.n_layers, slots, length, kv_heads, args.head_dim, like=model.norm.weight)


@torch.inference_mode()
def generate_ids(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_gen_len: int,
    max_seq_len: int,
    vocab_size: int | None = None,
    temperature: float = 0.0,
    top_p: float = 0.95,
) -> Iterator[Tensor]:
    """Continue several prompts at once; yields one token per prompt [B] (on the CPU) at a time.

    The caller stops taking when it has seen enough; a sequence also ends (its tokens then mean nothing) at ``max_seq_len``.

    Every rank of the model-parallel group must run this with the same arguments, and gets the same tokens.

    Args:
        vocab_size: choose among this many tokens (a model's vocabulary may be padded beyond its tokenizer's); None: all.
        temperature: 0 takes the likeliest token.
        top_p: share of the probability that sampling is kept to.

    Raises:
        UserError: a prompt is empty, or leaves no room below ``max_seq_len``.
    """
    device = model.norm.weight.device
    lengths = [len(prompt) for prompt in prompts]
    if not prompts or min(lengths) == 0:
        raise UserError("a prompt must have at least one token")
    if max(lengths) >= max_seq_len:
        raise UserError(f"a prompt of {max(lengths)} tokens leaves no room to answer in max_seq_len {max_seq_len}")
    steps = min(max_gen_len, max_seq_len - min(lengths))
    cache = make_cache(model, len(prompts), min(max_seq_len, max(lengths) + steps))
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    documents = Documents.of(lengths).to(device)
    for _ in range(steps):
        last, _ = model(Inputs(tokens, documents, cache), Logits(documents.ends))
        tokens = _choose(last[:, :vocab_size], temperature, top_p, model.mesh.mp)
        yield tokens.cpu()
        past = [min(behind + n, cache.length - 1) for behind, n in zip(documents.past, documents.lengths, strict=True)]
        documents = Documents.of([1] * len(prompts), past).to(device)


def _choose(logits: Tensor, temperature: float, top_p: float, mp: Axis) -> Tensor:
    """The next token of each sequence [B] from logits [B, V]; rank 0 of ``mp`` decides for all."""
    if temperature > 0:
        probs, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
        probs[probs.cumsum(-1) - probs > top_p] = 0.0  # keep every token that starts below top_p, so at least one
        chosen = order.gather(1, probs.multinomial(1)).squeeze(1)
    else:
        chosen = logits.argmax(-1)
    return mp.broadcast(chosen)
