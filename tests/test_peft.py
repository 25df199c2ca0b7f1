"""The same adapter in Hugging Face's PEFT on MixtralForCausalLM: same logits, loss and gradients.

PEFT's tensors, read off its source (0.21): an adapter on a stacked parameter [E, out, in] is ``lora_A [E * R, in]``, row
``e * R + r``, and ``lora_B [out, R * E]``, column ``r * E + e``. ``gate_up_proj`` holds w1 above w3, so that one adapter
serves both: either they share an A, or A is theirs stacked [2R, D] and B is theirs as two blocks on the diagonal.
"""

import pytest
import torch
from models import Tensors, build, samples, weights
from peft import LoraConfig, get_peft_model
from ranks import run_ranks
from test_transformers import ARGS, close, half_split, transformers_model

from accessory.certify.parity import grid
from accessory.data.loader import collate
from accessory.model.head import Logits, LossSum
from accessory.settings import LoraSection, TuningSection
from accessory.tuning.spec import resolve

RANK, ALPHA, EXPERTS = 3, 2.0, ARGS.moe.num_experts
TARGETS = ("attention", "experts", "router", "embeddings", "output")
LINEARS = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo"}


def run_ours(layout, kernel, section, w, batch):
    spec = resolve(section, ARGS)
    tuning = {"adapters": spec.logical.adapters, "trains": spec.trains}
    model = build(ARGS, layout, Tensors(w), dtype=torch.float32, kernel=kernel, **tuning)
    logits, _ = model(batch.inputs(), Logits())
    loss_sum, _ = model(batch.inputs(), LossSum(batch.targets))
    loss = loss_sum / batch.target_tokens
    loss.backward()
    gradients = {name: p.grad.view(w[name].shape) for name, p in model.named_parameters() if p.requires_grad}
    return logits.detach(), loss.detach(), gradients


def as_peft(t, shared, args=ARGS):
    """Our adapter tensors (or their gradients) under PEFT's names, in PEFT's order.

    ``shared``: w1 and w3 have the same A, whose gradient is then the sum of the two.
    """
    head = "base_model.model."
    out = {
        f"{head}lm_head.lora_A.default.weight": t["output.lora_a"],
        f"{head}lm_head.lora_B.default.weight": t["output.lora_b"],
    }
    out[f"{head}model.embed_tokens.lora_embedding_A.default"] = t["tok_embeddings.lora_a"]
    out[f"{head}model.embed_tokens.lora_embedding_B.default"] = t["tok_embeddings.lora_b"]
    for n in range(args.n_layers):
        ours, theirs = f"layers.{n}.", f"{head}model.layers.{n}."
        for linear, name in LINEARS.items():
            b = t[f"{ours}attention.{name}.lora_b"]
            heads = {"wq": args.n_heads, "wk": args.n_kv_heads}.get(name)
            out[f"{theirs}self_attn.{linear}.lora_A.default.weight"] = t[f"{ours}attention.{name}.lora_a"]
            out[f"{theirs}self_attn.{linear}.lora_B.default.weight"] = half_split(b, heads) if heads else b
        out[f"{theirs}mlp.gate.lora_A.default.weight"] = t[f"{ours}feed_forward.gate.lora_a"]
        out[f"{theirs}mlp.gate.lora_B.default.weight"] = t[f"{ours}feed_forward.gate.lora_b"]
        a1, a2, a3 = (t[f"{ours}feed_forward.experts.{w}_lora_a"] for w in ("w1", "w2", "w3"))
        b1, b2, b3 = (t[f"{ours}feed_forward.experts.{w}_lora_b"] for w in ("w1", "w2", "w3"))
        fused_a = a1 if shared else torch.cat([a1, a3], 1)
        fused_b = torch.cat([b1, b3], 1) if shared else torch.stack([torch.block_diag(*b) for b in zip(b1, b3, strict=True)])
        # the first parameter of the module is wrapped first, and so lies innermost
        for where, a, b in (("experts.base_layer", fused_a, fused_b), ("experts", a2, b2)):
            out[f"{theirs}mlp.{where}.lora_A.default.weight"] = a.flatten(0, 1)
            out[f"{theirs}mlp.{where}.lora_B.default.weight"] = b.permute(1, 2, 0).flatten(1)
    return out


@pytest.mark.parametrize(
    ("layout", "kernel", "shared"),
    [("mixtral", "looped", True), ("mixtral", "grouped", False), ("mixtral_sparse", "looped", False)],
)
def test_logits_loss_and_gradients(layout, kernel, shared):
    section = TuningSection(lora=LoraSection(rank=RANK, alpha=ALPHA, targets=TARGETS))
    w = weights(ARGS, scale=5.0, dtype=torch.float32, adapters=resolve(section, ARGS).logical.adapters)
    if shared:
        w |= {name.replace("w1", "w3"): w[name] for name in w if name.endswith("w1_lora_a")}
    batch = collate(samples(4, seed=5, longest=40))
    ((logits, loss, gradients),) = run_ranks(1, run_ours, layout, kernel, section, w, batch)

    width = 1 if shared else 2  # of the fused adapter, in ranks
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[*LINEARS, "embed_tokens", "lm_head"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
        rank_pattern={r".*\.gate_up_proj": width * RANK},
        alpha_pattern={r".*\.gate_up_proj": width * ALPHA},
    )
    model = get_peft_model(transformers_model(w), config)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = as_peft(w, shared)
    assert {name: p.shape for name, p in parameters.items()} == {name: t.shape for name, t in expected.items()}
    for name, parameter in parameters.items():
        parameter.data.copy_(expected[name])
    tokens, labels, mask = grid(batch)
    out = model(input_ids=tokens, attention_mask=mask.long(), labels=labels)
    out.loss.backward()

    assert close(logits, out.logits[mask])
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
    if shared:
        for name in [name for name in gradients if name.endswith("w1_lora_a")]:
            gradients[name] = gradients[name] + gradients[name.replace("w1", "w3")]
    for name, gradient in as_peft(gradients, shared).items():
        theirs = parameters[name].grad
        if not shared and name.endswith("base_layer.lora_B.default.weight"):  # only its blocks on the diagonal are ours
            theirs = theirs * (expected[name] != 0)
        assert close(gradient, theirs), name
