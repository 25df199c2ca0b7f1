"""The same weights in Hugging Face's MixtralForCausalLM: same logits, loss and gradients."""

import pytest
import torch
from models import TINY, Tensors, build, samples, weights
from ranks import run_ranks
from transformers import MixtralConfig, MixtralForCausalLM

from accessory.certify.parity import grid
from accessory.data.loader import collate
from accessory.model.head import Logits, LossSum

ARGS = TINY.__class__(**{**TINY.__dict__, "rope_scaling": None, "sliding_window": None, "rope_theta": 1e6})


def half_split(weight, heads):
    """Rows of q or k: interleaved pairs -> transformers' two halves."""
    return weight.view(heads, len(weight) // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def interleaved(weight, heads):
    return weight.view(heads, 2, len(weight) // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def transformers_model(w, args=ARGS):
    """transformers' model of the logical tensors ``w``, in their dtype."""
    turned = {"rope_type": "linear", "factor": 1 / args.rope_scaling} if args.rope_scaling else {"rope_type": "default"}
    config = MixtralConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        rms_norm_eps=args.norm_eps,
        rope_parameters=turned | {"rope_theta": args.rope_theta},
        sliding_window=args.sliding_window,
        num_local_experts=args.moe.num_experts,
        num_experts_per_tok=args.moe.num_experts_per_tok,
        max_position_embeddings=args.max_seq_len,
        tie_word_embeddings=False,
    )
    model = MixtralForCausalLM(config).to(w["norm.weight"].dtype)
    state = {"model.embed_tokens.weight": w["tok_embeddings.weight"], "model.norm.weight": w["norm.weight"]}
    state["lm_head.weight"] = w["output.weight"]
    for n in range(args.n_layers):
        ours, theirs = f"layers.{n}.", f"model.layers.{n}."
        attention = {m: w[f"{ours}attention.{m}.weight"] for m in ("wq", "wk", "wv", "wo")}
        state[f"{theirs}self_attn.q_proj.weight"] = half_split(attention["wq"], args.n_heads)
        state[f"{theirs}self_attn.k_proj.weight"] = half_split(attention["wk"], args.n_kv_heads)
        state[f"{theirs}self_attn.v_proj.weight"] = attention["wv"]
        state[f"{theirs}self_attn.o_proj.weight"] = attention["wo"]
        state[f"{theirs}input_layernorm.weight"] = w[f"{ours}attention_norm.weight"]
        state[f"{theirs}post_attention_layernorm.weight"] = w[f"{ours}ffn_norm.weight"]
        experts = {m: w[f"{ours}feed_forward.experts.{m}"] for m in ("w1", "w2", "w3")}
        state[f"{theirs}mlp.gate.weight"] = w[f"{ours}feed_forward.gate.weight"]
        state[f"{theirs}mlp.experts.gate_up_proj"] = torch.cat([experts["w1"], experts["w3"]], 1)
        state[f"{theirs}mlp.experts.down_proj"] = experts["w2"]
    model.load_state_dict(state)
    return model


def by_logical_name(g, args=ARGS):
    """Tensors under transformers' names, each the shape of a parameter, by our logical names."""
    out = {"tok_embeddings.weight": g["model.embed_tokens.weight"], "norm.weight": g["model.norm.weight"]}
    out |= {"score.weight": g["score.weight"]} if args.labels else {"output.weight": g["lm_head.weight"]}
    for n in range(args.n_layers):
        ours, theirs = f"layers.{n}.", f"model.layers.{n}."
        out[f"{ours}attention.wq.weight"] = interleaved(g[f"{theirs}self_attn.q_proj.weight"], args.n_heads)
        out[f"{ours}attention.wk.weight"] = interleaved(g[f"{theirs}self_attn.k_proj.weight"], args.n_kv_heads)
        out[f"{ours}attention.wv.weight"] = g[f"{theirs}self_attn.v_proj.weight"]
        out[f"{ours}attention.wo.weight"] = g[f"{theirs}self_attn.o_proj.weight"]
        out[f"{ours}attention_norm.weight"] = g[f"{theirs}input_layernorm.weight"]
        out[f"{ours}ffn_norm.weight"] = g[f"{theirs}post_attention_layernorm.weight"]
        out[f"{ours}feed_forward.gate.weight"] = g[f"{theirs}mlp.gate.weight"]
        w1, w3 = g[f"{theirs}mlp.experts.gate_up_proj"].chunk(2, 1)
        out |= {f"{ours}feed_forward.experts.w1": w1, f"{ours}feed_forward.experts.w3": w3}
        out[f"{ours}feed_forward.experts.w2"] = g[f"{theirs}mlp.experts.down_proj"]
    return out


def run_ours(layout, kernel, w, batch):
    model = build(ARGS, layout, Tensors(w), dtype=torch.float32, kernel=kernel)
    logits, _ = model(batch.inputs(), Logits())
    loss_sum, _ = model(batch.inputs(), LossSum(batch.targets))
    loss = loss_sum / batch.target_tokens
    loss.backward()
    gradients = {name: p.grad.view(w[name].shape) for name, p in model.named_parameters()}
    return logits.detach(), loss.detach(), gradients


@pytest.mark.parametrize("kernel", ["grouped", "looped"])
@pytest.mark.parametrize("layout", ["mixtral", "mixtral_sparse"])
def test_logits_loss_and_gradients(layout, kernel):
    w = weights(ARGS, scale=5.0, dtype=torch.float32)
    batch = collate(samples(4, seed=5, longest=40))
    ((logits, loss, gradients),) = run_ranks(1, run_ours, layout, kernel, w, batch)

    model = transformers_model(w)
    tokens, labels, mask = grid(batch)
    out = model(input_ids=tokens, attention_mask=mask.long(), labels=labels)
    out.loss.backward()

    assert close(logits, out.logits[mask])
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
    for name, expected in by_logical_name({name: p.grad for name, p in model.named_parameters()}).items():
        assert close(gradients[name], expected), name


def close(ours, theirs):
    """Largest error at most 1e-5 of the largest value."""
    return (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
