"""An outside oracle: optimiser steps of ``accessory finetune`` against transformers, PEFT, and an AdamW written out here.

Weights, forward and router logits are transformers' (with LoRA PEFT's), wholly in fp64; tokens are sentencepiece's; the
losses, the schedule, clipping and AdamW are the few lines below, by their definitions. The shapes are odd on purpose:
6 or 9 experts of which a token takes 3, heads wider than D / H, a window of less than a third of every sequence.
"""

import json
import math
import random
import re
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import pytest
import torch
from jobs import command
from models import WORDS, make_tokenizer, weights, write_adapter
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from test_commands import rows
from test_peft import LINEARS, TARGETS, as_peft
from test_resume import box
from test_transformers import by_logical_name, transformers_model
from transformers.models.mixtral import modeling_mixtral

from accessory.checkpoint.open import Checkpoint
from accessory.model.args import ModelArgs, MoEArgs
from accessory.settings import LoraSection, TuningSection
from accessory.tuning.spec import resolve

ARGS = ModelArgs(
    dim=36,
    hidden_dim=22,
    head_dim=8,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    vocab_size=310,
    norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=7,
    max_seq_len=110,
    moe=MoEArgs(num_experts=6, num_experts_per_tok=3),
)
RECORDS, EPOCHS = 10, 2
PACKED_ROWS = 5
LR, MIN_LR, WARMUP_EPOCHS = 1e-2, 1e-3, 0.9
CLIP, DECAY, BETAS, EPS = 0.3, 0.1, (0.9, 0.95), 1e-3  # a large eps, so that AdamW does not blow rounding up
BALANCE_WEIGHT, Z_WEIGHT = 0.3, 0.05
RANK, ALPHA = 3, 2.0
EXACT = 1e-12


@dataclass(frozen=True)
class Case:
    """Each epoch is two steps, the second of fewer rows."""

    layout: str
    experts: int
    ranks: int  # two of them hold a model
    accumulation: int
    batch_size: int
    balance: str = "global"
    mode: str = "fsdp"
    packed: bool = False
    lora: bool = False

    @property
    def args(self):
        return replace(ARGS, moe=MoEArgs(self.experts, 3))

    @property
    def global_batch(self):
        return self.ranks // 2 * self.accumulation * self.batch_size


CASES = {
    "expert": Case("mixtral", 6, 2, 3, 2),
    "expert, dp": Case("mixtral", 6, 4, 3, 1, "document", "ddp"),
    "expert, dp, packed, lora": Case("mixtral", 6, 4, 2, 1, packed=True, lora=True),
    "sparse, dp": Case("mixtral_sparse", 9, 4, 3, 1),
    "sparse, packed": Case("mixtral_sparse", 9, 2, 3, 1, "document", packed=True),
    "sparse, dp, lora": Case("mixtral_sparse", 9, 4, 3, 1, lora=True),
}


# The run


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Records and a tokenizer."""
    home = tmp_path_factory.mktemp("oracle")
    make_tokenizer(home / "tokenizer.model", ARGS.vocab_size)
    rng = random.Random(1)
    with open(home / "records.jsonl", "w") as file:
        for _ in range(RECORDS):
            question, answer = (" ".join(rng.choices(WORDS, k=rng.randint(*size))) for size in ((1, 10), (2, 16)))
            file.write(json.dumps({"instruction": question, "output": answer}) + "\n")
    (home / "mix.yaml").write_text("META: [{path: records.jsonl, template: mixtral-instruct}]\n")
    return home


def spec_of(case):
    section = TuningSection(lora=LoraSection(rank=RANK, alpha=ALPHA, targets=TARGETS))
    return resolve(section, case.args)


def start_of(case):
    """The tensors that the run starts from; no adapter is zero, no norm is one."""
    w = weights(case.args, seed=11, adapters=spec_of(case).logical.adapters if case.lora else None)
    generator = torch.Generator().manual_seed(5)
    noise = {name: torch.randn(t.shape, generator=generator, dtype=t.dtype) for name, t in w.items() if "norm" in name}
    return w | {name: w[name] + 0.2 * some for name, some in noise.items()}


def finetune(case, w, home, folder):
    """Run the command; returns what it printed, its log lines, and what it saved by logical name."""
    transformers_model(w, case.args).save_pretrained(folder / "base")
    given, tuning = folder / "base", ""
    if case.lora:
        trained = {name: t for name, t in w.items() if "lora_" in name}
        (folder / "adapter").mkdir()
        write_adapter(folder / "adapter", spec_of(case).logical, trained, Checkpoint(folder / "base").fingerprint)
        given = f"[{folder}/base, {folder}/adapter]"
        tuning = f"tuning: {{lora: {{rank: {RANK}, alpha: {ALPHA}, targets: [{', '.join(TARGETS)}]}}}}"
    (folder / "run.yaml").write_text(
        f"""
model: {{layout: {case.layout}, checkpoint: {given}, tokenizer: {home}/tokenizer.model}}
data: {{mix: {home}/mix.yaml, max_seq_len: {ARGS.max_seq_len}, packing: {str(case.packed).lower()}, validation: 0}}
parallel: {{precision: fp64, model_parallel: 2, data_parallel: {case.mode}}}
optim: {{lr: {LR}, min_lr: {MIN_LR}, warmup_epochs: {WARMUP_EPOCHS}, weight_decay: {DECAY}, clip_grad: {CLIP},
         betas: [{BETAS[0]}, {BETAS[1]}], eps: {EPS}}}
train: {{epochs: {EPOCHS}, batch_size: {case.batch_size}, accumulation: {case.accumulation}, balance: {case.balance},
         balance_weight: {BALANCE_WEIGHT}, z_loss_weight: {Z_WEIGHT}}}
log: {{every: 1, tensorboard: false, probe_tokens: 0}}
save: {{state_every: null}}
{tuning}
out: {folder}/run
"""
    )
    codes, out, err = command("finetune", folder / "run.yaml", ranks=case.ranks)
    assert codes == [0] * case.ranks, err
    saved = folder / "run" / f"epoch{EPOCHS - 1}"
    if case.lora:
        tensors = load_file(saved / "adapter.safetensors")
    else:
        checkpoint = Checkpoint(saved)
        tensors = {name: checkpoint.read(name, box(tiles)) for name, tiles in checkpoint.readers[0].tiles.items()}
    return out, [row for row in rows(folder / "run") if "loss" in row], tensors


# The data: data/README.md, "mixtral-instruct"


@pytest.fixture(scope="module")
def samples(home):
    """(token ids, how many of them are the question) of each record."""
    encode = SentencePieceProcessor(model_file=str(home / "tokenizer.model")).encode
    result = []
    for line in (home / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        question = [1, *encode(f"[INST] {record['instruction']} [/INST]")]
        result.append((torch.tensor([*question, *encode(record["output"]), 2]), len(question)))
    lengths = [len(ids) for ids, _ in result]
    assert max(lengths) <= ARGS.max_seq_len and 3 * ARGS.sliding_window < min(lengths)
    assert (PACKED_ROWS - 1) * ARGS.max_seq_len < sum(lengths)
    return result


def batches_of(samples, log):
    """The samples of each step. Their order is no matter of numerics: it is told by how many tokens a step had."""
    sizes = [(len(ids), len(ids) - question) for ids, question in samples]
    everything, steps = set(range(RECORDS)), []
    for first, second in zip(log[::2], log[1::2], strict=True):
        chosen = [
            some
            for count in range(1, RECORDS)
            for some in combinations(range(RECORDS), count)
            if tuple(map(sum, zip(*(sizes[i] for i in some), strict=True))) == (first["tokens"], first["targets"])
        ]
        assert len(chosen) == 1, f"{chosen} have the tokens of step {first['step']}"
        rest = everything - set(chosen[0])
        assert (second["tokens"], second["targets"]) == tuple(map(sum, zip(*(sizes[i] for i in rest), strict=True)))
        steps += [list(chosen[0]), sorted(rest)]
    return [[samples[i] for i in step] for step in steps]


# transformers in fp64: what it does in fp32 whatever the model's dtype (norms, softmax of attention and of the router,
# rotary angles) is put in its place with the same formula and no cast


@pytest.fixture(scope="module", autouse=True)
def wholly_double():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_mixtral.MixtralRMSNorm, "forward", norm_forward)
        patch.setattr(modeling_mixtral.MixtralTopKRouter, "forward", router_forward)
        patch.setattr(modeling_mixtral.MixtralRotaryEmbedding, "forward", rotary_forward)
        patch.setattr(modeling_mixtral, "eager_attention_forward", attention_forward)
        yield


def norm_forward(self, x):
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def router_forward(self, x):
    logits = torch.nn.functional.linear(x.reshape(-1, self.hidden_dim), self.weight)
    values, chosen = logits.softmax(-1).topk(self.top_k, -1)
    return logits, values / values.sum(-1, keepdim=True), chosen


def rotary_forward(self, x, position_ids):
    head_dim, theta = self.config.head_dim, self.config.rope_parameters["rope_theta"]
    angles = position_ids[..., None] * theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def attention_forward(module, q, k, v, mask, scaling, **_):
    k, v = (modeling_mixtral.repeat_kv(x, module.num_key_value_groups) for x in (k, v))
    shares = (q @ k.mT * scaling + mask).softmax(-1)
    return (shares @ v).transpose(1, 2), shares


def model_of(case, w):
    """transformers' model, with PEFT's adapters around it; and, where only a part of a tensor is ours, which."""
    model = transformers_model(w, case.args)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    if not case.lora:
        return model, {}
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[*LINEARS, "embed_tokens", "lm_head"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
        rank_pattern={r".*\.gate_up_proj": 2 * RANK},  # one adapter for w1 and w3: theirs as two blocks on the diagonal
        alpha_pattern={r".*\.gate_up_proj": 2 * ALPHA},
    )
    model = get_peft_model(model, config).double()
    given = as_peft(w, shared=False, args=case.args)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(given[name])
    ours = as_peft({name: torch.ones_like(t) for name, t in w.items()}, shared=False, args=case.args)
    return model, {name: ours[name] for name in ours if name.endswith("base_layer.lora_B.default.weight")}


# Training, by its definitions


def loss_parts(model, case, samples):
    """Sum of the cross-entropy, the balance loss, the z-loss and the number of targets of a global batch."""
    ce, targets, documents = 0.0, 0, []
    for ids, question in samples:
        out = model(input_ids=ids[None], output_router_logits=True)
        assert out.logits.dtype == torch.float64
        ce = ce - out.logits[0, question - 1 : -1].log_softmax(-1).gather(1, ids[question:, None]).sum()
        targets += len(ids) - question
        documents.append(torch.stack(out.router_logits))  # [L, S, E]
    everything = torch.cat(documents, 1)
    z = everything.logsumexp(-1).square().mean()
    if case.balance == "global":
        documents = [everything]
    balance = sum(switch_loss(logits) * logits.shape[1] for logits in documents) / everything.shape[1]
    return ce / targets, balance, z, targets


def switch_loss(logits):
    """E / (T K) sum_e count_e mean_t p_te of logits [L, T, E], mean over layers."""
    probs, (_, tokens, experts) = logits.softmax(-1), logits.shape
    counts = torch.zeros_like(probs).scatter(-1, probs.topk(3, -1).indices, 1.0).sum(1)
    return (experts / (tokens * 3) * (counts * probs.mean(1)).sum(-1)).mean()


def learning_rates(case):
    """Of each step: linear over the first WARMUP_EPOCHS, reached where the rows behind the step are; then half a cosine
    over the rows before it."""
    epoch = PACKED_ROWS if case.packed else RECORDS
    warmup, total = WARMUP_EPOCHS * epoch, EPOCHS * epoch
    borders = sorted({e * epoch + n for e in range(EPOCHS) for n in (*range(0, epoch, case.global_batch), epoch)})
    result = []
    for before, after in pairwise(borders):
        if before < warmup:
            result.append(LR * min(1.0, after / warmup))
        else:
            half = (1 + math.cos(math.pi * (before - warmup) / (total - warmup))) / 2
            result.append(MIN_LR + (LR - MIN_LR) * half)
    return result


def train(model, case, batches, masks):
    """AdamW (Loshchilov & Hutter 2019), whose decay leaves vectors alone; returns what a run logs of each step."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    log = []
    for step, (batch, lr) in enumerate(zip(batches, learning_rates(case), strict=True), 1):
        ce, balance, z, targets = loss_parts(model, case, batch)
        loss = ce + BALANCE_WEIGHT * balance + Z_WEIGHT * z
        gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
        gradients |= {name: gradients[name] * mask for name, mask in masks.items()}
        size = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        clip = min(1.0, CLIP / (size + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        for name, p in parameters.items():
            g, m, v = clip * gradients[name], first[name], second[name]
            m.copy_(BETAS[0] * m + (1 - BETAS[0]) * g)
            v.copy_(BETAS[1] * v + (1 - BETAS[1]) * g**2)
            update = m / (1 - BETAS[0] ** step) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS)
            p.data -= lr * update + (lr * DECAY * p.data if p.dim() > 1 else 0.0)
        values = {"loss": ce, "balance": balance, "z_loss": z, "grad_norm": size, "lr": lr, "targets": targets}
        log.append({key: value.item() if torch.is_tensor(value) else value for key, value in values.items()})
    return log, {name: p.detach() for name, p in parameters.items()}


@pytest.mark.parametrize("name", CASES)
def test_steps_of_the_command(name, home, samples, tmp_path):
    case = CASES[name]
    w = start_of(case)
    out, log, saved = finetune(case, w, home, tmp_path)
    assert len(log) == 2 * EPOCHS
    assert not case.packed or int(re.search(r"packing: (\d+) rows", out)[1]) == PACKED_ROWS

    batches = batches_of(samples, log)
    assert case.packed or [len(batch) for batch in batches] == [case.global_batch, RECORDS - case.global_batch] * EPOCHS
    model, masks = model_of(case, w)
    expected, tensors = train(model, case, batches, masks)
    for ours, theirs in zip(log, expected, strict=True):
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=EXACT), f"{key} of step {ours['step']}"
    assert all(row["grad_norm"] > 2 * CLIP for row in log), "every step is clipped"

    ours = as_peft(saved, shared=False, args=case.args) if case.lora else saved
    theirs = tensors if case.lora else by_logical_name(tensors, case.args)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        error = (ours[key].view_as(tensor) - tensor).abs().max() / tensor.abs().max()
        assert error <= EXACT, f"{key} differs by {error:.1e}"
