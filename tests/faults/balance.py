"""The balance loss in each of its modes, and the z-loss."""

from faults.checks import FSDP, GLOBAL
from faults.fault import Fault

FILE = "accessory/train/balance.py"
FORMULAS = "tests/test_balance.py::test_formulas_are_those_of_the_papers"
EVERY = "tests/test_balance.py::test_every_partition_equals_the_plain_process"

FAULTS = (
    Fault(
        "tokens are counted once for each choice",
        FILE,
        "tokens = counts.sum(-1).to(probs.dtype) / top_k\n",
        "tokens = counts.sum(-1).to(probs.dtype)\n",
        FORMULAS,
    ),
    Fault(
        "the number of experts is left out",
        FILE,
        "products * counts.shape[-1] / (top_k",
        "products / (top_k",
        FORMULAS,
    ),
    Fault(
        "global: the sum over layers, not their mean",
        FILE,
        "unevenness(counts, stats.probs.sum(1), top_k).mean()",
        "unevenness(counts, stats.probs.sum(1), top_k).sum()",
        FORMULAS,
    ),
    Fault(
        "global: each rank has its own counts, with accumulation",
        FILE,
        "    return model.mesh.dp.all_reduce(torch.stack(counts).sum(0))\n",
        "    return torch.stack(counts).sum(0)\n",
        GLOBAL,
    ),
    Fault(
        "global: the counts are those of the first micro-batch",
        FILE,
        "all_reduce(torch.stack(counts).sum(0))",
        "all_reduce(counts[0] * len(counts))",
        GLOBAL,
    ),
    Fault(
        "global: the counts are those without dropout",
        "accessory/train/balance.py",
        "model(batch.inputs(dropout=True), Nothing())",
        "model(batch.inputs(), Nothing())",
        "tests/test_tuning.py::test_dropout_does_not_depend_on_the_partition",
    ),
    Fault(
        "document: a plain mean over documents, whatever their lengths",
        FILE,
        "(unevenness(stats.counts, stats.probs, top_k) * lengths).sum(1).mean() / tokens.clamp(min=1)",
        "(unevenness(stats.counts, stats.probs, top_k) * (lengths.sum(1, keepdim=True) / lengths.shape[1])).sum(1).mean()"
        " / tokens.clamp(min=1)",
        FORMULAS,
    ),
    Fault(
        "global: each rank has its own counts, without accumulation",
        FILE,
        "global_balance(stats, dp.all_reduce(stats.counts.sum(1)), top_k)",
        "global_balance(stats, stats.counts.sum(1), top_k)",
        "certify --only world=2 mp=1 accum=1 'balance over=global'",
    ),
    Fault(
        "microbatch: added up, not averaged",
        FILE,
        "microbatch_balance(stats, top_k) / parts",
        "microbatch_balance(stats, top_k) / len(micro_batches)",
        f"{EVERY}[microbatch]",
    ),
    Fault(
        "hf: not times K",
        FILE,
        "return top_k * unevenness(stats.counts.sum((0, 1))",
        "return unevenness(stats.counts.sum((0, 1))",
        "tests/test_balance.py::test_hf_is_transformers_own_function",
    ),
    Fault(
        "hf: layer by layer",
        FILE,
        "unevenness(stats.counts.sum((0, 1)), stats.probs.sum((0, 1)), top_k)",
        "unevenness(stats.counts.sum(1), stats.probs.sum(1), top_k).mean()",
        FORMULAS,
    ),
    Fault(
        "bias: the balance loss trains as well",
        FILE,
        'return 0.0 if self.balance == "bias" else args.load_balancing_weight',
        "return args.load_balancing_weight",
        f"{EVERY}[bias]",
    ),
    Fault(
        "the weight is applied twice",
        "accessory/train/step.py",
        "+ balance_weight * share +",
        "+ balance_weight * balance_weight * share +",
        FSDP,
    ),
    Fault(
        "the z-loss is a sum over layers",
        FILE,
        "stats.z.sum() / (len(stats.z) * tokens.clamp(min=1))",
        "stats.z.sum() / tokens.clamp(min=1)",
        FORMULAS,
    ),
)
