"""A plain Mixtral in one process: full logical tensors, no autograd tricks, no code shared with the code under test."""

import hashlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


def forward(w, args, tokens, scaling=1.0, seen=()):
    """One sequence [S] -> logits [S, V], router logits [L, S, E] and chosen experts [L, S, K].

    Adapters are tensors of ``w`` beside their matrix; ``scaling`` is that of B A. For a classifier V is the labels' number.
    ``seen``: for each image, where its words begin, and its features, [views, tokens, width] for each group of encoders.
    """
    routers, chosen = [], []
    w = with_adapters(w, scaling)
    x = w["tok_embeddings.weight"][tokens]
    for place, features in seen:
        words = image_words(w, features)
        x = torch.cat([x[:place], words, x[place + len(words) :]])
    for n in range(args.n_layers):
        layer = layer_of(w, n)
        x = x + attention(norm(x, layer["attention_norm.weight"], args.norm_eps), layer, args)
        h = norm(x, layer["ffn_norm.weight"], args.norm_eps)
        router, top, share = routing(h, layer, args)
        x = x + experts(h, share, layer)
        routers.append(router)
        chosen.append(top)
    head = w["score.weight" if args.labels else "output.weight"]
    return norm(x, w["norm.weight"], args.norm_eps) @ head.T, torch.stack(routers), torch.stack(chosen)


def image_words(w, features):
    """The inputs at the places of one image [words, D]; the connector is recognised by its tensors."""
    of = {name.removeprefix("connector."): tensor for name, tensor in w.items() if name.startswith("connector.")}
    groups = []
    for name, group in zip(("qformer_proj", "visual_proj")[-len(features) :], features, strict=True):
        if "clip_proj.weight" in of:
            names = "clip_proj", "clip_proj_norm"
        elif "multi_modal_projector.linear_1.weight" in of:
            names = "multi_modal_projector.linear_1", "multi_modal_projector.linear_2"
        else:
            name = name if f"{name}.0.weight" in of else "qformer_proj"
            names = f"{name}.0", f"{name}.1"
        (first, b1), (second, b2) = ((of[f"{n}.weight"], of[f"{n}.bias"]) for n in names)
        y = group @ first.T + b1
        if second.dim() == 2:
            y = (y * (1 + torch.erf(y / math.sqrt(2))) / 2) @ second.T + b2
        else:
            y = y - y.mean(-1, keepdim=True)
            y = y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * second + b2
        groups.append(y)
    tags = [of[tag].expand(len(groups[0]), 1, -1) for tag in ("start_img", "end_img") if tag in of]
    return torch.cat([*tags[:1], *groups, *tags[1:]], 1).flatten(0, 1)


def layer_of(w, n):
    """The tensors of layer ``n``, by their names in the layer."""
    return {name.removeprefix(f"layers.{n}."): tensor for name, tensor in w.items() if name.startswith(f"layers.{n}.")}


def attention(h, layer, args):
    """[S, D] -> [S, D], causal, over a window if there is one."""
    length = len(h)
    q, k, v = (
        (h @ layer[f"attention.{m}.weight"].T + layer.get(f"attention.{m}.bias", 0.0))
        .view(length, -1, args.head_dim)
        .transpose(0, 1)
        for m in ("wq", "wk", "wv")
    )
    q, k = rotate(q, args), rotate(k, args)
    group = args.n_heads // args.n_kv_heads
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    hidden_from = (distance < 0) | (distance >= (args.sliding_window or length))
    scores = (q @ k.transpose(1, 2) / math.sqrt(args.head_dim)).masked_fill(hidden_from, -math.inf)
    heads = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1)
    return heads @ layer["attention.wo.weight"].T + layer.get("attention.wo.bias", 0.0)


def routing(h, layer, args):
    """Router logits [S, E], chosen experts [S, K], and the weight of each expert [S, E]."""
    router = h @ layer["feed_forward.gate.weight"].T
    p = router.softmax(-1)
    top = (p + layer.get("feed_forward.gate.score_bias", 0.0)).topk(args.moe.num_experts_per_tok, -1).indices
    share = torch.zeros_like(p).scatter(1, top, p.gather(1, top))
    return router, top, share / share.sum(-1, keepdim=True)


def experts(h, share, layer):
    """The sum of the experts' outputs, weighted by ``share``."""
    y, biased = torch.zeros_like(h), "feed_forward.experts.w1_bias" in layer
    for e in range(share.shape[1]):
        w1, w2, w3 = (layer[f"feed_forward.experts.{m}"][e] for m in ("w1", "w2", "w3"))
        b1, b2, b3 = (layer[f"feed_forward.experts.{m}_bias"][e] if biased else 0.0 for m in ("w1", "w2", "w3"))
        y = y + share[:, e : e + 1] * ((F.silu(h @ w1.T + b1) * (h @ w3.T + b3)) @ w2.T + b2)
    return y


def with_adapters(w, scaling):
    """Every matrix with its LoRA merged: W + scaling * B A; the embedding's W is stored transposed."""
    w = dict(w)
    for name in [name for name in w if name.endswith("lora_a")]:
        matrix = name.replace(".lora_a", ".weight").replace("_lora_a", "")
        product = scaling * w[name.replace("lora_a", "lora_b")] @ w[name]
        w[matrix] = w[matrix] + (product.T if matrix == "tok_embeddings.weight" else product)
    return w


def norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x, args):
    """Rotary embedding of [heads, S, head_dim] over pairs (2i, 2i + 1), by the definition."""
    out = torch.empty_like(x)
    position = torch.arange(x.shape[1], dtype=x.dtype) * (args.rope_scaling or 1.0)
    for i in range(args.head_dim // 2):
        angle = position * args.rope_theta ** (-2 * i / args.head_dim)
        cos, sin = angle.cos(), angle.sin()
        out[..., 2 * i] = x[..., 2 * i] * cos - x[..., 2 * i + 1] * sin
        out[..., 2 * i + 1] = x[..., 2 * i] * sin + x[..., 2 * i + 1] * cos
    return out


class LossParts(NamedTuple):
    """The parts of a training loss over a whole global batch, and the router's closest decision."""

    ce: torch.Tensor  # mean cross-entropy over the targets
    balance: torch.Tensor
    z: torch.Tensor
    counts: torch.Tensor  # [L, E] routed rows of each expert
    margin: float  # smallest difference between the router logits of the last chosen expert and the next one


class ReferenceStep(NamedTuple):
    """One optimiser step."""

    parts: LossParts
    norm: float  # of the whole gradient, before clipping
    scale: float  # the factor of clipping
    gradients: dict  # clipped
    weights: dict  # after the step


def loss_parts(w, args, samples, balance, scaling=1.0):
    """Parts of the loss over a whole global batch of (tokens, trained) or (tokens, label), by their definitions.

    A sample with images has ``seen`` as a third element (see ``forward``).
    """
    total, targets, documents = torch.zeros(()), 0, []
    margin, top_k = math.inf, args.moe.num_experts_per_tok
    for tokens, learnt, *seen in samples:
        logits, routers, chosen = forward(w, args, torch.tensor(tokens), scaling, *seen)
        if args.labels:
            wanted = [(len(tokens) - 1, learnt)]
        else:
            wanted = [(place - 1, tokens[place]) for place in range(1, len(tokens)) if learnt[place]]
        total = total - sum(logits.log_softmax(-1)[place, number] for place, number in wanted)
        targets += len(wanted)
        documents.append((routers, F.one_hot(chosen, args.moe.num_experts).sum(2)))
        if top_k < args.moe.num_experts:
            ranked = routers.detach().sort(-1, descending=True).values
            margin = min(margin, (ranked[..., top_k - 1] - ranked[..., top_k]).min().item())
    loads = torch.stack([counts.sum(1) for _, counts in documents]).sum(0)
    if balance == "global":
        documents = [(torch.cat([d[0] for d in documents], 1), torch.cat([d[1] for d in documents], 1))]
    tokens = sum(routers.shape[1] for routers, _ in documents)
    uneven, large = torch.zeros(2)
    for routers, counts in documents:
        probs, length = routers.softmax(-1), routers.shape[1]
        large = large + routers.logsumexp(-1).pow(2).sum() / (len(routers) * tokens)
        per_layer = args.moe.num_experts / (length * top_k) * (counts.sum(1) * probs.mean(1)).sum(-1)
        uneven = uneven + per_layer.mean() * length / tokens
    return LossParts(total / targets, uneven, large, loads, margin)


def weighted(parts, args, z_weight=0.01):
    """The training loss."""
    return parts.ce + args.load_balancing_weight * parts.balance + z_weight * parts.z


def loss(w, args, samples, balance, scaling=1.0, z_weight=0.01):
    """Training loss over a whole global batch of (tokens, trained) pairs."""
    return weighted(loss_parts(w, args, samples, balance, scaling), args, z_weight)


def schedule(counts, lr, min_lr, warmup):
    """The rate of each step, of ``counts`` rows: it rises over the first ``warmup`` rows, then falls on half a cosine."""
    rates, seen = [], 0
    for count in counts:
        if seen < warmup:
            rates.append(lr * min(1.0, (seen + count) / warmup))
        else:
            rates.append(min_lr + (lr - min_lr) * (1 + math.cos(math.pi * (seen - warmup) / (sum(counts) - warmup))) / 2)
        seen += count
    return rates


NF4 = (
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334 "
    "-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224 "
    "0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"
)


def quantised(w, way):
    """``w`` [..., in] quantised in a ``way`` such as nf4-64, int4-128, int3-64 or int8, and dequantised."""

    def of_blocks(scale):
        return torch.where(scale == 0, 1.0, scale.float())[:, None]

    kind, _, group = way.partition("-")
    blocks = w.float().reshape(-1, int(group or w.shape[-1]))
    if kind in ("int4", "int3", "int2"):
        most = 2 ** int(kind[-1]) - 1
        low, high = blocks.amin(1).clamp(max=0), blocks.amax(1).clamp(min=0)
        scale = of_blocks(((high - low) / most).half())
        zero = (-low[:, None] / scale).round()
        numbers = ((blocks / scale).round() + zero).clamp(0, most) - zero
    else:
        scale = of_blocks((blocks.abs().amax(1) / (127 if kind == "int8" else 1)).bfloat16())
        if kind == "int8":
            numbers = (blocks / scale).round().clamp(-127, 127)
        else:
            table = torch.tensor([float(number) for number in NF4.split()], dtype=torch.float32)
            numbers = table[((blocks / scale)[..., None] - table).abs().argmin(-1)]
    return (numbers * scale).reshape(w.shape).double()


def next_token(logits, prompt, answer, how):
    """The token chosen by a request's sampling, by the definition of each setting; a draw is a place in [0, 1)."""
    scores = dict(enumerate(logits.tolist()))
    for token, bias in how["logit_bias"].items():
        scores[token] += bias
    for token in {*prompt, *answer}:
        penalty = how["repetition_penalty"]
        scores[token] *= penalty if scores[token] < 0 else 1 / penalty
    for token in set(answer):
        scores[token] -= how["presence_penalty"] + how["frequency_penalty"] * answer.count(token)
    ranked = sorted(scores, key=lambda token: -scores[token])
    if not how["temperature"]:
        return ranked[0]
    weights = [math.exp((scores[token] - scores[ranked[0]]) / how["temperature"]) for token in ranked]
    weights = weights[: how["top_k"] or len(weights)]
    count = 1
    while count < len(weights) and sum(weights[:count]) < how["top_p"] * sum(weights) and weights[count] >= how["min_p"]:
        count += 1
    digest = hashlib.sha256(f"{how['seed']}/{len(answer)}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64 * sum(weights[:count])
    return next(token for n, token in enumerate(ranked, 1) if place < sum(weights[:n]) or n == count)


def adamw(tensor, g, moments, step, *, rate, weight_decay, betas, eps):
    """One step of AdamW by its definition (Loshchilov & Hutter 2019), in place; ``step`` counts from 1."""
    m, v = moments
    m.mul_(betas[0]).add_(g, alpha=1 - betas[0])
    v.mul_(betas[1]).add_(g * g, alpha=1 - betas[1])
    tensor.mul_(1 - rate * weight_decay)
    tensor.sub_(rate * (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps))


def train_steps(w, args, batches, *, balance, clip, lr, weight_decay, betas, eps, trains=None, scaling=1.0):
    """AdamW over global batches; yields a ReferenceStep for each.

    ``lr``: one rate, or one for each step. ``trains``: the names of trained tensors; None: all.
    """
    rates = lr if isinstance(lr, list) else [lr] * len(batches)
    frozen = {name: tensor for name, tensor in w.items() if trains is not None and name not in trains}
    w = {name: tensor.clone().requires_grad_() for name, tensor in w.items() if name not in frozen}
    moments = {name: (torch.zeros_like(t), torch.zeros_like(t)) for name, t in w.items()}
    for step, (samples, rate) in enumerate(zip(batches, rates, strict=True), 1):
        for tensor in w.values():
            tensor.grad = None
        parts = loss_parts(w | frozen, args, samples, balance, scaling)
        weighted(parts, args).backward()
        size = math.sqrt(sum(t.grad.pow(2).sum().item() for t in w.values()))
        scale = min(1.0, clip / (size + 1e-6))
        with torch.no_grad():
            for name, tensor in w.items():
                decays = tensor.dim() > 1 and not name.endswith("bias")
                options = {"rate": rate, "weight_decay": weight_decay if decays else 0.0, "betas": betas, "eps": eps}
                adamw(tensor, tensor.grad.mul_(scale), moments[name], step, **options)
        gradients = {name: t.grad.clone() for name, t in w.items()}
        yield ReferenceStep(parts, size, scale, gradients, {name: t.detach().clone() for name, t in w.items()})


def train(w, args, batches, **options):
    """Run ``train_steps``; returns the last weights, the first clipped gradients, and the norms."""
    steps = list(train_steps(w, args, batches, **options))
    return steps[-1].weights, steps[0].gradients, [step.norm for step in steps]
